"""The ledger: per step what was computed, short enough to keep and exact enough to compare.

A line holds digests of the batch's tokens, of the random state and of each MoE layer's routing, and loss and gradient norm
as hexadecimal floats.  Digests are sums over tokens, so they are the same number in every layout.  A plan's order of instructions
is long: the first line of a plan has it, later ones have its checksum.  `ledger.jsonl` has all steps of a run; a checkpoint has
those since the one before it, so that `train.resume=verify` can run them again.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalina.parallel.step_result import StepResult
from megalina.step.plan import Plan
from megalina.track.metrics import MetricsFile

Line = dict[str, Any]

logger = logging.getLogger("megalina")
MAX_LINES = 2000  # in a checkpoint


class Ledger:
    """All ranks keep the lines; the one that opens a file writes them too."""

    def __init__(self) -> None:
        self._lines: list[Line] = []  # since the checkpoint before the last
        self._saved = 0  # of them, how many were there at the last one
        self._orders: dict[str, list[str]] = {}  # of instructions, by checksum
        self._file: MetricsFile | None = None

    def open(self, folder: Path, resumed_step: int) -> None:
        """Write to FOLDER/ledger.jsonl from now on, after the lines of steps up to `resumed_step`."""
        self._file = MetricsFile(folder / "ledger.jsonl", resumed_step=resumed_step)

    def add(self, line: Line) -> None:
        """A full disk ends the file, not the run."""
        is_known = _checksum(line) in self._orders
        short = self._short(line)
        self._lines.append(short)
        if len(self._lines) > MAX_LINES:
            self._lines, self._saved = self._lines[1:], max(0, self._saved - 1)
        self._write(short if is_known else line)

    def event(self, line: Line) -> None:
        """Something that is no step: a rewind."""
        self._write(line)

    def lines(self) -> list[Line]:
        """For a checkpoint: the last steps, back to the checkpoint before the last."""
        known: set[str] = set()
        out = []
        for line in self._lines:
            key = _checksum(line)
            out.append(line if key in known else _with_order(line, self._orders))
            known.add(key)
        return out

    @property
    def saved_lines(self) -> int:
        """How many of them the last checkpoint has too."""
        return self._saved

    def saved(self) -> None:
        """A checkpoint has the lines."""
        self._lines = self._lines[self._saved :]
        self._saved = len(self._lines)

    def load(self, lines: Sequence[Line], saved_lines: int) -> None:
        """Go on from a checkpoint, as if it had just been saved."""
        self._lines, self._saved = [self._short(line) for line in lines], saved_lines
        self.saved()

    def rewind(self, step: int) -> None:
        """Forget what was written after `step`."""
        if self._file is not None:
            self._file.rewind(step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _short(self, line: Line) -> Line:
        """Without its order, which is kept here."""
        if not (key := _checksum(line)):
            return line
        order = line["plan"]["order"]
        if "lines" in order:
            self._orders[key] = order["lines"]
        return {**line, "plan": {**line["plan"], "order": {"checksum": key}}}

    def _write(self, line: Line) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line)
        except OSError as error:
            logger.warning("%s is not written any more (%s)", self._file.path, error)
            self._file = None


def with_orders(lines: Sequence[Line]) -> list[Line]:
    """Lines of a checkpoint, each with the order of its plan."""
    orders = {_checksum(line): line["plan"]["order"]["lines"] for line in lines if "lines" in _order(line)}
    return [_with_order(line, orders) for line in lines]


def _order(line: Line) -> Mapping[str, Any]:
    """{}: its plan has none."""
    found: Mapping[str, Any] = (line.get("plan") or {}).get("order", {})
    return found


def _checksum(line: Line) -> str:
    return str(_order(line).get("checksum", ""))


def _with_order(line: Line, orders: Mapping[str, list[str]]) -> Line:
    if (key := _checksum(line)) not in orders:
        return line
    return {**line, "plan": {**line["plan"], "order": {"checksum": key, "lines": orders[key]}}}


class RandomState:
    """What a step draws from.  Dropout and noise are functions of (seed, sequence); torch's own generator must not be touched,
    and if a step does draw from it, its state enters too."""

    def __init__(self) -> None:
        self._before = torch.get_rng_state()

    def digest(self, *, seed: int, first_sample: int) -> str:
        now = torch.get_rng_state()
        drawn = b"" if torch.equal(now, self._before) else now.numpy().tobytes()
        return hashlib.blake2b(f"{seed} {first_sample} ".encode() + drawn, digest_size=8).hexdigest()


def line_of(result: StepResult, *, step: int, first_sample: int, count: int, random: str, plan: Plan) -> Line:
    return {
        "step": step,
        "samples": [first_sample, count],
        "tokens": f"{result.tokens_digest:016x}",
        "random": random,
        "routing": [f"{digest:016x}" for digest in result.routing_digests],
        "loss_hex": result.loss.hex(),
        "grad_norm_hex": result.grad_norm.hex(),
        "updated": result.updates,
        "plan": plan.as_json(),  # rounding depends on it
    }


def difference(was: Mapping[str, Any], now: Mapping[str, Any], *, tolerance: float, moe_layers: Sequence[int]) -> str:
    """What differs first, in the order in which a step computes it; "" if nothing does.

    `tolerance` is relative, for loss and norm; with 0 they must be equal to the last bit and routing must be equal too.
    With another layout rounding may send a token elsewhere, so there only data, loss and norm decide."""
    for key, what in (("samples", "the sequences"), ("tokens", "the batch's tokens"), ("random", "the random state")):
        if was[key] != now[key]:
            return f"{what}: {was[key]} then, {now[key]} now"
    if tolerance == 0:
        for layer, a, b in zip(moe_layers, was["routing"], now["routing"], strict=True):
            if a != b:
                return f"the routing of layer {layer}: {a} then, {b} now"
    for key, what in (("loss_hex", "the loss"), ("grad_norm_hex", "the gradient norm")):
        a, b = float.fromhex(was[key]), float.fromhex(now[key])
        if was[key] != now[key] and not abs(a - b) <= tolerance * abs(a):
            relative = abs(a - b) / max(abs(a), 1e-300)
            return f"{what}: {a!r} ({was[key]}) then, {b!r} ({now[key]}) now, relative difference {relative:.1e}"
    if was["updated"] != now["updated"]:
        return f"whether the step was made: {was['updated']} then, {now['updated']} now"
    return ""
