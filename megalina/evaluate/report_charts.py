"""The charts of an evaluation's page, as inline SVG whose colours come from the page's style sheet; every axis says its unit."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from megalina.evaluate.measures import IDEAL, STATIC
from megalina.track.expert_load import DARK, FULL_COLOUR_LOG2, LEVELS, LIGHT, colour_levels, data_uri
from megalina.track.svg_chart import Series, legend, short, ticks

COLOURS = {STATIC: "var(--second)", "best": "var(--accent)", IDEAL: "var(--good)"}
OTHERS = ("hsl(285 45% 55%)", "hsl(190 75% 40%)", "hsl(45 85% 43%)", "hsl(335 65% 55%)", "hsl(210 8% 50%)")
PARTS = {  # of a MoE layer's time, by instruction
    "attention": ("attention",),
    "experts": ("experts", "shared"),
    "all-to-all": ("dispatch", "combine"),
    "telling counts": ("told",),
    "routing, planning": ("score", "assign", "foresee"),
    "mix": ("mix", "join"),
}
PART_COLOURS = ("var(--second)", "var(--accent)", "hsl(285 45% 55%)", "hsl(285 45% 74%)", "hsl(45 85% 43%)", "var(--soft)")
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 44
MOST_BARS = 100  # more are too thin
CHART_STYLE = """
.axis-name{font-size:12px;fill:var(--soft)}
.dashed{stroke-dasharray:6 4}
.heat{display:grid;grid-template-columns:auto minmax(0,1fr) auto;gap:5px 10px;align-items:center;margin-top:8px}
.heat img{width:100%;height:26px;image-rendering:pixelated;border:1px solid var(--edge);border-radius:5px}
.heat span{font-size:.8rem;color:var(--soft);text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.heat .experts{display:flex}
.heat .experts span{flex:1;text-align:center;font-size:.74rem}
.legend i.box{width:11px;height:11px;border-radius:3px}
"""


def colours(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name not in COLOURS]
    return {name: COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in names}


class Frame:
    """A plot's rectangle, grid, ticks and axis names; `at(x, y)` in its coordinates."""

    def __init__(self, width: int, height: int, xs: tuple[float, float], ys: tuple[float, float], *, left: int = LEFT):
        self.width, self.height, self.xs, self.ys, self.left = width, height, xs, ys, left
        self.floor = height - BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.xs[0]) / (self.xs[1] - self.xs[0])
        up = (y - self.ys[0]) / (self.ys[1] - self.ys[0])
        return self.left + across * (self.width - self.left - RIGHT), self.floor - up * (self.floor - TOP)

    def y_axis(self, name: str, *, percent: bool = False) -> str:
        parts = []
        for tick in ticks(*self.ys, 4):
            _, y = self.at(self.xs[0], tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            told = f"{tick:.0%}" if percent else short(tick)
            parts.append(f'<text class="tick" x="{self.left - 7}" y="{y + 4:.1f}" text-anchor="end">{told}</text>')
        middle = (TOP + self.floor) / 2
        parts.append(
            f'<text class="axis-name" x="11" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 11 {middle:.0f})">'
            f"{escape(name)}</text>"
        )
        return "".join(parts)

    def x_axis(self, name: str, marks: Sequence[tuple[float, str]]) -> str:
        parts = [
            f'<text class="tick" x="{self.at(x, 0)[0]:.1f}" y="{self.floor + 16}" text-anchor="middle">{escape(told)}</text>'
            for x, told in marks
        ]
        middle = (self.left + self.width - RIGHT) / 2
        parts.append(f'<text class="axis-name" x="{middle:.0f}" y="{self.height - 7}" text-anchor="middle">{escape(name)}</text>')
        return "".join(parts)

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False, dots: bool = False) -> str:
        at = [self.at(x, y) for x, y in points]
        style, kind = f'style="--line:{escape(colour)}"', "line dashed" if dashed else "line"
        drawn = f'<polyline class="{kind}" {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>'
        return drawn + "".join(f'<circle class="dot" {style} cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at if dots)

    def level(self, y: float) -> str:
        _, at_y = self.at(self.xs[0], y)
        return f'<line class="reference" x1="{self.left}" x2="{self.width - RIGHT}" y1="{at_y:.1f}" y2="{at_y:.1f}"/>'

    def svg(self, label: str, *parts: str) -> str:
        head = f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">'
        return f"{head}{''.join(parts)}</svg>"


def both_widths(draw: Any, *, height: int = 280) -> str:
    """Broad on a desk, narrow on a phone, where a broad one's letters would be too small.  `draw(width, height)`."""
    return f'<div class="broad">{draw(960, height)}</div><div class="narrow">{draw(400, height)}</div>'


def latency_chart(modes: Mapping[str, Any]) -> str:
    """Share of batches that were served within a time."""
    times = {name: sorted(mode["latency_ms"]) for name, mode in modes.items()}
    low, high = min(own[0] for own in times.values()), max(own[-1] for own in times.values())
    room = 0.03 * (high - low or high)

    def draw(width: int, height: int) -> str:
        frame = Frame(width, height, (low - room, high + room), (0.0, 1.0))
        lines = []
        for name, colour in colours(list(times)).items():
            own, count = times[name], len(times[name])
            steps = [(x, y) for i, x in enumerate(own) for y in (i / count, (i + 1) / count) for x in (x,)]
            lines.append(frame.line([*steps, (high + room, 1.0)], colour, dashed=name == IDEAL))
        marks = [(x, short(x)) for x in ticks(*frame.xs, 8 if width > 600 else 5)]
        axes = frame.y_axis("share of batches", percent=True) + frame.x_axis("latency of a batch, milliseconds", marks)
        return frame.svg("share of batches over latency in milliseconds", axes, *lines)

    return _legend(list(times)) + both_widths(draw)


def load_chart(modes: Mapping[str, Any], shown: Sequence[str]) -> str:
    """Rows of each device over the mean by MoE layer: bars, or where there are too many the busiest device's alone."""
    layers = modes[shown[0]]["layers"]
    num_devices = len(layers[0]["device_load"])
    highest = 1.08 * max(max(layer["device_load"]) for name in shown for layer in modes[name]["layers"])
    own = colours(list(modes))
    bars = len(layers) * len(shown) * num_devices <= MOST_BARS

    def draw(width: int, height: int) -> str:
        frame = Frame(width, height, (-0.5, len(layers) - 0.5), (0.0, highest))
        drawn = []
        for place, name in enumerate(shown):
            if not bars:
                points = [(i, layer["device_load"][0]) for i, layer in enumerate(modes[name]["layers"])]
                drawn.append(frame.line(points, own[name], dots=len(layers) <= 40))
                continue
            bar = 0.84 / (len(shown) * num_devices + len(shown) - 1)
            for i, layer in enumerate(modes[name]["layers"]):
                for device, load in enumerate(layer["device_load"]):
                    left = i - 0.42 + bar * (place * (num_devices + 1) + device)
                    (x, y), (right, _) = frame.at(left, load), frame.at(left + 0.88 * bar, load)
                    drawn.append(
                        f'<rect x="{x:.1f}" y="{y:.1f}" width="{right - x:.2f}" height="{frame.floor - y:.1f}" '
                        f'style="fill:{escape(own[name])}"/>'
                    )
        what = "rows of a device / mean" if bars else "rows of the busiest device / mean"
        return frame.svg(f"{what}, by MoE layer", frame.y_axis(what), _layer_axis(frame, layers), *drawn, frame.level(1.0))

    return _legend(shown, of=modes) + both_widths(draw)


def accuracy_chart(modes: Mapping[str, Any]) -> str:
    """Recall of the most popular experts by MoE layer, of modes that foresee; "" where none does."""
    layers = modes[STATIC]["layers"]
    lines = {
        name: [(i, layer["accuracy_recall"]) for i, layer in enumerate(mode["layers"]) if layer["accuracy_recall"] is not None]
        for name, mode in modes.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    own = colours(list(modes))

    def draw(width: int, height: int) -> str:
        frame = Frame(width, height, (-0.5, len(layers) - 0.5), (0.0, 1.04))
        drawn = [frame.line(points, own[name], dots=len(layers) <= 40) for name, points in lines.items()]
        axes = frame.y_axis("foreseen among the top", percent=True) + _layer_axis(frame, layers)
        return frame.svg("share of the most popular experts that was foreseen, by MoE layer", axes, *drawn)

    return _legend(list(lines), of=modes) + both_widths(draw, height=250)


def time_chart(modes: Mapping[str, Any]) -> str:
    """What a MoE layer's time is made of: a bar a mode."""
    means = {name: instruction_means(mode["layers"]) for name, mode in modes.items()}
    parts = {name: [sum(own.get(s, 0.0) for s in instructions) for instructions in PARTS.values()] for name, own in means.items()}
    highest = 1.03 * max(map(sum, parts.values()))
    keys = "".join(
        f'<span><i class="box" style="background:{escape(colour)}"></i>{escape(part)}</span>'
        for part, colour in zip(PARTS, PART_COLOURS, strict=True)
    )

    def draw(width: int, height: int) -> str:
        frame = Frame(width, height, (0.0, highest), (0.0, 1.0), left=78)
        room, drawn = (frame.floor - TOP) / len(parts), []
        marks = [(x, short(x)) for x in ticks(0.0, highest, 8 if width > 600 else 4)]
        grid = [frame.at(x, 0)[0] for x, _ in marks]
        drawn += [f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.floor}"/>' for x in grid]
        for row, (name, spans) in enumerate(parts.items()):
            y, begin = TOP + (row + 0.14) * room, 0.0
            drawn.append(f'<text class="tick" x="70" y="{y + 0.36 * room + 4:.1f}" text-anchor="end">{escape(name)}</text>')
            for span_ms, colour in zip(spans, PART_COLOURS, strict=True):
                (x, _), (right, _) = frame.at(begin, 0), frame.at(begin + span_ms, 0)
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{right - x:.2f}" height="{0.72 * room:.1f}" '
                    f'style="fill:{escape(colour)}"/>'
                )
                begin += span_ms
        return frame.svg("milliseconds of a MoE layer, by part", *drawn, frame.x_axis("milliseconds in a MoE layer", marks))

    return f'<div class="legend">{keys}</div>' + both_widths(draw, height=BOTTOM + TOP + 30 * len(parts))


def instruction_means(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of each instruction, mean over MoE layers."""
    names = dict.fromkeys(instruction for layer in layers for instruction in layer["stage_ms"])
    return {instruction: float(np.mean([layer["stage_ms"].get(instruction, 0.0) for layer in layers])) for instruction in names}


def popularity_map(layers: Sequence[Mapping[str, Any]]) -> str:
    """A row a MoE layer, a cell an expert; at the end of a row its most popular one."""
    rows = []
    for layer in layers:
        share_E = np.array(layer["popularity"])
        levels = colour_levels(share_E * len(share_E))[None]
        most = f"expert {share_E.argmax()}: {share_E.max() * len(share_E):.2f}x"
        name = f"layer {layer['layer']}: popularity of experts, most {most} the mean"
        rows.append(f"<span>layer {layer['layer']}</span><div>{_pictures(levels, name)}</div><span>{most}</span>")
    num_experts = len(layers[0]["popularity"])
    every = -(-num_experts // 16)
    numbers = "".join(f"<span>{expert if expert % every == 0 else ''}</span>" for expert in range(num_experts))
    rows.append(f'<span>expert</span><div class="experts">{numbers}</div><span>most popular</span>')
    ramp = _pictures(np.arange(LEVELS, dtype=np.uint8)[None], "")
    full = round(2**FULL_COLOUR_LOG2)
    scale = f'<div class="scale"><span>1/{full} of an equal share</span>{ramp}<span>{full} times</span></div>'
    return f'{scale}<div class="heat">{"".join(rows)}</div>'


def _pictures(levels: np.ndarray, name: str) -> str:
    return "".join(
        f'<img class="{kind}" alt="{escape(name)}" src="{data_uri(levels, table)}">'
        for kind, table in (("light", LIGHT), ("dark", DARK))
    )


def _layer_axis(frame: Frame, layers: Sequence[Mapping[str, Any]]) -> str:
    every = -(-len(layers) // (16 if frame.width > 600 else 8))
    return frame.x_axis("MoE layer", [(i, str(layer["layer"])) for i, layer in enumerate(layers) if i % every == 0])


def _legend(names: Sequence[str], *, of: Mapping[str, Any] | None = None) -> str:
    own = colours(list(of or names))
    return legend([Series(name, [], [], own[name]) for name in names])
