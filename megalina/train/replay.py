"""The replay: the last steps before a checkpoint, run again from the one before it and compared with its ledger.

In the same arithmetic (layout, threads, versions) everything must be equal to the last bit, the weights at the end too.
In another one tokens, random state and order must be equal, loss and norm up to rounding.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalina.checkpoint.files import read_values
from megalina.mesh import all_gather_object
from megalina.step.plan import Plan
from megalina.train.ledger import Line, difference, with_orders
from megalina.train.step_runner import StepRunner

logger = logging.getLogger("megalina")
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2}  # relative, of loss and norm in another arithmetic


class ReplayDiffers(RuntimeError):
    """Steps that were run again did not give what they gave before."""


def replay(runner: StepRunner, newest: Path, before: Path | None) -> None:
    """Run the steps between the checkpoints again; `before` None: from the beginning.  The state of the run afterwards is
    that of `newest`.

    ReplayDiffers, on all ranks, that names the first step and what differs first in it.  ValueError where the ledger does
    not reach back far enough."""
    values, state = read_values(newest), runner.state
    start = read_values(before)["step"] if before is not None else 0
    lines: Mapping[int, Line] = {line["step"]: line for line in with_orders(values["ledger"])}
    origin = str(before) if before is not None else "the beginning"
    if missing := [step for step in range(start + 1, values["step"] + 1) if step not in lines]:
        raise ValueError(
            f"train.resume=verify: {newest} has no ledger of step {missing[0]} (train.ledger was off, or {origin} is too far "
            "back); go on with train.resume=auto"
        )
    if before is not None:
        state.load(before)
    elif runner.config.train.init_from:
        state.load_weights(Path(runner.config.train.init_from))
    state.windows = sorted((first, stop) for first, stop in values["skipped_samples"])
    changed = _changed(values["arithmetic"], state.arithmetic())
    tolerance = TOLERANCE[runner.config.train.dtype] if changed else 0.0
    worst = 0.0
    for step in range(start + 1, values["step"] + 1):
        there = lines[step].get("plan")
        if there and runner.adapts and (plan := Plan.from_json(there)).packing in runner.meshes:
            runner.adopt(plan)
        _, line = runner.compute(step)
        found = difference(lines[step], line, tolerance=tolerance, moe_layers=runner.trainable.gpt.moe_layers)
        if found:
            raise ReplayDiffers(
                f"train.resume=verify: step {step}, run again from {origin}, is not the step that {newest} was made with; "
                f"first difference: {found}"
            )
        worst = max(worst, _relative(lines[step], line))
    weights = _compare_tensors(runner, newest)
    if not changed and weights[0] > 0:
        raise ReplayDiffers(
            f"train.resume=verify: after step {values['step']} {weights[1]} is not what {newest} holds (off by {weights[0]:.1e} "
            "of its largest value)"
        )
    if runner.is_first:
        which = f"steps {start + 1} to {values['step']}"
        if changed:
            logger.info(
                "verified: %s run again with another %s; same sequences and tokens, loss and norm equal to %.1e (allowed: %.0e), "
                "weights and optimizer to %.1e of their largest",
                *(which, ", ".join(changed), worst, tolerance, weights[0]),
            )
        else:
            logger.info("verified: %s run again; tokens, routing, loss, norm, weights, optimizer equal to the last bit", which)


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in now if was.get(key) != now[key]]


def _relative(was: Line, now: Line) -> float:
    pairs = [(float.fromhex(was[key]), float.fromhex(now[key])) for key in ("loss_hex", "grad_norm_hex")]
    return max((abs(a - b) / max(abs(a), 1e-300) for a, b in pairs if a == a), default=0.0)


def _compare_tensors(runner: StepRunner, newest: Path) -> tuple[float, str]:
    """Loads `newest`; the largest difference to what was there before, over the largest value of its tensor, and its name."""
    before = {name: [s.local.clone() for s in slices] for name, slices in runner.state.tensors().items()}
    runner.state.load(newest)
    worst = (0.0, "nothing")
    for name, slices in runner.state.tensors().items():
        for was, part in zip(before[name], slices, strict=True):
            if part.local.numel() and not torch.equal(was, part.local):
                scale = part.local.abs().max().double().clamp(min=1e-300)
                worst = max(worst, (((was - part.local).abs().max().double() / scale).item(), name))
    everybody: Sequence[tuple[float, str]] = all_gather_object(runner.mesh, worst)
    return max(everybody)
