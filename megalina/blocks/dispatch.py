"""How a layer's tokens reach their experts (`parallel.dispatch`), and what `auto` takes: the fewest bytes between nodes.

All sets of experts are taken to be equally likely.  Of what a token sends everywhere the same part leaves a node, so what a token
sends in all says enough."""

from dataclasses import dataclass
from math import comb

from megalina.blocks.routers import kind_of
from megalina.config import BYTES, ClusterConfig, PretrainConfig
from megalina.layout import axis_sizes, by_node, rows

ROWS, ONCE_PER_RANK, ONCE_PER_NODE = "rows", "once_per_rank", "once_per_node"

# Of the bytes of what would be taken else, for parallel.dispatch=auto: to make rows anew where they arrive takes time, too.
MOST_OF_ROWS = 0.9


@dataclass(frozen=True, slots=True)
class Dispatch:
    kind: str = ROWS
    nodes: int = 0  # on which the ranks of ep lie, several on each; known for once_per_node alone


ALL_ROWS = Dispatch()


def dispatch_of(config: PretrainConfig, packing: int = 1) -> Dispatch:
    """On the nodes of the configuration's cluster.  `packing`: of the `Plan`.  Where ranks of ep are on one node, or each on one
    of its own, once per node is once per rank."""
    kind = config.parallel.dispatch
    if kind in (ROWS, ONCE_PER_RANK):
        return Dispatch(kind)
    nodes = nodes_along_ep(config, packing)
    if kind == "auto":
        kind = _fewest_bytes(config, 0 if on_cuda(config.cluster) else nodes_along_ep(config))
    if kind == ONCE_PER_NODE and not nodes:
        return Dispatch(ONCE_PER_RANK)
    return Dispatch(kind, nodes if kind == ONCE_PER_NODE else 0)


def _fewest_bytes(config: PretrainConfig, nodes: int) -> str:
    ep = config.parallel.ep
    if ep == 1 or kind_of(config.router).is_dense:
        return ROWS
    per_rank = bytes_of_rows(config, ep)
    if nodes and bytes_of_rows(config, nodes) <= MOST_OF_ROWS * min(1.0, per_rank):
        return ONCE_PER_NODE
    return ONCE_PER_RANK if per_rank <= MOST_OF_ROWS else ROWS


def bytes_of_rows(config: PretrainConfig, places: int) -> float:
    """What a token's rows weigh if it travels once to each of so many places (ranks, or nodes) that has experts of it, with their
    weights, over what its rows weigh if it travels once for each of its experts."""
    top_k, element = config.router.top_k, BYTES[config.train.dtype]
    row, weights = config.model.d_model * element, config.model.num_experts // places * max(4, element)
    return visited(config, places) * (row + weights) / (top_k * row)


def visited(config: PretrainConfig, places: int) -> float:
    """Of so many places (ranks, or nodes), those that have experts of a token."""
    experts, top_k = config.model.num_experts, config.router.top_k
    return places * (1 - comb(experts - experts // places, top_k) / comb(experts, top_k))


def rows_inside(config: PretrainConfig, packing: int = 1) -> float:
    """Rows that travel inside of nodes over those between them, where tokens travel once to each node."""
    dispatch = dispatch_of(config, packing)
    return visited(config, config.parallel.ep // packing) / visited(config, dispatch.nodes) if dispatch.nodes else 1.0


def nodes_along_ep(config: PretrainConfig, packing: int = 1) -> int:
    """Nodes of the configuration's cluster (of GPUs: domains of fast links) on which the ranks of ep lie; 0 where that is one,
    where each has one rank of them or an uneven number, and where the cluster's nodes are unknown."""
    parallel, cluster = config.parallel, config.cluster
    per_node = cluster.hardware.domain_ranks if on_cuda(cluster) else cluster.ranks_per_node
    if per_node < 2:
        return 0
    world = parallel.tp * parallel.cp * parallel.ep
    sizes = axis_sizes(world, tp=parallel.tp, ep=parallel.ep, cp=parallel.cp, packing=packing)
    return len(by_node(rows(sizes)["ep"][0], per_node))


def on_cuda(cluster: ClusterConfig) -> bool:
    """Whether its devices are GPUs, neither emulated ones nor cores."""
    return cluster.hardware.domain_ranks > 0 and not cluster.hardware.host_is_device
