"""The distribution of slowdowns: a line that says what share of all-to-alls was slowed at most so much."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megalina.timeline.contention import quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = {"paper's median, 1.83": 1.83, "paper's worst, 4.14": 4.14}  # Lina, Figure 3: backward all-to-alls under all-reduces
SHOWN = 0.98  # of each sample lies within the axis: one that a busy machine held up would press all others to its edge


def draw_distribution(axis: "Axes", samples: Mapping[str, Sequence[float]]) -> None:
    """A line for each {title: slowdowns} that isn't empty; its title says the largest."""
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
