"""The meshes of a configuration, one for each packing."""

import os
from collections.abc import Sequence

import torch.distributed as dist

from megalina.blocks.dispatch import ONCE_PER_NODE, dispatch_of
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
    parallel.reduce=by_node and parallel.dispatch=once_per_node where they can't be."""
    parallel = config.parallel
    across = pipelined(config, world, vocab_size=vocab_size).across if parallel.pp > 1 else {}
    meshes = build_meshes(
        tp=parallel.tp,
        ep=parallel.ep,
        cp=parallel.cp,
        packings=packings,
        pp=parallel.pp,
        across=across,
        timeout_s=config.cluster.timeout_s if timeout_s is None else timeout_s,
        ranks_per_node=summing_by_node(parallel),
        token_ranks_per_node=sending_by_node(config),
    )
    whole = meshes.get(1)
    if parallel.dispatch == ONCE_PER_NODE and whole is not None and whole.ep.nodes is None:
        raise ValueError(
            f"parallel.dispatch=once_per_node: the {parallel.ep} ranks of parallel.ep are on one node, or each on one of "
            "its own: use once_per_rank, or auto"
        )
    return meshes


def summing_by_node(parallel: ParallelConfig) -> int:
    """Ranks on a node, where gradients are summed by node; 0: flat.  All ranks call it together, and get the same.

    ValueError for parallel.reduce=by_node with NCCL, and where ranks lie on one node, or nodes have one each or unequal
    numbers."""
    if parallel.reduce == "flat":
        return 0
    wanted = "parallel.reduce=by_node" if parallel.reduce == "by_node" else ""
    return _ranks_per_node(wanted, "NCCL sums by node by itself: use flat, or auto", "use flat, or auto")


def sending_by_node(config: PretrainConfig) -> int:
    """Ranks on a node, where tokens travel once to each node (`parallel.dispatch`); 0: they don't.  Otherwise as
    `summing_by_node`."""
    if dispatch_of(config).kind != ONCE_PER_NODE and config.parallel.dispatch != ONCE_PER_NODE:
        return 0
    wanted = "parallel.dispatch=once_per_node" if config.parallel.dispatch == ONCE_PER_NODE else ""
    return _ranks_per_node(wanted, "with NCCL use once_per_rank, or auto", "use once_per_rank, or auto")


def _ranks_per_node(wanted: str, with_nccl: str, otherwise: str) -> int:
    """0 where nodes can't be used; ValueError if a setting asks for them, `wanted`."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return 0
    if not is_gloo(None):
        if wanted:
            raise ValueError(f"{wanted} is for gloo; {with_nccl}")
        return 0
    counts: list[int] = [0] * world
    dist.all_gather_object(counts, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    per_node = counts[0]
    if len({*counts}) == 1 and 1 < per_node < world and world % per_node == 0:
        return per_node
    if wanted:
        raise ValueError(
            f"{wanted} with {world} ranks, on nodes of {', '.join(map(str, sorted({*counts})))}: it needs several "
            f"nodes, and equally many ranks on each, more than one: {otherwise}"
        )
    return 0
