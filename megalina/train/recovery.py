"""Recovery: what a run does about a step whose loss or gradient can't be trusted, and where a value that isn't finite is from."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.checkpoint.files import newest_first
from megalina.mesh import all_gather_object
from megalina.parallel.executor import Executor
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.step.forward import plain
from megalina.step.program import Instruction
from megalina.track.tracker import Tracker
from megalina.train.step_runner import StepRunner

logger = logging.getLogger("megalina")
NOWHERE = 1 << 40


class SpikesGoOn(RuntimeError):
    """The guard has met too many spikes."""


def name_non_finite(runner: StepRunner, result: StepResult) -> None:
    """Say where a step's first value that is not finite came from: all ranks run its forward passes again."""
    own = first_bad_instruction(runner.trainable, runner.batch), result.non_finite
    instructions, gradients = zip(*all_gather_object(runner.mesh, own), strict=True)
    if not runner.is_first:
        return
    bad = sorted({name for own in gradients for name in own}, key=_backward_order(runner))
    place, rank, tag = min((place, rank, tag) for rank, (place, tag) in enumerate(instructions))
    if tag:
        where = f"the first is the output of instruction {tag} on rank {rank}"
    elif bad:
        where = "every value of the forward pass is finite, so it arose in backward"
    else:
        where = "the sum of squares of the gradients is not"
    parameters = f"; gradients: {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "") if bad else ""
    logger.warning(
        "warning: step %d is skipped on all ranks: loss %g, gradient norm %g; not finite: %s%s",
        *(runner.state.step, result.loss, result.grad_norm, where, parameters),
    )


def meet_spike(runner: StepRunner, result: StepResult, stop_sample: int, tracker: Tracker | None) -> bool:
    """The step with this result, whose sequences end before `stop_sample`, was refused; returns whether the run was taken
    back.  SpikesGoOn, on all ranks, after `guard.max_spikes` of them."""
    state, guard = runner.state, runner.config.guard
    state.spikes += 1
    what = (
        f"loss {result.loss:.4f} at step {state.step} is {state.guard.rise(result.loss):.2f} nats above the median of the "
        f"last {len(state.guard.state())}, {state.guard.score(result.loss):.1f} robust deviations "
        f"(guard.threshold {guard.threshold:g})"
    )
    if state.spikes > guard.max_spikes:
        raise SpikesGoOn(
            f"{what}; it is spike {state.spikes} "
            + ("since the last checkpoint" if guard.spike == "rewind" else "in a row")
            + f" and guard.max_spikes is {guard.max_spikes}: look at the text (ledger.jsonl has each step's sequences), "
            "lower optim.lr, or raise guard.threshold"
        )
    point = None
    if guard.spike == "rewind":
        state.wait()
        point = state.checkpoints.first_good(saved_before(Path(runner.config.run.dir) / "checkpoints", state.step))
    if point is None:
        if runner.is_first:
            why = "; there is no checkpoint to go back to yet" if guard.spike == "rewind" else ""
            logger.warning("warning: spike: %s; its update is left out%s", what, why)
        return False
    spikes, rewinds, step = state.spikes, state.rewinds + 1, state.step
    windows = state.windows
    state.load(point)
    window = (state.consumed_samples, stop_sample)
    state.windows = sorted({*windows, window})
    state.spikes, state.rewinds = spikes, rewinds
    state.ledger.rewind(state.step)
    event = {"step": state.step, "event": "rewind", "from_step": step, "skipped_samples": window, "loss_hex": result.loss.hex()}
    state.ledger.event(event)
    if tracker is not None:
        tracker.rewind(state.step)
    if runner.is_first:
        logger.warning(
            "warning: spike: %s; back to step %d, past sequences %d to %d (the same run without them: data.skip_samples=[%d,%d])",
            *(what, state.step, window[0], window[1] - 1, *window),
        )
    return True


def saved_before(folder: Path, step: int) -> list[Path]:
    """The checkpoints of earlier steps, newest first."""
    return [path for path in newest_first(folder) if int(path.name[5:]) < step]


def _backward_order(runner: StepRunner) -> Callable[[str], int]:
    """Backward meets the last layers first, so what is last in the model's order is where it began."""
    order = {name: i for i, (name, _) in enumerate(runner.trainable.gpt.named_parameters())}
    return lambda name: -order.get(name, 0)


def first_bad_instruction(trainable: Trainable, batch: Batch) -> tuple[int, str]:
    """Run the forward passes of `batch` again, with the weights as they are; all ranks together.

    Returns the place, in the model's order, of this rank's first instruction whose output is not finite, and its tag; (NOWHERE,
    "") if all are.
    """
    found, number = (NOWHERE, ""), 0  # of the micro-batch
    order = {s.key: i for i, s in enumerate(plain(trainable.setting.shape))}  # over all stages of a pipeline

    def watched(instruction: Instruction) -> Callable[..., Any]:
        function = trainable.functions(instruction)

        def run(*arguments: Any) -> Any:
            nonlocal found
            out = function(*arguments)
            values = out if isinstance(out, tuple) else (out,)
            bad = any(isinstance(v, Tensor) and v.is_floating_point() and not v.isfinite().all() for v in values)
            if bad and found[0] == NOWHERE:
                found = number * (len(order) + 1) + order.get(instruction.key, len(order)), instruction.tag
            return out

        return run

    program, mesh, buckets = trainable.evaluation_program, trainable.mesh, trainable.buckets
    executor = Executor(program, watched, mesh, buckets, log=trainable.log, stream=trainable.new_stream)
    trainable.gpt.train()
    with torch.no_grad():
        for number, part in enumerate(trainable.own_part(batch).split(trainable.micro_batch_size)):  # noqa: B007  `run` reads it
            trainable.expect_streams_of(part)
            executor.run({"#batch.-.0": part})
    return found
