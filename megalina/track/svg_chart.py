"""A line chart as inline SVG, whose colours come from the page's style sheet (so it follows light, dark and print)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

MAX_POINTS = 500  # a line with more is thinned; each bucket keeps its lowest and highest point

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 26


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]  # None or not finite: a gap
    colour: str  # any CSS colour, `var(--accent)` included
    faint: bool = False  # a thin pale line without an entry in the legend
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """A dashed horizontal line."""

    name: str
    y: float


def smoothed(ys: Sequence[float | None], span: int) -> list[float | None]:
    """Mean of the values within `span` / 2 on either side, fewer at the ends; centred, so that it doesn't lag; gaps stay gaps."""
    known = [y is not None and math.isfinite(y) for y in ys]
    sums = [0.0, *accumulate(y if y is not None and ok else 0.0 for y, ok in zip(ys, known, strict=True))]
    counts = [0, *accumulate(known)]
    out: list[float | None] = []
    for i, ok in enumerate(known):
        half = min(span // 2, i, len(ys) - 1 - i)  # the same on both sides, or a slope would bend at the ends
        low, high = i - half, i + half + 1
        out.append((sums[high] - sums[low]) / (counts[high] - counts[low]) if ok else None)
    return out


def short(value: float) -> str:
    """1.2M | 350k | 0.25 | 1e-05."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.0e}" if 0 < size < 1e-3 else f"{value:.4g}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / max(count, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _finite(y: float | None) -> bool:
    return y is not None and math.isfinite(y)


def _thin(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    if len(points) <= MAX_POINTS:
        return points
    size = -(-len(points) // (MAX_POINTS // 2))
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        known = [point for point in bucket if _finite(point[1])]
        ends = {min(known, key=lambda p: p[1] or 0.0), max(known, key=lambda p: p[1] or 0.0)} if known else {bucket[0]}
        kept += sorted(ends)
    return kept


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    width: int = 460,
    height: int = 230,
    references: Sequence[Reference] = (),
    from_zero: bool = False,
) -> str:
    """`label` is read aloud by screen readers.  ValueError if no series has a finite point."""
    xs = [x for line in series for x, y in zip(line.xs, line.ys, strict=True) if _finite(y)]
    ys = [y for line in series for y in line.ys if y is not None and math.isfinite(y)] + [r.y for r in references]
    if not xs:
        raise ValueError(f"chart {label!r} has no finite point")
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = (min(0.0, *ys, 0.0) if from_zero else min(ys)), max(ys)
    if y_high - y_low < 1e-12 * max(abs(y_high), 1e-300):  # a flat line sits in the middle of its chart
        y_low, y_high = (0.0, 2 * y_high) if y_high > 0 else (y_low - 1, y_high + 1)
    margin = (y_high - y_low) * 0.06
    if any(reference.y > y_high - 2 * margin for reference in references):
        margin *= 3  # room for the reference's name above its line
    y_low, y_high = (y_low if from_zero else y_low - (y_high - y_low) * 0.06), y_high + margin
    x_span = (x_high - x_low) or 1.0

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / x_span * (width - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (height - TOP - BOTTOM)

    parts = []
    for tick in ticks(y_low, y_high, 4):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    x_ticks = ticks(x_low, x_high, 5 if width < 600 else 8) if x_high > x_low else [x_low]
    parts += [f'<text class="tick" x="{at_x(t):.1f}" y="{height - 7}" text-anchor="middle">{short(t)}</text>' for t in x_ticks]
    for line in series:
        parts += _line(line, at_x, at_y)
    for reference in references:
        y = at_y(reference.y)
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        name = escape(reference.name)
        name_y = y + 13 if reference.y <= min(ys) else y - 6  # on the side where no line is
        parts.append(f'<text class="reference-name" x="{width - RIGHT}" y="{name_y:.1f}" text-anchor="end">{name}</text>')
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _line(line: Series, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[str]:
    segments: list[list[str]] = [[]]
    for x, y in _thin(list(zip(line.xs, line.ys, strict=True))):
        if y is not None and math.isfinite(y):
            segments[-1].append(f"{at_x(x):.1f},{at_y(y):.1f}")
        elif segments[-1]:
            segments.append([])
    style = f'style="--line:{escape(line.colour)}"'
    kind = "line faint" if line.faint else "line"
    parts = [f'<polyline class="{kind}" {style} points="{" ".join(points)}"/>' for points in segments if len(points) > 1]
    alone = [points[0] for points in segments if len(points) == 1]
    marked = [point for points in segments for point in points] if line.dots and len(line.xs) <= 40 else alone
    for point in marked:
        x_text, y_text = point.split(",")
        parts.append(f'<circle class="dot" {style} cx="{x_text}" cy="{y_text}" r="3"/>')
    return parts


def legend(series: Sequence[Series]) -> str:
    """HTML beside the chart, not text inside it: it wraps on a narrow screen and keeps its size."""
    entries = "".join(
        f'<span><i style="--line:{escape(line.colour)}"></i>{escape(line.name)}</span>' for line in series if not line.faint
    )
    return f'<div class="legend">{entries}</div>'
