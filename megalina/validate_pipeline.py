"""The check of pipelines: that layers and micro-batches can be cut so, and what a pipeline can't have yet."""

from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.pipelined import pipelined
from megalina.config import ParallelConfig, PretrainConfig, StrategyConfig
from megalina.plan_settings import AUTO
from megalina.step.strategy import PIPELINED

WHOLE_LIST = {  # strategy.* -> why a pipeline's lists don't have it
    "parts": "cuts micro-batches, which a pipeline's cells take whole",
    "partition": "cuts micro-batches, which a pipeline's cells take whole",
    "packing": "moves experts between groups that pipelines don't make",
    "windows": "measures the gaps of a list that is the same on all ranks",
    "late_layers": "is what strategy.pipeline=zb_h1 does for every product, in cells of their own",
    "deferred_weights": "is what strategy.pipeline=zb_h1 does for every product, in cells of their own",
    "plan": "holds a list that is the same on all ranks",
}
MEASURED = ("partition_bytes", "chunks")  # may be auto


def check_pipeline(config: PretrainConfig, world: int) -> None:
    """ValueError for the first mistake.  Layout, batch and strategy are known to be right, pipelines aside.

    A table of `strategy.pipeline` is read."""
    parallel, strategy = config.parallel, config.strategy
    if parallel.pp == 1:
        for key in ("pp_chunks", "pp_layout"):
            if getattr(parallel, key) != getattr(ParallelConfig(), key):
                told = f"parallel.{key}={getattr(parallel, key)}"
                raise ValueError(f"{told} does nothing with parallel.pp=1: raise parallel.pp, or leave it out")
        if strategy.pipeline != StrategyConfig().pipeline:
            told = f"strategy.pipeline={strategy.pipeline}"
            raise ValueError(f"{told} does nothing with parallel.pp=1: raise parallel.pp, or leave it out")
        return
    where = f"parallel.pp={parallel.pp}"
    if strategy.name not in PIPELINED:
        raise ValueError(
            f"strategy={strategy.name} makes a list that goes over all layers, and with {where} each rank has cells of some: "
            f"choose {', '.join(PIPELINED)}, or parallel.pp=1"
        )
    _check_numbers(strategy, where)
    if config.router.group == "global":
        raise ValueError(
            f"router.group=global and {where} exclude each other, as its balance loss is of all layers at once, which are on "
            "several ranks: set router.group=micro_batch or sequence"
        )
    if config.profile.record:
        raise ValueError(
            f"profile.record=true and {where} exclude each other, as a rank sees the choices of some layers alone: set it to "
            "false"
        )
    job = pipelined(config, world)
    empty = [rank for rank in range(job.ranks) if not job.held(rank).layers]
    if optimizer_of(config.optim).clips_heads and empty:
        raise ValueError(
            f"optim={config.optim.name} clips by what every pipeline rank's attention tells, and rank {empty[0]} has no layer: "
            "give each rank one with parallel.pp_layout, or take optim=muon"
        )


def _check_numbers(strategy: StrategyConfig, where: str) -> None:
    plain = StrategyConfig()
    found = {key: why for key, why in WHOLE_LIST.items() if getattr(strategy, key) != getattr(plain, key)}
    found |= {key: "measures steps to choose by" for key in MEASURED if getattr(strategy, key) == AUTO}
    for key, why in found.items():
        raise ValueError(
            f"strategy.{key}={getattr(strategy, key)} and {where} exclude each other, as it {why}: set it to "
            f"{getattr(plain, key) or 'nothing'}"
        )


def refuse_pipelines(config: PretrainConfig, what: str) -> None:
    """ValueError where `what`, a command or a part of one, would have to know of pipelines."""
    if config.parallel.pp > 1:
        raise ValueError(f"parallel.pp={config.parallel.pp}: {what}; set parallel.pp=1")
