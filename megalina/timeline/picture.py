"""Pictures of a timeline: what one rank computed, what it had on the wire and where it stood still, over a step; slowdowns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalina.timeline.contention import class_of, quantile, span_of
from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event
from megalina.timeline.spans import Span, length_s, rows, union

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "timeline.png"  # in a run folder
LANES = ("device computes", "tokens on the wire\n(all-to-all)", "gradients\non the wire", "device waits")
ATTENTION, EXPERTS, REST = ("#2b6cb0", "#7fb3e6"), ("#2f855a", "#86d0a3"), ("#718096", "#b4bdc9")  # even parts, odd parts
TOKENS, GRADIENTS, PARAMETERS = ("#6b46c1", "#b79df0"), ("#dd8a1f",) * 2, ("#975a16",) * 2
FOR_TOKENS, FOR_GRADIENTS, FOR_REST, FOR_STAGES = "#e02020", "#8c1010", "#f4a3a3", "#d53f8c"
LEGEND = {
    "attention": ATTENTION[0],
    "router, experts, MLP": EXPERTS[0],
    "embedding, loss, update": REST[0],
    "tokens": TOKENS[0],
    "gradients": GRADIENTS[0],
    "updated weights (ZeRO-1)": PARAMETERS[0],
    "waits for tokens": FOR_TOKENS,
    "waits for gradients or weights": FOR_GRADIENTS,
    "waits for sizes or small sums": FOR_REST,
    "waits for other stages": FOR_STAGES,
}
REST_NAMES = (
    *("embed", "positions", "head", "logits", "loss", "balance"),
    *("sizes", "seed", "measure", "verdict", "router_state", "update"),
)
PHASES = {"F": ("forward", "#e8eef7"), "B": ("backward", "#f7eee3"), "U": ("update", "#eeeeee")}
PASSES = {"F": "F", "B": "B", "W": "B"}  # gradients of weights that come later are still backward
WAITED_FOR = {"a2a": "tokens", "grads": "gradients", "params": "weights", "other": "sizes, sums", "pp": "other stages"}
GAP = 0.12  # above and below the boxes of a lane, which is 1 high
SMALLEST_LABELLED, SMALLEST_PHASE = 0.0065, 0.045  # of the width
PAPER = {"paper's median, 1.83": 1.83, "paper's worst, 4.14": 4.14}  # Lina, Figure 3: backward all-to-alls under all-reduces
SHOWN = 0.98  # of each sample lies within the axis: one that a busy machine held up would press all others to its edge


def draw(path: Path, timelines: Mapping[str, Sequence[Event]], note: str = "", *, race: bool = True) -> None:
    """PNG or SVG, as `path` ends: a row of lanes for each {title: events of one rank in one step}, on one time axis, so that
    a shorter step is shorter.  `note` stands below, such as that times are emulated.  `race`: say how much faster than the
    first each other one was."""
    figure_of(timelines, note, race=race).savefig(path)


def figure_of(timelines: Mapping[str, Sequence[Event]], note: str = "", *, race: bool = True) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    spans_s = {title: span_of(events) for title, events in timelines.items()}
    longest_ms = max(end - start for start, end in spans_s.values()) * 1e3
    figure = Figure(figsize=(15, 1.25 + 2.35 * len(timelines)), dpi=110, layout=ConstrainedLayoutEngine(hspace=0.06))
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    first = next(iter(timelines))
    first_s = spans_s[first][1] - spans_s[first][0]
    used: set[str] = set()
    for axis, (title, events) in zip(axes, timelines.items(), strict=True):
        used |= _boxes(axis, events, spans_s[title], longest_ms)
        _frame(axis, title, events, spans_s[title], longest_ms)
        step_s = spans_s[title][1] - spans_s[title][0]
        _words(axis, events, spans_s[title], f"\n {first_s / step_s:.2f}x as fast as {first}" if race and title != first else "")
    axes[-1].set_xlim(-0.002 * longest_ms, (1.13 if race and len(timelines) > 1 else 1.1) * longest_ms)
    axes[-1].set_xlabel(
        "milliseconds since the step began" + (f" ({note})" if note else "") + "\n"
        "Numbers in boxes are layers.  Gaps in the top lane are lost time; the lowest lane says what the device waited for."
    )
    handles = [Patch(color=colour, label=label) for label, colour in LEGEND.items() if colour in used]
    if any(len(_parts(events)) > 1 for events in timelines.values()):
        handles.append(Patch(color="#dddddd", label="lighter: every other part of the batch"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _boxes(axis: "Axes", events: Sequence[Event], span: Span, width_ms: float) -> set[str]:
    """Draw what happened; returns the colours used, lighter ones by their darker."""
    parts = {part: i % 2 for i, part in enumerate(_parts(events))}
    boxes: list[tuple[int, Span, str, str]] = []  # lane, span, colour, label
    used = set()
    for e in events:
        start_s = e.start_s
        if e.kind == COMPUTE:
            lane, pair = 0, _compute_colours(e.name)
        elif e.kind == SEND and (name := class_of(e)) not in ("other", "pp"):
            lane, pair = {"a2a": (1, TOKENS), "grads": (2, GRADIENTS), "params": (2, PARAMETERS)}[name]
        elif e.kind == WAIT and e.exposed_s > 0:
            colour = {"a2a": FOR_TOKENS, "other": FOR_REST, "pp": FOR_STAGES}.get(class_of(e), FOR_GRADIENTS)
            lane, pair, start_s = 3, (colour, colour), e.end_s - e.exposed_s
        else:
            continue
        used.add(pair[0])
        boxes.append((lane, (start_s, e.end_s), pair[parts.get(_whole(e.part), 0)], _label(e)))
    for lane in range(len(LANES)):
        here = [box for box in boxes if box[0] == lane]
        row = rows([where for _, where, _, _ in here])
        height = (1 - 2 * GAP) / (max(row, default=0) + 1)
        for (_, (start_s, end_s), colour, label), r in zip(here, row, strict=True):
            left, width = (start_s - span[0]) * 1e3, (end_s - start_s) * 1e3
            bottom = _bottom(lane) + GAP + r * height
            line = 0.4 if width > 0.002 * width_ms else 0.0
            axis.broken_barh([(left, width)], (bottom, height), facecolors=colour, edgecolor="white", linewidth=line)
            if label and lane < 3 and width > SMALLEST_LABELLED * (1 + len(label)) / 2 * width_ms and height > 0.3:
                axis.text(left + width / 2, bottom + height / 2, label, size=7, color="white", ha="center", va="center")
    return used


def _frame(axis: "Axes", title: str, events: Sequence[Event], span: Span, width_ms: float) -> None:
    """Title, lanes, and what is forward and what backward."""
    top = _bottom(-1)
    for phase, start_s, end_s in _phases(events, span[1]):
        left, right = (start_s - span[0]) * 1e3, (end_s - span[0]) * 1e3
        name, colour = PHASES[phase]
        axis.axvspan(left, right, color=colour, zorder=0, linewidth=0)
        if right - left > SMALLEST_PHASE * width_ms:
            axis.text((left + right) / 2, top + 0.2, name, size=8, color="#555555", ha="center", va="center")
    for lane in range(len(LANES) - 1):
        axis.axhline(_bottom(lane), color="white", linewidth=1.2, zorder=0.5)
    axis.set_title(title, loc="left", size=11, weight="bold")
    axis.set_ylim(_bottom(len(LANES) - 1), top + 0.42)
    axis.set_yticks([_bottom(lane) + 0.5 for lane in range(len(LANES))], LANES, size=9)
    axis.tick_params(left=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _words(axis: "Axes", events: Sequence[Event], span: Span, faster: str) -> None:
    """At the end: how long the step took, how much of it the device did not compute, and what it waited for."""
    step_s = span[1] - span[0]
    axis.axvline(step_s * 1e3, color="black", linewidth=1)
    words = f" {step_s * 1e3:,.0f} ms" if step_s >= 0.1 else f" {step_s * 1e3:,.1f} ms"
    axis.text(step_s * 1e3, _bottom(0) + 0.5, words, size=12, weight="bold", va="center")
    idle = 1 - length_s(union((e.start_s, e.end_s) for e in events if e.kind == COMPUTE)) / step_s
    axis.text(step_s * 1e3, _bottom(1) + 0.5, f" {idle:.0%} of it idle{faster}", size=8.5, va="center")
    waited_s = {
        name: sum(e.exposed_s for e in events if e.kind == WAIT and class_of(e) == key) for key, name in WAITED_FOR.items()
    }
    lines = [f" {seconds * 1e3:,.0f} ms for {name}" for name, seconds in waited_s.items() if seconds >= 0.0005]
    axis.text(step_s * 1e3, _bottom(3) + 0.5, "\n".join(lines), size=8, va="center")


def _bottom(lane: int) -> float:
    return -float(lane + 1)


def _phases(events: Sequence[Event], end_s: float) -> Iterable[tuple[str, float, float]]:
    """Stretches of forward and backward in turn, and the end of the step after the last backward."""
    passes = sorted((e.start_s, e.end_s, PASSES[e.phase]) for e in events if e.kind == COMPUTE and e.phase in PASSES)
    stretches: list[tuple[str, float, float]] = []
    for start_s, stop_s, phase in passes:
        if stretches and stretches[-1][0] == phase:
            stretches[-1] = phase, stretches[-1][1], max(stop_s, stretches[-1][2])
        else:
            stretches.append((phase, start_s, stop_s))
    joined = [(phase, start_s, after[1]) for (phase, start_s, _), after in zip(stretches, stretches[1:])]
    return joined + stretches[-1:] + ([("U", stretches[-1][2], end_s)] if stretches else [])


def _compute_colours(name: str) -> tuple[str, str]:
    if name.startswith("attention"):
        return ATTENTION
    return REST if name.startswith(REST_NAMES) else EXPERTS


def _parts(events: Sequence[Event]) -> list[str]:
    """Micro-batches or parts of them, without chunks."""
    return sorted({_whole(e.part) for e in events if e.kind == COMPUTE and e.phase in "FB"}, key=lambda part: (len(part), part))


def _whole(part: str) -> str:
    return part.partition("c")[0]


def _label(e: Event) -> str:
    """The layer, if it is of one; a bucket of gradients has it in its name."""
    if e.layer >= 0:
        return str(e.layer)
    return ",".join(re.findall(r"\.(\d+)", e.name)) if e.op in ("grads", "params") else e.name.partition(" ")[0]


def draw_distribution(axis: "Axes", samples: Mapping[str, Sequence[float]]) -> None:
    """What share of all-to-alls was slowed at most so much: a line for each {title: slowdowns} that isn't empty; its title says
    the largest."""
    ends = list(PAPER.values())
    for title, values in samples.items():
        if values:
            ordered = sorted(values)
            shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
            label = f"{title} ({len(values)}, at most {ordered[-1]:.1f})"
            axis.step([ordered[0], *ordered], [0.0, *shares], where="post", label=label, linewidth=1.8)
            ends.append(quantile(ordered, SHOWN) or 0.0)
    for (label, value), style in zip(PAPER.items(), ("--", ":"), strict=True):
        axis.axvline(value, color="#555555", linestyle=style, linewidth=1, label=label)
    axis.set_ylim(0, 1.01)
    axis.set_xlim(0, 1.05 * max(ends))
    axis.set_xlabel("times as long as alone")
    axis.set_ylabel("share of all-to-alls, slowed at most so much")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
