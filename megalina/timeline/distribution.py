"""The distribution of slowdowns: a picture of what share of all-to-alls was slowed at most so much."""

from collections.abc import Mapping, Sequence
from pathlib import Path

PAPER = {"paper's median, 1.83": 1.83, "paper's worst, 4.14": 4.14}  # Lina, Figure 3: backward all-to-alls under all-reduces


def draw_distribution(path: Path, samples: Mapping[str, Sequence[float]], note: str = "") -> None:
    """PNG or SVG, as `path` ends: a line for each {title: slowdowns} that isn't empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for title, values in samples.items():
        if values:
            ordered = sorted(values)
            shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
            axis.step([ordered[0], *ordered], [0.0, *shares], where="post", label=f"{title} ({len(values)})", linewidth=1.8)
    for (label, value), style in zip(PAPER.items(), ("--", ":"), strict=True):
        axis.axvline(value, color="#555555", linestyle=style, linewidth=1, label=label)
    axis.set_ylim(0, 1.01)
    axis.set_xlim(left=0)
    axis.set_xlabel("all-to-all: times as long as alone" + (f" ({note})" if note else ""))
    axis.set_ylabel("share that was slowed at most so much")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=9)
    figure.savefig(path)
