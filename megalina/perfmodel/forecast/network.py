"""The network of a cluster's file, for virtual time."""

import math
from dataclasses import replace

from megalina.blocks.dispatch import rows_inside
from megalina.config import ClusterConfig, PretrainConfig
from megalina.perfmodel.sim.network import Network
from megalina.validate import check_hardware

NODES_PER_SWITCH = 16  # below one port of an over-subscribed core; assumed, no datasheet says it


def network_for(config: PretrainConfig, packing: int = 1) -> Network:
    """That of the configuration's cluster, and how its tokens part between and inside of nodes; `packing`: of the `Plan`."""
    return with_tokens(network_of(config.cluster), config, packing)


def with_tokens(network: Network, config: PretrainConfig, packing: int = 1) -> Network:
    """A network, and how a configuration's tokens part between and inside of nodes."""
    return replace(network, inside=rows_inside(config, packing))


def network_of(cluster: ClusterConfig) -> Network:
    """Rates are what collectives reach.  Emulated nodes talk TCP, which shares a link by flow; devices have channels, which keep
    pace with one another, and as many rings as a node has adapters.

    ValueError for figures that are missing or wrong, and where fast links join less than a node."""
    check_hardware(cluster)
    hardware, nic_bytes_per_s = cluster.hardware, cluster.link_gbit * 1e9 / 8
    if not hardware.domain_ranks:  # emulated: a node is a loopback, which is never the limit
        return Network(
            nic_bytes_per_s=nic_bytes_per_s,
            ranks_per_node=cluster.ranks_per_node,
            hop_s=cluster.latency_us / 1e6,
        )
    if hardware.domain_ranks < cluster.ranks_per_node:
        raise ValueError(
            f"conf/cluster/{cluster.name}.yaml: fast links join {hardware.domain_ranks} of a node's {cluster.ranks_per_node} "
            "ranks, which is not simulated; give domain_ranks of a node or more"
        )
    nics = hardware.nics_per_node * hardware.domain_ranks // cluster.ranks_per_node
    return Network(
        nic_bytes_per_s=nic_bytes_per_s * hardware.collective_efficiency / hardware.nics_per_node,
        ranks_per_node=hardware.domain_ranks,
        nics_per_node=nics,
        fast_bytes_per_s=hardware.domain_gbyte_s * 1e9 * hardware.collective_efficiency or math.inf,
        nodes_per_group=NODES_PER_SWITCH if hardware.oversubscription > 1 else 0,
        oversubscription=max(1.0, hardware.oversubscription),
        latency_s=hardware.kernel_us / 1e6,
        hop_s=cluster.latency_us / 1e6,
        fast_hop_s=hardware.domain_latency_us / 1e6,
        rings=nics,
        share="collective",
    )
