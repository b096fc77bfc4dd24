"""The picture of the scale map: small grids, coloured by what pays, with the gain over tuned eager in each cell."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "nothing": "#e9e7e2",
    "priority": "#9cc3e6",
    "packing": "#f2c14e",
    "chunks": "#4f9bd0",
    "lina": "#1f5f99",
    "flow": "#7fb77e",
    "flow + packing": "#2f7d4f",
    "": "#ffffff",
}
NAMES = {
    "nothing": "nothing pays more than 3%",
    "priority": "priority alone",
    "packing": "packing alone (eager, smaller parallel.ep)",
    "chunks": "priority and chunks",
    "lina": "Lina: priority, chunks, packing",
    "flow": "flow: two parts of the batch",
    "flow + packing": "flow with packing",
    "": "does not fit the memory",
}
DARK = ("lina", "flow + packing", "chunks")  # cells with white words
DEVICES = {"PCIe": "RTX 4090 on PCIe, 8 a node, one adapter", "NVLink": "H100, 8 in NVLink", "NVL72": "GB200, 64 in NVLink"}
SHAPES = {
    "paper": "Lina's model: 16 experts, top-2, width 512",
    "coarse": "coarse: 8 experts of 7,168, top-2, width 2,048",
    "fine": "fine: 64 experts of 1,024, top-8, width 2,048",
}

Point = Mapping[str, Any]


def draw(path: Path, result: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    points = [p for p in result["points"] if not p["zero"]]
    scale = [p for p in points if p["map"] == "scale"]
    granular = [p for p in points if p["map"] == "granularity"]
    panels = list(dict.fromkeys((p["device"], p["gbit"]) for p in granular))
    devices, shapes = list(dict.fromkeys(p["device"] for p in scale)), list(dict.fromkeys(p["shape"] for p in scale))
    figure = Figure(figsize=(12, 13.5), dpi=100, layout=ConstrainedLayoutEngine(hspace=0.04, wspace=0.03))
    grid = figure.subplots(len(devices) + 1, max(len(shapes), len(panels)), squeeze=False)
    for device, axes in zip(devices, grid, strict=False):
        for shape, axis in zip(shapes, axes, strict=True):
            own = [p for p in scale if (p["device"], p["shape"]) == (device, shape)]
            _cells(axis, own, lambda p: p["gbit"], lambda p: p["gpus"])
            if axis is axes[0]:
                axis.set_ylabel(f"{DEVICES[device]}\nGPUs", size=9)
            if device == devices[0]:
                axis.set_title(SHAPES[shape], size=9, weight="bold")
            axis.set_xlabel("Gb/s a node" if device == "PCIe" else "Gb/s a GPU, between NVLink domains", size=8)
    for (device, gbit), axis in zip(panels, grid[-1], strict=True):
        own = [p for p in granular if (p["device"], p["gbit"]) == (device, gbit)]
        _cells(axis, own, lambda p: p["top_k"], lambda p: p["num_experts"])
        axis.set_title(f"64 GPUs, {DEVICES[device]}" + ("" if device == "NVL72" else f", {gbit:g} Gb/s"), size=9, weight="bold")
        axis.set_xlabel("experts a token (top-k), 8,192 wide together", size=8)
        if axis is grid[-1][0]:
            axis.set_ylabel("experts a layer", size=9)
    used = {p["pays"] for p in points}
    handles: list[Any] = [Patch(facecolor=COLOURS[k], edgecolor="#999999", label=NAMES[k]) for k in COLOURS if k in used]
    handles.append(
        Line2D([], [], marker="^", color="#b03a4c", linestyle="", markersize=6, label="the links need longer than the devices")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("What pays over tuned eager, and how many times as fast it is (simulated, one micro-batch a step)", size=11)
    figure.savefig(path)


def _cells(axis: "Axes", points: Sequence[Point], x_of: Callable[[Point], float], y_of: Callable[[Point], float]) -> None:
    """A square a point, in the order of its two numbers."""
    from matplotlib.patches import Rectangle

    xs, ys = sorted({x_of(p) for p in points}), sorted({y_of(p) for p in points})
    for p in points:
        left, bottom, pays = xs.index(x_of(p)), ys.index(y_of(p)), p["pays"]
        axis.add_patch(Rectangle((left, bottom), 0.96, 0.96, facecolor=COLOURS[pays], edgecolor="#cfccc4", linewidth=0.6))
        text = f"{p['gain']:.2f}" if pays not in ("", "nothing") else "" if pays else "no fit"
        colour = "white" if pays in DARK else "#333333"
        axis.text(left + 0.48, bottom + 0.48, text, ha="center", va="center", size=9, color=colour)
        if p["link_s"] > p["compute_s"]:
            axis.plot([left + 0.86], [bottom + 0.84], "^", color="#b03a4c", markersize=4)
    axis.set_xlim(0, len(xs))
    axis.set_ylim(0, len(ys))
    axis.set_xticks([i + 0.48 for i in range(len(xs))], [f"{x:,g}" for x in xs], size=8)
    axis.set_yticks([i + 0.48 for i in range(len(ys))], [f"{y:,g}" for y in ys], size=8)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
