"""What `inference.py` prints and writes: numbers of a mode, held against static and ideal, and tables in Markdown."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megalina.serve.engine import Engine

PAPER = {  # Lina, section 7.3, 16 experts; the last three to the ideal
    "median, static to lina": "1.45 - 1.46x (I1, I2)",
    "p95, static to lina": "1.68 - 1.82x, mean 1.63x (I3)",
    "no estimation, median": "+18.6 - 24.0% (I6)",
    "no phase 2, p95": "+26.7 - 33.1% (I7)",
    "l = 1 / 3 / 6, median to ideal": "1.34 - 1.41 / 1.07 - 1.16 / 1.00 - 1.19 (table 5)",
}


def measured(mode: str, took_s: dict[str, list[float]], engine: Engine, batches: int) -> dict[str, Any]:
    """`took_s`: of each batch, by mode; the first one that the engine served warmed up and does not count."""
    own, static, ideal = took_s[mode], took_s["static"], took_s.get("ideal")
    decided = engine.controller.decided
    loads = [most / mean for d in decided for most, mean in zip(d.largest_load[1:], d.mean_load[1:], strict=True)]
    planned = sum(d.batches for d in decided[engine.controller.policy.first_planned :])
    done = asdict(engine.slots.done)
    return {
        "p50_ms": statistics.median(own) * 1e3,
        "p95_ms": p95(own) * 1e3,
        "p50_ratio_to_static": statistics.median(static) / statistics.median(own),
        "p95_ratio_to_static": p95(static) / p95(own),
        "p95_ratio_to_ideal": p95(own) / p95(ideal) if ideal else None,
        "p50_ratio_to_ideal": statistics.median(own) / statistics.median(ideal) if ideal else None,
        "ratio_spread": [float(q) for q in np.quantile([s / o for s, o in zip(static, own, strict=True)], [0.25, 0.75])],
        "load_max_over_mean": statistics.median(loads),
        "load_max_over_mean_p95": p95(loads),
        "phase2_rate": sum(d.replanned for d in decided) / max(1, planned),
        "swapped_experts_a_batch": done["experts"] / (batches + 1),
        "failed_fetches": done["failed"],
        "waited_ms_a_batch": done["waited_s"] / (batches + 1) * 1e3,
        "batch_ms": [s * 1e3 for s in own],
    }


def p95(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.95))


def table(result: dict[str, Any]) -> str:
    least = ", ".join("infinite" if s is None else f"{s:.1f}" for s in result["most_over_least"])
    routing = f"workload {result['workload']}" if "workload" in result else f"skew {result['skew']}"
    if result.get("profiles"):
        routing += ", profiled on other tasks"
    late = result["overrun_fraction"]
    valid = "" if late <= 0.05 else " (more than 5%: not valid)"
    lines = [
        f"**{result['devices']} emulated devices, {routing}**: most over least popular {least}; "
        f"{result['served']} batches of {result['batch_tokens']} tokens; "
        f"{result['slow_motion']:g} times in slow motion; overrun {late:.1%}{valid}",
        "",
        "| mode | median ms | p95 ms | static / it: median | p95 | it / ideal: median | p95 | load max/mean, p95 | phase 2 "
        "| fetched |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, m in result["modes"].items():
        ideal = [f"{m[k]:.2f}" if m[k] else "" for k in ("p50_ratio_to_ideal", "p95_ratio_to_ideal")]
        lines.append(
            f"| {mode} | {m['p50_ms']:.0f} | {m['p95_ms']:.0f} | {m['p50_ratio_to_static']:.2f} | {m['p95_ratio_to_static']:.2f} "
            f"| {ideal[0]} | {ideal[1]} | {m['load_max_over_mean']:.2f}, {m['load_max_over_mean_p95']:.2f} "
            f"| {m['phase2_rate']:.0%} | {m['swapped_experts_a_batch']:.1f} |"
        )
    return "\n".join([*lines, ""])
