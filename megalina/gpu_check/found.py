"""What a part of the check has found, and how tensors are held against float64 on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

OK, FAILED, SKIPPED = "ok", "FAILED", "not run"
# Largest error of a tensor over its largest magnitude.  float32 leaves 1e-7 a sum, bfloat16 4e-3 a rounding and several in a row.
TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 4e-2}
MOST_SAID = 6  # wrong tensors, by name


@dataclass(slots=True)
class Found:
    """`numbers`: for the JSON; `lines`: for the page."""

    outcome: str = OK
    seconds: float = 0.0
    why: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def held(name: str, found: Tensor, wanted: Tensor, tolerance: float, *, least: float = 1e-30) -> tuple[str, float, bool]:
    """`name`, the largest error over the largest magnitude, or over `least` where that is more, and whether it is allowed."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least)) if wanted.numel() else 0.0
    return name, error, error <= tolerance  # not so for NaN


def table(rows: Sequence[tuple[str, float, bool]]) -> Found:
    """Of names as KIND/TENSOR: the largest error of each kind; FAILED, with their names, where some are wrong."""
    worst: dict[str, float] = {}
    for name, error, _ in rows:
        kind = name.partition("/")[0]
        worst[kind] = error if error != error else max(worst.get(kind, 0.0), error)
    wrong = [f"{name}: off by {error:.1e}" for name, error, right in rows if not right]
    lines = [f"{kind}: at most {error:.1e} off" for kind, error in worst.items()]
    return Found(FAILED if wrong else OK, why="; ".join(wrong[:MOST_SAID]), numbers={"largest_error": worst}, lines=lines)
