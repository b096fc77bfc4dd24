"""The comparison of two recordings: the first tensor that differs in the order of computation, and by how much."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megalina.blocks.optimizers import optimizer_of
from megalina.verify.recording import INITIAL, Entry, Recording

EXACT, AFTER_ADAM = 1e-12, 1e-10  # relative; Adam divides by roots of squares, which magnifies rounding
FLOOR = 1e-3  # of the largest magnitude of its kind: below it a tensor is measured by that, as sums of terms that cancel are


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not what one process has."""

    step: int
    kind: str
    name: str
    error: float  # largest, relative to the largest magnitude
    limit: float
    note: str

    def __str__(self) -> str:
        where = "start" if self.step == INITIAL else f"step {self.step}"
        what = self.name if self.kind in ("loss", "norm") else f"{self.kind} {self.name}"
        return f"{where}: {what}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that differs, in the order of computation."""

    differences: list[Difference]
    largest_error: float  # relative, over all entries that are compared
    largest_share: float  # of its limit; below 1 everything is equal

    @property
    def first(self) -> Difference | None:
        return self.differences[0] if self.differences else None


def compare(reference: Recording, layout: Recording) -> Comparison:
    """Every entry of the reference must be in the layout's recording, whole and on each rank that holds some of it."""
    largest = _largest_of_kinds(reference)
    differences, error, share = [], 0.0, 0.0
    for want in reference.entries:
        got = layout.entry(want.step, want.kind, want.name)
        found = _error(want, got, largest[want.step, want.kind])
        limit = limit_of(reference, want)
        error, share = max(error, found), max(share, found / limit)
        if not found < limit:
            differences.append(Difference(want.step, want.kind, want.name, found, limit, got.note))
    return Comparison(differences, error, share)


def limit_of(reference: Recording, entry: Entry) -> float:
    """The relative error from which on an entry differs."""
    magnified = optimizer_of(reference.config.optim).magnifies_rounding
    touched = entry.step > 0 or (entry.kind == "weight" and entry.step != INITIAL)
    return AFTER_ADAM if magnified and touched else EXACT


def _largest_of_kinds(recording: Recording) -> dict[tuple[int, str], float]:
    out: dict[tuple[int, str], float] = {}
    for e in recording.entries:
        out[e.step, e.kind] = max(out.get((e.step, e.kind), 0.0), e.value.abs().max().item())
    return out


def _error(want: Entry, got: Entry, largest_of_kind: float) -> float:
    """Infinite where the whole has a hole, or integers differ."""
    if want.value.shape != got.value.shape:
        return float("inf")
    values = [got.value, *(got.by_rank or [])]
    if want.kind == "routing":
        different = [(v != want.value) & (v != -1) for v in values[1:]] + [got.value != want.value]
        return float("inf") if any(bool(d.any()) for d in different) else 0.0
    scale = max(want.value.abs().max().item(), FLOOR * largest_of_kind) or 1.0
    whole = _largest_difference(got.value, want.value)
    ranks = [_largest_difference(torch.where(v.isnan(), want.value, v), want.value) for v in values[1:]]
    return max([whole, *ranks]) / scale


def _largest_difference(a: Tensor, b: Tensor) -> float:
    worst = (a - b).abs().max().item()
    return worst if worst == worst else float("inf")
