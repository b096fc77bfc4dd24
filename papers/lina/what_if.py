"""What would have to be true for the paper's gains: more all-reduce, a baseline that exposes all of it, other packings, a planner
that takes no time.

Nothing here is fitted, and none of it is in the residuals.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from papers.lina.inference import FREE, IDEAL, LINA, SERVED, STATIC, Inference
from papers.lina.models import DDP, PARTITION, SERIAL, TRAINED, lina
from papers.lina.overheads import LAYERS, under_gradients
from papers.lina.walk import Bed, Constants

TIMES_MORE = (1, 2, 4, 8, 16, 32, 64)
PACKINGS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Exposed:
    """Priority and partitioning (T10) over two baselines, if all-reduces were of so many times the bytes."""

    times: float
    overlapping: dict[int, float]  # by experts: over `ddp`
    serial: dict[int, float]  # over a baseline that sends all gradients after backward
    meeting: float  # share of backward all-to-alls that meet a gradient under `ddp`, Table 1's models with 16 experts

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def exposed(bed: Bed, constants: Constants) -> Iterator[Exposed]:
    for times in TIMES_MORE:
        more = replace(constants, gradient_factor=times)

        def gains(baseline: Any, more: Constants = more) -> dict[int, float]:
            return {
                experts: mean(
                    bed.step(m, experts, baseline, more).step_s / bed.step(m, experts, PARTITION, more).step_s for m in TRAINED
                )
                for experts in (2, 4, 8, 16)
            }

        meeting = len(under_gradients(bed, more, DDP)) / (2 * sum(LAYERS))
        yield Exposed(times, gains(DDP), gains(SERIAL), meeting)


def packed(bed: Bed, constants: Constants) -> dict[int, dict[int, float]]:
    """Speed-up of all of Lina by experts and packing; mean over models."""
    found: dict[int, dict[int, float]] = {}
    for experts in (2, 4, 8, 16):
        found[experts] = {
            packing: mean(
                bed.step(m, experts, DDP, constants).step_s
                / bed.step(m, experts, replace(lina(m, experts), packing=packing), constants).step_s
                for m in TRAINED
            )
            for packing in PACKINGS
            if experts % packing == 0
        }
    return found


def placed(inference: Inference) -> dict[str, dict[str, float]]:
    """At inference: the baseline's median over that of Lina, of Lina whose planner takes no time, and of Ideal, which no
    placement can beat."""
    return {
        f"{model.name}, {experts} experts": {
            mode: inference.replay(model, experts, STATIC).median_s() / inference.replay(model, experts, mode).median_s()
            for mode in (LINA, FREE, IDEAL)
        }
        for model in SERVED
        for experts in (4, 16)
    }
