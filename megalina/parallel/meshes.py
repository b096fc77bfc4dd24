"""The meshes of a configuration, one for each packing."""

from collections.abc import Sequence

from megalina.blocks.pipelined import pipelined
from megalina.config import PretrainConfig
from megalina.mesh import Mesh, build_meshes


def meshes_of(
    config: PretrainConfig,
    world: int,
    *,
    packings: Sequence[int] = (1,),
    vocab_size: int = 0,
    timeout_s: float | None = None,
) -> dict[int, Mesh]:
    """All ranks of the world call it.  `timeout_s`: None: that of the configuration's cluster."""
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
    )
