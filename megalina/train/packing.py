"""Packing: how many experts a device holds (Lina, section 4.3).

Packing k gives each device k times the experts: tokens then travel in groups k times smaller, perhaps inside one node, but
each expert has k times the replicas, whose gradients are summed, and a device needs the memory.  The paper's rule compares
two times of the forward pass and never goes back.  Here each packing that is `worth_trying` is tried for a few whole steps
(`megalina.train.trials`), which hold all of its price, and later the same search may bring it back.
"""

from collections.abc import Sequence

from megalina.blocks.counts import expert_bytes_on_rank, expert_params_on_rank
from megalina.blocks.routers import kind_of
from megalina.config import BYTES, PretrainConfig, is_moe_layer, training_layers
from megalina.layout import axis_sizes, rows

BYTES_FACTOR = 1.5  # what puts so many times the bytes of the least packing on the wire is not tried


def allowed_packings(config: PretrainConfig, world: int) -> tuple[int, ...]:
    """Those that groups are made for, rising: the one that `strategy.packing` gives, or with auto all doublings that divide
    parallel.ep and stay below `strategy.packing_memory_gb`."""
    strategy, ep = config.strategy, config.parallel.ep
    if strategy.packing != "auto":
        return (int(strategy.packing),)
    limit_bytes = strategy.packing_memory_gb * 1e9 or float("inf")
    allowed = [1]
    while ep % (2 * allowed[-1]) == 0 and expert_bytes_on_rank(config, world, 2 * allowed[-1]) <= limit_bytes:
        allowed.append(2 * allowed[-1])
    return tuple(allowed)


def wire_bytes(config: PretrainConfig, world: int, packing: int, *, ranks_per_node: int) -> float:
    """What a rank sends in a step for the sake of its experts, on average: rows there and back, forward and backward, and the
    sum of the replicas' gradients as a ring.

    Of what stays inside a node nothing counts, unless all ranks are on one.  In a pipeline of a rank of one stage, as if it had
    all layers: packings are compared."""
    train, model, parallel = config.train, config.model, config.parallel
    alone = ranks_per_node >= world
    world //= parallel.pp
    groups = rows(axis_sizes(world, tp=parallel.tp, ep=parallel.ep, cp=parallel.cp, packing=packing))
    node = range(world) if alone else [rank // ranks_per_node for rank in range(world)]
    layers = sum(is_moe_layer(model, i) for i in training_layers(model))
    tokens = train.global_batch_size * train.seq_len / world
    ways = len(groups["ep"][0]) if kind_of(config.router).is_dense else config.router.top_k  # copies of a token
    rows_bytes = 4 * layers * tokens * ways * model.d_model * BYTES[train.dtype]
    gradient_bytes = expert_params_on_rank(config, packing) * max(4, BYTES[train.dtype])
    outside = sum(node[a] != node[b] for row in groups["ep"] for a in row for b in row) / (world * len(groups["ep"][0]))
    copies = len(groups["copies"][0])
    hops = sum(node[a] != node[b] for row in groups["copies"] for a, b in zip(row, row[1:] + row[:1], strict=True)) / world
    return rows_bytes * outside + 2 * (copies - 1) / copies * gradient_bytes * hops


def worth_trying(config: PretrainConfig, world: int, packings: Sequence[int], *, ranks_per_node: int) -> tuple[int, ...]:
    """Without packings that put far more bytes on the wire than the first one does."""
    bytes_of = {k: wire_bytes(config, world, k, ranks_per_node=ranks_per_node) for k in packings}
    return tuple(k for k in packings if bytes_of[k] <= BYTES_FACTOR * bytes_of[packings[0]] or k == packings[0])
