"""What peers took: figures of a setting from all ranks, a table, a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "megalina"
VALID_OVERRUN = 0.05  # share of the devices' time by which real math may be late, beyond which only natural speed means anything


def rows_of(
    by_rank: Sequence[Mapping[str, Any]], variants: Mapping[str, Sequence[str]], lists: Mapping[str, str], *, slow_motion: float
) -> dict[str, dict[str, Any]]:
    """By system, in its own time.  `variants`: a peer's, of which the fastest counts; `lists`: what our lists re-express, by the
    name of the row ("" for our own)."""
    measured = {name: _measured(by_rank, name, slow_motion) for name in by_rank[0]}
    rows = {}
    for name, own in measured.items():
        if name in lists:
            rows[name] = {**own, "re_expression": lists[name], "tuned": ""}
    for peer, names in variants.items():
        best = min(names, key=lambda name: measured[name]["median_step_s"])
        tried = {name.removeprefix(f"{peer}, "): measured[name]["median_step_s"] for name in names}
        rows[peer] = {**measured[best], "re_expression": "", "tuned": best.removeprefix(f"{peer}, "), "tried_s": tried}
    ours = rows[OURS]
    for row in rows.values():
        ratios = [theirs / mine for theirs, mine in zip(row["step_s"], ours["step_s"], strict=True)]
        row["ratio_of_megalina"], row["ratio_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
    return rows


def _measured(by_rank: Sequence[Mapping[str, Any]], name: str, slow_motion: float) -> dict[str, Any]:
    own = [of_rank[name] for of_rank in by_rank]
    step_s = [max(times) / slow_motion for times in zip(*(of["step_s"] for of in own), strict=True)]
    busy_s = max(statistics.median(of["busy_s"]) for of in own) / slow_motion
    median_s = statistics.median(step_s)
    return {
        "median_step_s": median_s,
        "step_s": step_s,
        "waits_s": median_s - busy_s,  # the device computes nothing
        "overrun_fraction": max(sum(of["overrun_s"]) / max(sum(of["busy_s"]), 1e-9) for of in own),
        "peak_mb": max(of["peak_bytes"] for of in own) / 1e6,
        "losses": [own[0]["losses"][0], own[0]["losses"][-1]],
    }


def table(setting: Mapping[str, Any]) -> str:
    """In Markdown, the slowest first."""
    speed = (
        f"{setting['slow_motion']:g} times in slow motion, in its own time" if setting["slow_motion"] != 1 else "natural speed"
    )
    lines = [
        f"**{setting['name']}**, {speed}",
        "",
        "| system | step ms | megalina is faster by | range | the device waits ms | peak MB | real math late |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(setting["rows"].items(), key=lambda item: -item[1]["median_step_s"]):
        low, high = row["ratio_range"]
        about = row["tuned"] or (f"our list after {row['re_expression']}" if row["re_expression"] else "")
        lines.append(
            f"| {name}{f' ({about})' if about else ''} | {row['median_step_s'] * 1e3:.0f} | {row['ratio_of_megalina']:.2f}x "
            f"| {low:.2f} to {high:.2f} | {row['waits_s'] * 1e3:.0f} | {row['peak_mb']:.0f} | {row['overrun_fraction']:.1%} |"
        )
    lines += [f"| {name} | not run: {why} | | | | | |" for name, why in setting["not_run"].items()]
    return "\n".join(lines)


def closing(settings: Sequence[Mapping[str, Any]]) -> str:
    """How much faster than the best peer, each setting."""
    lines = []
    for setting in settings:
        peers = {name: row for name, row in setting["rows"].items() if name != OURS and not row["re_expression"]}
        if peers:
            best = min(peers, key=lambda name: peers[name]["median_step_s"])
            factor = f", {setting['slow_motion']:g} times in slow motion" if setting["slow_motion"] != 1 else ", natural speed"
            lines.append(f"{setting['name']}{factor}: {peers[best]['ratio_of_megalina']:.2f}x of the best peer, {best}")
    return "\n".join(lines)


def draw(path: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    """PNG or SVG: a panel for each setting, a bar for each system."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 0.6 + 2.9 * ((len(settings) + 1) // 2)), dpi=120, layout="constrained")
    panels = figure.subplots((len(settings) + 1) // 2, min(2, len(settings)), squeeze=False).flatten()
    colours = {"peer": "#9aa5b1", "list": "#c9b6e4", "ours": "#6a3fb5"}
    for panel in panels[len(settings) :]:
        panel.set_visible(False)
    for panel, setting in zip(panels, settings, strict=False):
        rows = sorted(setting["rows"].items(), key=lambda item: -item[1]["median_step_s"])
        kinds = ["ours" if name == OURS else "list" if row["re_expression"] else "peer" for name, row in rows]
        numbers_ms = [row["median_step_s"] * 1e3 for _, row in rows]
        panel.barh([row["re_expression"] or name for name, row in rows], numbers_ms, color=[colours[kind] for kind in kinds])
        for i, (_, row) in enumerate(rows):
            panel.text(numbers_ms[i], i, f" {row['ratio_of_megalina']:.2f}x", va="center", fontsize=8)
        panel.set_xlim(0, max(numbers_ms) * 1.15)
        speed = f"{setting['slow_motion']:g}x slow motion" if setting["slow_motion"] != 1 else "natural speed"
        panel.set_title(f"{setting['name']}, {speed}", fontsize=10)
        panel.set_xlabel("ms per step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    labels = {"peer": "framework", "list": "its schedule as our list", "ours": "megalina"}
    figure.legend(
        handles=[Patch(color=colours[kind], label=label) for kind, label in labels.items()],
        loc="outside lower center", ncols=3, frameon=False,
    )  # fmt: skip
    figure.savefig(path)
