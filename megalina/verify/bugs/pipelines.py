"""Bugs of pipelines: what has to be done once over all stages."""

from dataclasses import replace
from typing import Any

from megalina.comm import exchange
from megalina.config import PretrainConfig
from megalina.layout import EMBEDDING
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.step.pipeline.cell import COMPUTED, Work
from megalina.step.pipeline.job import Pipelined
from megalina.step.program import Kind, Op
from megalina.verify.bugs.change import after, seeds, with_program


def divided_by_micro_batches(trainable: Trainable, config: PretrainConfig) -> None:
    seeds(trainable, lambda loss, part: 1 / trainable.micro_batches)


def message_swapped(trainable: Trainable, config: PretrainConfig) -> None:
    """The first pipeline rank has computed its first two micro-batches before it sends either, and mistakes one for the other."""
    if trainable.mesh.pp_rank > 0:
        return
    sent = [i for i, s in enumerate(trainable.program) if s.op is Op.SEND and s.phase == "F" and s.kind is Kind.START]
    first, second = (trainable.program[i] for i in sent[:2])
    assert first.layer == second.layer, "the first two messages are of one border"
    waits = {s.key: s for s in trainable.program if s.op is Op.SEND and s.phase == "F" and s.kind is Kind.WAIT}
    ends = [waits[first.key], waits[second.key]]
    out = [s for s in trainable.program[: sent[1]] if s not in (first, *ends)]
    out += [replace(first, reads=second.reads), replace(second, reads=first.reads), *ends]
    out += [s for s in trainable.program[sent[1] :] if s not in (second, *ends)]
    with_program(trainable, tuple(out))


def begins_with_two(job: Pipelined) -> bool:
    """Whether the first rank computes two micro-batches and sends them before anything comes back."""
    cells = [cell for _, cell in job.pipeline.cells(0)]
    messages = [cell for cell in cells if cell.work not in COMPUTED]
    both = [of[:2] for of in (messages, [cell for cell in cells if cell.work in COMPUTED])]
    works = [[cell.work for cell in of] for of in both]
    alike = works == [[Work.SEND_ACTIVATIONS] * 2, [Work.FORWARD] * 2]
    return alike and {cell.stage for of in both for cell in of} == {0}


def split_stage(job: Pipelined) -> int | None:
    """The first stage with layers whose backward is split; None: there is none."""
    for number, stage in enumerate(job.stages):
        cells = (cell for _, cell in job.pipeline.cells(job.pipeline.rank_of[number]))
        if stage.layers and any(cell.stage == number and cell.work is Work.WEIGHT_GRADIENTS for cell in cells):
            return number
    return None


def weights_cell_left_out(trainable: Trainable, config: PretrainConfig) -> None:
    """Of that stage, and of its last micro-batch that has one."""
    job = trainable.pipelined
    assert job is not None
    stage = split_stage(job)
    assert stage is not None
    if trainable.mesh.pp_rank != job.pipeline.rank_of[stage]:
        return
    own = [s for s in trainable.program if s.phase == "W" and s.layer in job.stages[stage].layers]
    last = max(int(s.part.partition("c")[0]) for s in own)
    left_out = {s for s in own if s.part.partition("c")[0] == str(last)}
    with_program(trainable, tuple(s for s in trainable.program if s not in left_out))


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
