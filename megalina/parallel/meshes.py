"""The meshes of a configuration, one for each packing."""

import os
from collections.abc import Sequence

import torch.distributed as dist

from megalina.blocks.pipelined import pipelined
from megalina.config import ParallelConfig, PretrainConfig
from megalina.groups import is_gloo
from megalina.mesh import Mesh, build_meshes


def meshes_of(
    config: PretrainConfig,
    world: int,
    *,
    packings: Sequence[int] = (1,),
    vocab_size: int = 0,
    timeout_s: float | None = None,
) -> dict[int, Mesh]:
    """All ranks of the world call it.  `timeout_s`: None: that of the configuration's cluster.  ValueError for
    parallel.reduce=by_node where it can't be."""
    parallel = config.parallel
    across = pipelined(config, world, vocab_size=vocab_size).across if parallel.pp > 1 else {}
    return build_meshes(
        tp=parallel.tp,
        ep=parallel.ep,
        cp=parallel.cp,
        packings=packings,
        pp=parallel.pp,
        across=across,
        timeout_s=config.cluster.timeout_s if timeout_s is None else timeout_s,
        ranks_per_node=summing_by_node(parallel),
    )


def summing_by_node(parallel: ParallelConfig) -> int:
    """Ranks on a node, where gradients are summed by node; 0: flat.  All ranks call it together, and get the same.

    ValueError for parallel.reduce=by_node with NCCL, and where ranks lie on one node, or nodes have one each or unequal
    numbers."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if parallel.reduce == "flat" or world == 1:
        return 0
    wanted = parallel.reduce == "by_node"
    if not is_gloo(None):
        if wanted:
            raise ValueError("parallel.reduce=by_node is for gloo; NCCL sums by node by itself: use flat, or auto")
        return 0
    counts: list[int] = [0] * world
    dist.all_gather_object(counts, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    per_node = counts[0]
    if len({*counts}) == 1 and 1 < per_node < world and world % per_node == 0:
        return per_node
    if wanted:
        raise ValueError(
            f"parallel.reduce=by_node with {world} ranks, on nodes of {', '.join(map(str, sorted({*counts})))}: it needs several "
            "nodes, and equally many ranks on each, more than one: use flat, or auto"
        )
    return 0
