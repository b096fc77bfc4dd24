"""The report of a comparison: tables in Markdown, a picture of bars, and the JSON's common part."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalina.compare.ladder import PAPER
from megalina.compare.results import EAGER, VALID_OVERRUN
from megalina.timeline.picture import draw_distribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AUTO = "auto"
SLOWED = (EAGER, "fixed", "priority", "priority_partition", "lina")  # whose slowdowns are drawn: these keep batches whole
WAITS = {  # what for, and the field
    "tokens": "a2a_exposed_s",
    "gradients": "grads_exposed_s",
    "stages": "messages_exposed_s",
    "sizes": "other_exposed_s",
}
SHARES = (  # of a step: field, what it is, colour
    ("compute_s", "computes", "#2b6cb0"),
    ("a2a_exposed_s", "waits for tokens", "#e02020"),
    ("grads_exposed_s", "waits for gradients", "#dd8a1f"),
    ("messages_exposed_s", "waits for other stages", "#6b46c1"),
    ("", "sizes, sums, host", "#cbd5e0"),
)


def whole(settings: Sequence[Mapping[str, Any]], *, note: str) -> dict[str, Any]:
    """All settings.  mean_auto_ratio, mean_best_ratio: over settings, to eager; null where auto did not run."""
    best = [max(numbers["ratio_to_eager"] for numbers in s["strategies"].values()) for s in settings]
    auto = [s["strategies"][AUTO]["ratio_to_eager"] for s in settings if AUTO in s["strategies"]]
    return {
        "settings": list(settings),
        "mean_auto_ratio": statistics.fmean(auto) if auto else None,
        "mean_best_ratio": statistics.fmean(best),
        "note": note,
        "paper": dict(PAPER),
    }


def table(setting: Mapping[str, Any]) -> str:
    """One setting, in Markdown."""
    bounds_s = [setting["lower_bound_s"], setting["tighter_bound_s"], *filter(None, [setting["plain_bound_s"]])]
    in_stages = any(m["messages_exposed_s"] for m in setting["strategies"].values())
    waited = {what: field for what, field in WAITS.items() if in_stages or what != "stages"}
    lines = [
        f"**{setting['name']}**{_motion(setting)}: lower bound {bounds_s[0] * 1e3:.0f} ms, {bounds_s[1] * 1e3:.0f} ms with what "
        "must come before and after what the link carries"
        + (f", {bounds_s[2] * 1e3:.0f} ms with the plain baseline's bytes" if bounds_s[2:] else "")
        + f"; overrun {setting['overrun_fraction']:.1%}"
        + ("" if setting["valid"] else f" (more than {VALID_OVERRUN:.0%}: not valid)"),
        "",
        f"| strategy | step ms | to eager | quartiles | to ddp | to plain eager | over bound, the tighter one"
        f"{', the plain one' if bounds_s[2:] else ''} | waits: {', '.join(waited)} ms "
        "| device ms | tokens slowed, p95 | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in sorted(setting["strategies"].items(), key=lambda item: -item[1]["median_step_s"]):
        if name == EAGER:
            continue  # one of its variants
        slow = f"{m['a2a_slowdown_median']:.2f}, {m['a2a_slowdown_p95']:.2f}" if m["a2a_slowdown_median"] else ""
        others = " | ".join(f"{ratio:.2f}" if ratio else "" for ratio in (m["ratio_to_ddp"], m["ratio_to_plain"]))
        low, high = m["ratio_spread"]
        waits = ", ".join(f"{m[field] * 1e3:.0f}" for field in waited.values())
        over = ", ".join(f"{m['median_step_s'] / bound_s:.2f}" for bound_s in bounds_s) if bounds_s[0] else ""
        device = f"{m['compute_s'] * 1e3:.0f} ({m['overrun_fraction']:.0%} late)"
        lines.append(
            f"| {name} ({m['plan']}) | {m['median_step_s'] * 1e3:.0f} | {m['ratio_to_eager']:.2f} | {low:.2f} - {high:.2f} "
            f"| {others} | {over} | {waits} | {device} | {slow} | {m['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def _motion(setting: Mapping[str, Any]) -> str:
    factor = setting["slow_motion"]
    return f" ({factor:g} times in slow motion, in its own time)" if factor != 1 else ""


def closing(result: Mapping[str, Any]) -> str:
    """The means, the check of the losses, and the paper's ladder."""
    worst = max(m["largest_loss_difference"] for s in result["settings"] for m in s["strategies"].values())
    auto = f"mean of auto {result['mean_auto_ratio']:.2f}x, " if result["mean_auto_ratio"] else ""
    lines = [
        f"Against eager: {auto}mean of the best {result['mean_best_ratio']:.2f}x.  Losses differ by at most {worst:.1e}.",
        f"({result['note']})",
        "",
        "| the paper, 16 GPUs, against an untuned baseline | |",
        "|---|---|",
        *(f"| {what} | {numbers} |" for what, numbers in result["paper"].items()),
    ]
    return "\n".join(lines)


def draw_bars(path: Path, result: Mapping[str, Any]) -> None:
    """PNG or SVG: a panel a setting, a bar a strategy, cut into what the step's time went to."""
    from matplotlib.patches import Patch

    settings = result["settings"]
    figure, axes = _panels(len(settings))
    for axis, setting in zip(axes, settings, strict=True):
        shown = {n: m for n, m in setting["strategies"].items() if n != EAGER}
        names = sorted(shown, key=lambda n: -shown[n]["median_step_s"])
        left = [0.0] * len(names)
        for field, _, colour in SHARES:
            if field:
                width = [shown[n][field] * 1e3 for n in names]
            else:
                width = [max(0.0, shown[n]["median_step_s"] * 1e3 - done) for n, done in zip(names, left, strict=True)]
            axis.barh(names, width, left=left, color=colour)
            left = [a + b for a, b in zip(left, width, strict=True)]
        for i, name in enumerate(names):
            axis.text(left[i], i, f" {shown[name]['ratio_to_eager']:.2f}x", va="center", fontsize=9)
        axis.axvline(setting["lower_bound_s"] * 1e3, color="black", linestyle="--", linewidth=1)
        axis.set_xlim(0, max(left) * 1.12)
        title = setting["name"] + _motion(setting) + ("" if setting["valid"] else " (overruns: not valid)")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("ms per step")
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=label) for _, label, colour in SHARES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(SHARES), frameon=False)
    figure.suptitle(f"Step time, and ratio to eager; dashed: no schedule can beat it ({result['note']})", fontsize=11)
    figure.savefig(path)


def draw_slowdowns(path: Path, result: Mapping[str, Any]) -> None:
    """PNG or SVG: a panel a setting, a line a strategy: what share of the backward all-to-alls beside gradients was slowed at
    most so much (Lina, Figure 3)."""
    figure, axes = _panels(len(result["settings"]))
    for axis, setting in zip(axes, result["settings"], strict=True):
        draw_distribution(axis, {n: setting["strategies"][n]["slowdowns"] for n in SLOWED if n in setting["strategies"]})
        axis.set_title(setting["name"], fontsize=11)
    figure.suptitle(f"Slowdown of backward all-to-alls beside gradients ({result['note']})", fontsize=11)
    figure.savefig(path)


def _panels(number: int) -> tuple["Figure", Sequence["Axes"]]:
    """A figure of so many panels, two a row."""
    from matplotlib.figure import Figure

    rows, columns = -(-number // 2), min(2, number)
    figure = Figure(figsize=(6.5 * columns, 4.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[number:]:
        axis.set_visible(False)
    return figure, list(axes[:number])
