"""The constants of an emulated cluster's hosts, fitted on some configurations, and the errors on others."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.validation.cases import Row
from benchmarks.validation.emulated import HostConstants, simulate_emulated
from megalina.config import PretrainConfig
from megalina.timeline.contention import quantile, summary

BEGIN = HostConstants(
    flops_per_s=2e10,
    bytes_per_s=5e9,
    kernel_s=20e-6,
    stage_s=100e-6,
    outside_s=2e-3,
    link_efficiency=0.95,
    all_to_all_s=1e-3,
    collective_s=1e-3,
    hop_s=200e-6,
    sum_weight=1.0,
)
BOUNDS = {  # of the fit: what is beyond them isn't what the constant's name says
    "flops_per_s": (1e9, 2e11),
    "bytes_per_s": (5e8, 5e10),
    "kernel_s": (1e-6, 3e-4),
    "stage_s": (1e-5, 2e-3),
    "outside_s": (1e-4, 1e-2),
    "link_efficiency": (0.7, 1.0),
    "all_to_all_s": (1e-5, 1e-2),
    "collective_s": (1e-5, 1e-2),
    "hop_s": (1e-5, 5e-3),
    "sum_weight": (0.5, 8.0),
}
CLEAR = 0.03  # of the step: strategies that differ by more must be in the right order
SEEN = 0.05  # of the step: waits that are shorter aren't held against the measured ones
CLASSES = {"a2a": ("a2a",), "grads": ("grads", "params")}  # as `Measured` sums them up
VOCAB = 320


@dataclass(frozen=True, slots=True)
class Simulated:
    """Of one configuration, in its own time."""

    step_s: float
    exposed_s: Mapping[str, float]  # by class: a2a, grads


def simulated(row: Row, config: PretrainConfig, host: HostConstants, *, tokens_first: bool = False) -> Simulated:
    """`tokens_first`: on links that let them pass, for comparison."""
    setting = row.case.setting
    timeline = simulate_emulated(
        config,
        row.plan,
        nodes=setting.nodes,
        ranks_per_node=setting.ranks_per_node,
        link_mbit=row.case.link_mbit / setting.slow_motion,
        vocab_size=VOCAB,
        host=host,
        tokens_first=tokens_first,
    )
    found = summary(timeline.events(0), {})
    exposed_s = {
        name: sum(found.traffic[part].exposed_s for part in parts) / setting.slow_motion for name, parts in CLASSES.items()
    }
    return Simulated(timeline.step_s / setting.slow_motion, exposed_s)


def fit(rows: Sequence[Row], configs: Mapping[str, PretrainConfig]) -> HostConstants:
    """Least squares of the logarithms of step times, and of the waits as shares of the step; `configs` by the row's name."""
    from scipy.optimize import least_squares

    names = [f.name for f in fields(HostConstants)]

    def constants(x: Any) -> HostConstants:
        return HostConstants(**{name: float(math.exp(value)) for name, value in zip(names, x, strict=True)})

    def residuals(x: Any) -> list[float]:
        host, out = constants(x), []
        for r in rows:
            own, step_s = simulated(r, configs[r.name], host), r.measured["median_step_s"]
            out.append(math.log(own.step_s / step_s))
            out += [(own.exposed_s[name] - r.measured[f"{name}_exposed_s"]) / step_s / 2 for name in CLASSES]
        return out

    begin = np.log([asdict(BEGIN)[name] for name in names])
    low, high = (np.log([BOUNDS[name][side] for name in names]) for side in (0, 1))
    return constants(least_squares(residuals, begin, bounds=(low, high), loss="soft_l1", f_scale=0.03, diff_step=0.02).x)


def errors(rows: Sequence[Row], found: Mapping[str, Simulated]) -> dict[str, Any]:
    """`found` by the row's name."""
    step = sorted(abs(found[r.name].step_s / r.measured["median_step_s"] - 1) for r in rows)
    right, pairs, ratios = 0, 0, []
    by_setting: dict[str, list[Row]] = {}
    for r in rows:
        by_setting.setdefault(r.case.setting.name, []).append(r)
    for of_setting in by_setting.values():
        for a, b in combinations(of_setting, 2):
            measured = a.measured["median_step_s"] / b.measured["median_step_s"]
            own = found[a.name].step_s / found[b.name].step_s
            ratios.append(abs(own / measured - 1))
            if abs(math.log(measured)) > math.log1p(CLEAR):
                pairs += 1
                right += (own > 1) == (measured > 1)
    return {
        "configurations": len(rows),
        "median_error": statistics.median(step),
        "p90_error": quantile(step, 0.9),
        "pair_order": right / pairs if pairs else None,
        "pairs": pairs,
        "ratio_error": statistics.median(ratios) if ratios else None,
        "ratio_p90_error": quantile(sorted(ratios), 0.9),
        "exposed_error": {name: _exposed_error(rows, found, name) for name in CLASSES},
    }


def _exposed_error(rows: Sequence[Row], found: Mapping[str, Simulated], name: str) -> float | None:
    """The median over the configurations that wait for it noticeably; None where none does."""
    seen = [(found[r.name].exposed_s[name], r.measured[f"{name}_exposed_s"], r.measured["median_step_s"]) for r in rows]
    return quantile([abs(own / measured - 1) for own, measured, step_s in seen if measured > SEEN * step_s], 0.5)
