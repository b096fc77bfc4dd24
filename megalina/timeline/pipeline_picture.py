"""The picture of a pipeline that people know: ranks as rows, cells with their micro-batch's number, bubbles white."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}
COLOURS = {  # of a rank's chunks in turn
    "F": ("#2b6cb0", "#7fb3e6"),
    "B": ("#b7691a", "#e3a75c"),
    "I": ("#2f855a", "#86d0a3"),
    "W": ("#6b46c1", "#b79df0"),
}
HEIGHT = 0.86  # of a row that is 1 high
INCHES_OF_ROW, INCHES_OF_WORDS, WIDTH_INCHES = 0.36, 1.25, 15.0
DIGIT_OF_WIDTH = 0.0055  # what a digit of a number takes of the picture's width
LEAST_OF_WIDTH = 0.002  # a cell that is narrower has no border


@dataclass(frozen=True, slots=True)
class Box:
    """A cell in a rank's row."""

    start: float
    end: float
    kind: str  # one of `NAMES`
    micro_batch: int
    chunk: int  # which of the rank's
    lane: int = 0  # of cells whose instructions take turns: the upper one is 0
    lanes: int = 1


def draw_pipeline(path: Path, ranks: Sequence[Sequence[Box]], *, title: str, note: str = "") -> None:
    """PNG or SVG, as `path` ends.  `note` stands below the time."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    end = max(box.end for boxes in ranks for box in boxes)
    figure = Figure(figsize=(WIDTH_INCHES, INCHES_OF_WORDS + INCHES_OF_ROW * len(ranks)), dpi=110, layout="constrained")
    axis = figure.subplots()
    for rank, boxes in enumerate(ranks):
        for box in boxes:
            height = HEIGHT / box.lanes
            bottom = -rank - 1 + (1 - HEIGHT) / 2 + height * (box.lanes - 1 - box.lane)
            width, colour = box.end - box.start, COLOURS[box.kind][box.chunk % 2]
            line = 0.6 if width > LEAST_OF_WIDTH * end else 0.0
            axis.broken_barh([(box.start, width)], (bottom, height), facecolors=colour, edgecolor="white", linewidth=line)
            label = str(box.micro_batch)
            if width > DIGIT_OF_WIDTH * len(label) * end:
                dark = "white" if box.chunk % 2 == 0 else "#1a202c"
                size = 8 if box.lanes == 1 else 6
                axis.text(box.start + width / 2, bottom + height / 2, label, size=size, color=dark, ha="center", va="center")
    axis.set_xlim(0, end)
    axis.set_ylim(-len(ranks), 0)
    axis.set_yticks([-rank - 0.5 for rank in range(len(ranks))], [f"rank {rank}" for rank in range(len(ranks))], size=9)
    axis.tick_params(left=False)
    axis.set_title(title, loc="left", size=11, weight="bold")
    axis.set_xlabel("time" + (f" ({note})" if note else ""))
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    used = {box.kind for boxes in ranks for box in boxes}
    handles = [Patch(color=COLOURS[kind][0], label=name) for kind, name in NAMES.items() if kind in used]
    if any(box.chunk % 2 for boxes in ranks for box in boxes):
        handles.append(Patch(color="#dddddd", label="lighter: every other chunk of a rank"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path)
