"""What measurements beside torch's pipelines say: medians, ratios and their spread; tables in Markdown; a picture of bars."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pipelining.cells import walk_s
from benchmarks.pipelining.turns import LATE, OURS, TORCH
from megalina.compare.results import VALID_OVERRUN, by_round, difference
from megalina.config import PretrainConfig
from megalina.timeline.contention import quantile

COLOURS = {TORCH: "#dd8a1f", OURS: "#2b6cb0"}
WAITED = "#cbd5e0"
OURS_WITH_MESSAGES = "ours, messages in torch's order"


def summary_of(
    found: Mapping[str, Any], configs: Mapping[str, PretrainConfig], *, turn: int, link_mbit: float, slow_motion: float
) -> dict[str, Any]:
    """By schedule, in the cluster's own time: each side's medians; torch's is the faster one of its two.  ratio: torch over ours,
    above 1 where ours is faster; spread: its quartiles over rounds; walk_s: what lists of these cells take where nothing takes
    time but cells and messages, None for real math.  `link_mbit`: in slow motion, too."""
    out: dict[str, Any] = {}
    for name, sides in found.items():
        torchs = min((side for side in sides if side != OURS), key=lambda side: statistics.median(sides[side]["step_s"]))
        base_s, ours_s = sides[torchs]["step_s"], sides[OURS]["step_s"]
        ratios = by_round(base_s, ours_s, turn)
        walked_s = walk_s(configs[name], link_mbit=link_mbit)
        out[name] = {
            "sides": {side: _in_own_time(measured, slow_motion) for side, measured in sides.items()},
            "torch": torchs,
            "ratio": statistics.median(base_s) / statistics.median(ours_s),
            "spread": [quantile(ratios, 0.25), quantile(ratios, 0.75)],
            "walk_s": None if walked_s is None else walked_s / slow_motion,
            "largest_loss_difference": max(difference(of["losses"], sides[OURS]["losses"]) for of in sides.values()),
        }
    return out


def _in_own_time(measured: Mapping[str, Any], slow_motion: float) -> dict[str, Any]:
    lists = {key: [s / slow_motion for s in measured[key]] for key in ("step_s", "waits_s", "busy_s")}
    medians = {f"median_{key}": statistics.median(values) if values else None for key, values in lists.items()}
    return {**lists, **medians, "overrun_fraction": measured["overrun_fraction"], "losses": measured["losses"]}


def report(found: Mapping[str, Any]) -> str:
    out = []
    for ranks, row in found["ranks"].items():
        out.append(f"**{ranks} ranks, {found['micro_batches']} micro-batches** ({found['note']})")
        if "tables" in row:
            out += ["\n".join(_said(name, said)) for name, said in row["tables"].items()]
        if "exact" in row:
            out.append(exact_table(row["exact"]))
        if "times" in row:
            out.append(times_table(row["times"]))
    return "\n\n".join(out)


def _said(name: str, said: Mapping[str, str]) -> list[str]:
    return [f"{name}, {what}: {words or 'legal'}" for what, words in said.items()]


def exact_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Largest relative errors in float64; words where a run came to no end."""
    sides = (OURS, OURS_WITH_MESSAGES, TORCH, LATE)
    lines = [f"| torch's schedule | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|"]
    for name, by_side in rows.items():
        lines.append(f"| {name} | {' | '.join(_error(by_side.get(side)) for side in sides)} |")
    return "\n".join(lines)


def _error(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return "not run"
    if outcome["error"] is None:
        return f"no end: {outcome['said']}"
    return f"{outcome['error']:.1e}" + ("" if outcome["exact"] else " wrong")


def times_table(rows: Mapping[str, Any]) -> str:
    lines = [
        "| torch's schedule | torch ms | ours ms | torch over ours | quartiles | waits ms: torch, ours | idle: torch, ours "
        "| cells and messages alone ms | torch's receives |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        torchs, ours = row["sides"][row["torch"]], row["sides"][OURS]
        step_ms = f"{torchs['median_step_s'] * 1e3:.0f} | {ours['median_step_s'] * 1e3:.0f}"
        waits = f"{torchs['median_waits_s'] * 1e3:.0f}, {ours['median_waits_s'] * 1e3:.0f}"
        idle = ", ".join(filter(None, map(_idle, (torchs, ours))))
        walked = "" if row["walk_s"] is None else f"{row['walk_s'] * 1e3:.0f}"
        low, high = row["spread"]
        when = "late" if row["torch"] == LATE else "early"
        lines.append(
            f"| {name} | {step_ms} | {row['ratio']:.3f} | {low:.3f} - {high:.3f} | {waits} | {idle} | {walked} | {when} |"
        )
    late = max(side["overrun_fraction"] for row in rows.values() for side in row["sides"].values())
    apart = max(row["largest_loss_difference"] for row in rows.values())
    valid = "" if late <= VALID_OVERRUN else f", more than {VALID_OVERRUN:.0%}: times are not valid, take --slow-motion"
    return "\n".join([*lines, "", f"Losses differ by at most {apart:.1e} of them; overrun {late:.1%}{valid}."])


def _idle(side: Mapping[str, Any]) -> str:
    return "" if side["median_busy_s"] is None else f"{1 - side['median_busy_s'] / side['median_step_s']:.1%}"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """PNG or SVG: a panel for each number of ranks; of each schedule torch's step and ours, waits for messages pale, and a mark
    where cells and messages alone would end."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    timed = {ranks: row["times"] for ranks, row in found["ranks"].items() if "times" in row}
    if not timed:
        raise ValueError("--picture is of step times: take --parts with times")
    figure = Figure(figsize=(6.5 * len(timed), 4.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(timed), squeeze=False)[0]
    for axis, (ranks, rows) in zip(axes, timed.items(), strict=True):
        for place, row in enumerate(rows.values()):
            for side, key, shift in ((TORCH, row["torch"], -0.2), (OURS, OURS, 0.2)):
                step_ms, waits_ms = (row["sides"][key][f"median_{name}_s"] * 1e3 for name in ("step", "waits"))
                axis.bar(place + shift, step_ms - waits_ms, 0.38, color=COLOURS[side])
                axis.bar(place + shift, waits_ms, 0.38, bottom=step_ms - waits_ms, color=WAITED, edgecolor=COLOURS[side])
            if row["walk_s"] is not None:
                axis.hlines(row["walk_s"] * 1e3, place - 0.42, place + 0.42, color="black", linewidth=1)
        axis.set_xticks(range(len(rows)), list(rows), rotation=20, ha="right", size=9)
        axis.set_title(f"{ranks} ranks, {found['micro_batches']} micro-batches", fontsize=11)
        axis.set_ylabel("ms a step")
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLOURS[side], label=side) for side in (TORCH, OURS)]
    handles += [
        Patch(color=WAITED, label="waits for messages, mean of ranks"),
        Patch(color="black", label="cells and messages alone"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Torch's pipeline schedules, by torch and by lists ({found['note']})", fontsize=11)
    figure.savefig(path)
