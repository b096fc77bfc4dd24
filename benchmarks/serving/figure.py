"""The figure of a map: for each cluster what replication brings, by model and phase (rows), devices and skew (columns)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.sweep import PAYS, Verdict

NOTHING, WANTED = "#e6e6e6", "#ffffff"  # nothing to gain; something to gain that no mode gets
MOST_SHOWN = 3.0  # times as fast, at the end of the colours


@dataclass(frozen=True, slots=True)
class Cell:
    """Of one panel."""

    row: str
    devices: int
    skew: float
    verdict: Verdict


def text_of(verdict: Verdict) -> str:
    """`1.8 B`: gain and the first letter of the mode; `(1.8)`: what ideal gains, and no mode; `.`: nothing to gain."""
    if verdict.pays:
        return f"{verdict.gain:.1f} {verdict.mode[0].upper()}"
    return f"({verdict.most:.1f})" if verdict.most >= PAYS else "."


def columns_of(cells: Sequence[Cell]) -> list[tuple[int, float]]:
    """(devices, skew) of all cells, rising."""
    return sorted({(cell.devices, cell.skew) for cell in cells})


def draw(path: Path, panels: Mapping[str, Sequence[Cell]], notes: Sequence[str]) -> None:
    """PNG or SVG, as `path` ends.  `panels`: cells by title, one below another.  `notes`: lines below them all."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = list(dict.fromkeys(cell.row for cells in panels.values() for cell in cells))
    columns = columns_of([cell for cells in panels.values() for cell in cells])
    colours, scale = colormaps["YlGn"], LogNorm(1.0, MOST_SHOWN * 1.4)
    size = (2.7 + 0.72 * len(columns), len(panels) * (0.75 + 0.31 * len(rows)) + 0.4 + 0.2 * len(notes))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, cells) in zip(axes, panels.items(), strict=True):
        for cell in cells:
            x, y, v = columns.index((cell.devices, cell.skew)), rows.index(cell.row), cell.verdict
            face = colours(scale(min(v.gain, MOST_SHOWN))) if v.pays else WANTED if v.most >= PAYS else NOTHING
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="#bbbbbb", linewidth=0.6))
            axis.text(x + 0.5, y + 0.5, text_of(v), ha="center", va="center", fontsize=9.5, color="#222" if v.pays else "#777")
        for devices in dict.fromkeys(devices for devices, _ in columns):
            own = [i for i, (n, _) in enumerate(columns) if n == devices]
            axis.text((own[0] + own[-1] + 1) / 2, -0.2, f"{devices} devices", ha="center", va="bottom", fontsize=9)
            axis.plot([own[-1] + 1] * 2, [0, len(rows)], color="#444", linewidth=1.1)
        axis.set(xlim=(0, len(columns)), ylim=(len(rows), 0), yticks=[y + 0.5 for y in range(len(rows))], yticklabels=rows)
        axis.set_xticks([x + 0.5 for x in range(len(columns))], [f"{skew:g}" for _, skew in columns])
        axis.tick_params(length=0, labelsize=9)
        axis.set_title(title, fontsize=11, weight="bold", loc="left", pad=18)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[-1].set_xlabel("skew: the busiest expert's rows over the mean expert's", fontsize=9.5)
    figure.supxlabel("\n".join(notes), fontsize=9)
    figure.savefig(path)
