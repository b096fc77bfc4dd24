"""Bugs of pipelines: what has to be done once over all stages."""

from dataclasses import replace
from typing import Any

from megalina.comm import exchange
from megalina.config import PretrainConfig
from megalina.layout import EMBEDDING
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.step.program import Op
from megalina.verify.bugs.change import after, seeds, with_program


def divided_by_micro_batches(trainable: Trainable, config: PretrainConfig) -> None:
    seeds(trainable, lambda loss, part: 1 / trainable.micro_batches)


def weights_cell_left_out(trainable: Trainable, config: PretrainConfig) -> None:
    """Of the first stage and the last micro-batch."""
    last, mesh = str(trainable.micro_batches - 1), trainable.mesh
    if mesh.pp_rank > 0:
        return
    with_program(trainable, tuple(s for s in trainable.program if s.phase != "W" or s.part.partition("c")[0] != last))


def balance_of_first_stages_unseeded(trainable: Trainable, config: PretrainConfig) -> None:
    """The rank that has the main loss seeds its layers' balance losses, and the others none."""
    assert trainable.pipelined is not None
    if not trainable.pipelined.held(trainable.mesh.pp_rank).last:
        seeds(trainable, lambda loss, part: float(loss != "aux"))


def embedding_summed_by_stages(trainable: Trainable, config: PretrainConfig) -> None:
    """Over the data-parallel ranks alone."""
    changed = (replace(s, axis="dp") if s.op is Op.GRADS and s.axis == EMBEDDING else s for s in trainable.program)
    with_program(trainable, tuple(changed))


def norm_of_own_stage(trainable: Trainable, config: PretrainConfig) -> None:
    def own(result: StepResult, *_: Any) -> StepResult:
        squares = sum(bucket.square_sum() for bucket in trainable.buckets.values())
        stage = trainable.mesh.axis("stage")
        norm = exchange.start_sum(squares.reshape(1), stage, trainable.log).wait().item() ** 0.5  # type: ignore[union-attr]
        most = config.optim.clip_norm
        return replace(result, grad_norm=norm, grad_scale=min(1.0, most / (norm + 1e-6)) if most > 0 else 1.0)

    after(trainable, "verdict", own)
