"""The figure of an analysis of all-to-alls: share of the step, a layer's forward pass, slowdowns, and where the time goes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalina.timeline.picture import draw_distribution
from papers.lina.alltoall import PAPER_SHARE, Analysis
from papers.lina.moe_layer import ALL_TO_ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXCHANGES, COMPUTES = ("#6b46c1", "#b79df0"), ("#2f855a", "#86d0a3", "#2b6cb0", "#7fb3e6", "#718096", "#b4bdc9")
STEP = {  # colour of what a step's time goes to
    "computes": "#2f855a",
    "waits for tokens": "#e02020",
    "waits for gradients, weights": "#8c1010",
    "other waits": "#f4a3a3",
}


def draw(path: Path, analyses: Sequence[Analysis], note: str = "") -> None:
    """PNG or SVG, as `path` ends.  `note` stands above, such as that devices are emulated."""
    figure_of(analyses, note).savefig(path)


def figure_of(analyses: Sequence[Analysis], note: str = "") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    (share, layer), (slowdown, step) = figure.subplots(2, 2)
    first = analyses[0]
    figure.suptitle(f"{first.ranks} ranks, strategy {first.strategy}" + (f"; {note}" if note else ""))
    _share(share, analyses)
    _stacks(layer, analyses, [{name: s * 1e3 for name, s in a.layer_s.items()} for a in analyses], _layer_colours(analyses))
    layer.set_title("forward of one MoE layer without attention, ms (paper: 74.9% all-to-alls)", size=10)
    under = {f"{a.experts} experts, backward, under gradients": a.slowdowns_under_grads for a in analyses}
    clear = {f"{a.experts} experts, beside nothing": a.slowdowns_clear for a in analyses}
    draw_distribution(slowdown, under | clear)
    slowdown.set_title("slowdown of all-to-alls", size=10)
    _stacks(step, analyses, [_step_shares(a) for a in analyses], STEP)
    step.set_title("where a device's step goes, %", size=10)
    return figure


def _share(axis: "Axes", analyses: Sequence[Analysis]) -> None:
    axis.set_title("all-to-all, % of the step", size=10)
    for i, (label, colour) in enumerate({"on the wire": EXCHANGES[0], "device waits for it": STEP["waits for tokens"]}.items()):
        values = [100 * (a.a2a_exposed_share if i else a.a2a_share) for a in analyses]
        bars = axis.bar([x + 0.36 * i - 0.18 for x in range(len(analyses))], values, 0.34, label=label, color=colour)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    known = {x: PAPER_SHARE[a.experts] for x, a in enumerate(analyses) if a.experts in PAPER_SHARE}
    if known:
        middle, half = [50 * sum(ends) for ends in known.values()], [50 * (high - low) for low, high in known.values()]
        axis.errorbar(list(known), middle, half, fmt="D", color="black", capsize=9, label="paper, with as many experts")
    _names(axis, analyses)


def _stacks(
    axis: "Axes", analyses: Sequence[Analysis], values: Sequence[Mapping[str, float]], colours: Mapping[str, str]
) -> None:
    bottoms = [0.0] * len(analyses)
    for name, colour in colours.items():
        heights = [of_setting.get(name, 0.0) for of_setting in values]
        axis.bar(range(len(analyses)), heights, 0.5, bottoms, label=name, color=colour)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    _names(axis, analyses)


def _names(axis: "Axes", analyses: Sequence[Analysis]) -> None:
    axis.set_xticks(range(len(analyses)), [f"{a.experts} experts\non {a.ep} ranks" for a in analyses])
    axis.set_xlim(-0.6, 1.55 * len(analyses) - 0.3)  # room for the legend
    axis.legend(loc="upper right", fontsize=8)


def _layer_colours(analyses: Sequence[Analysis]) -> dict[str, str]:
    names = dict.fromkeys(name for a in analyses for name in a.layer_s)
    exchanges = [name for name in names if name.startswith(ALL_TO_ALL)]
    others = [name for name in names if name not in exchanges]
    colours = {name: EXCHANGES[i % len(EXCHANGES)] for i, name in enumerate(exchanges)}
    return colours | {name: COMPUTES[i % len(COMPUTES)] for i, name in enumerate(others)}


def _step_shares(a: Analysis) -> dict[str, float]:
    """In percent; they add up to 100."""
    computes, tokens, buckets = 1 - a.idle_share, a.a2a_exposed_share, (a.grads_exposed_s + a.params_exposed_s) / a.step_s
    rest = max(0.0, 1 - computes - tokens - buckets)
    return dict(zip(STEP, (100 * computes, 100 * tokens, 100 * buckets, 100 * rest), strict=True))
