"""The check of pipelines: that layers and micro-batches can be cut so, and what a pipeline can't have yet."""

from megalina.blocks.model import step_shape
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.pipelined import pipelined
from megalina.config import ParallelConfig, PretrainConfig, StrategyConfig
from megalina.plan_settings import AUTO, plan_of
from megalina.step.pipeline.job import forward_of
from megalina.step.strategy import Setting


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
    if strategy.order:
        raise ValueError(
            f"strategy.plan={strategy.plan} has an order of the instructions of one list for all ranks, and with {where} each "
            "rank has its own: take a plan without one, which strategy=auto finds with the same parallel.pp"
        )
    if strategy.partition == AUTO:
        raise ValueError(
            f"strategy.partition=auto and {where} exclude each other, as it simulates a list that is the same on all ranks: set "
            "it to a number of parts"
        )
    if config.router.group == "global":
        raise ValueError(
            f"router.group=global and {where} exclude each other, as its balance loss is of a whole step in one micro-batch, for "
            "which all ranks of a pipeline but one would wait: set router.group=micro_batch or sequence"
        )
    job = pipelined(config, world)
    forward_of(Setting(step_shape(config), {}, plan_of(strategy)), job)  # parts of a stage
    empty = [rank for rank in range(job.ranks) if not job.held(rank).layers]
    if optimizer_of(config.optim).clips_heads and empty:
        raise ValueError(
            f"optim={config.optim.name} clips by what every pipeline rank's attention tells, and rank {empty[0]} has no layer: "
            "give each rank one with parallel.pp_layout, or take optim=muon"
        )


def refuse_pipelines(config: PretrainConfig, what: str) -> None:
    """ValueError where `what`, a command or a part of one, would have to know of pipelines."""
    if config.parallel.pp > 1:
        raise ValueError(f"parallel.pp={config.parallel.pp}: {what}; set parallel.pp=1")
