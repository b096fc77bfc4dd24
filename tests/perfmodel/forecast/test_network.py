"""Networks of cluster files: rates in bytes, adapters and fast links, and files that can't be simulated."""

from dataclasses import replace

import pytest

from megalina.compose import compose
from megalina.config import ClusterConfig, HardwareConfig
from megalina.perfmodel.forecast.network import NODES_PER_SWITCH, network_of


def cluster(name: str) -> ClusterConfig:
    return compose([f"cluster={name}"]).cluster


def test_a_node_of_eight_devices_with_an_adapter_each() -> None:
    found = network_of(cluster("h100_400g"))
    assert found.nic_bytes_per_s == pytest.approx(400e9 / 8 * 0.8)
    assert found.fast_bytes_per_s == pytest.approx(450e9 * 0.8)
    assert (found.ranks_per_node, found.nics_per_node, found.rings, found.nodes_per_group) == (8, 8, 8, 0)
    assert (found.hop_s, found.fast_hop_s, found.share) == (2e-6, 1e-6, "collective")


def test_a_fast_domain_may_hold_several_nodes() -> None:
    wide = cluster("gb200_nvl72")
    found = network_of(wide)
    assert found.ranks_per_node == wide.hardware.domain_ranks == 72 > wide.ranks_per_node
    assert found.nics_per_node == wide.hardware.nics_per_node * 72 // wide.ranks_per_node
    node_bytes_per_s = found.nic_bytes_per_s * wide.hardware.nics_per_node
    assert node_bytes_per_s == pytest.approx(wide.link_gbit * 1e9 / 8 * wide.hardware.collective_efficiency)


def test_an_over_subscribed_core_is_a_limit_of_its_own() -> None:
    h100 = cluster("h100_400g")
    found = network_of(replace(h100, hardware=replace(h100.hardware, oversubscription=2.0)))
    assert (found.nodes_per_group, found.oversubscription) == (NODES_PER_SWITCH, 2.0)


def test_emulated_nodes_share_their_link_by_flow() -> None:
    emulated = cluster("emulated")
    found = network_of(emulated)
    assert found.nic_bytes_per_s == emulated.link_gbit * 1e9 / 8
    assert (found.share, found.ranks_per_node) == ("flow", emulated.ranks_per_node)


def test_what_can_not_be_simulated_is_said() -> None:
    h100 = cluster("h100_400g")
    with pytest.raises(ValueError, match="fast links join 4 of a node's 8 ranks, which is not simulated"):
        network_of(replace(h100, hardware=replace(h100.hardware, domain_ranks=4)))
    with pytest.raises(ValueError, match="conf/cluster/local.yaml"):
        network_of(replace(cluster("local"), hardware=HardwareConfig()))
