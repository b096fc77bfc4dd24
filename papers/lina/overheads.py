"""What the paper measures of its baseline: Table 1, Figures 2 to 4 (section 2.2)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import mean, median

from megalina.step.plan import Plan
from megalina.timeline.contention import Alone, slowdowns
from papers.lina.models import DDP, TXL, txl
from papers.lina.moe_layer import all_to_all_share, forward_seconds
from papers.lina.row import Row
from papers.lina.walk import Bed, Constants, Walk

EXPERTS, LAYERS = (4, 16), (12, 24, 36)


@dataclass(frozen=True, slots=True)
class Measured:
    """A line of Table 1."""

    train_ms: float  # all-to-all of a step
    train_percent: float  # its share of the step
    infer_ms: float
    infer_percent: float


TABLE_1 = {
    (4, 12): Measured(259, 36.7, 73, 27.4),
    (4, 24): Measured(589, 35.4, 103, 26.2),
    (4, 36): Measured(979, 38.2, 153, 28.3),
    (16, 12): Measured(333, 39.5, 102, 32.5),
    (16, 24): Measured(715, 37.6, 177, 31.7),
    (16, 36): Measured(1145, 36.8, 243, 27.4),
}
UNITS = {"train_ms": "ms", "train_percent": "%", "infer_ms": "ms", "infer_percent": "%"}
NAMES = {
    "train_ms": "all-to-all of a training step",
    "train_percent": "its share of the step",
    "infer_ms": "all-to-all of an inference batch",
    "infer_percent": "its share of the batch",
}
FIG_4_NOTE = "the paper doesn't name the model; 24 layers here"


def is_fitted(experts: int, layers: int) -> bool:
    """Every other line of Table 1."""
    return (EXPERTS.index(experts) + LAYERS.index(layers)) % 2 == 0


def table_1(bed: Bed, constants: Constants) -> Iterator[Row]:
    for (experts, layers), paper in TABLE_1.items():
        step = bed.step(txl(layers), experts, DDP, constants)
        batch = bed.batch(txl(layers), experts, constants)
        found = {
            "train_ms": 1e3 * step.all_to_all_s(),
            "train_percent": 100 * step.all_to_all_share,
            "infer_ms": 1e3 * batch.all_to_all_s(),
            "infer_percent": 100 * batch.all_to_all_share,
        }
        for name, value in found.items():
            yield Row(
                id=f"Tab1.E{experts}.{layers}L.{name}",
                name=f"{NAMES[name]}, {layers} layers, {experts} experts",
                paper=getattr(paper, name),
                simulated=value,
                unit=UNITS[name],
                fitted=is_fitted(experts, layers),
                marks=("i" if name == "train_ms" else "") + ("k" if name.endswith("_ms") else ""),
            )


def figures(bed: Bed, constants: Constants) -> Iterator[Row]:
    """What Figures 2, 3 and 8b say besides."""
    step = bed.step(txl(12), 16, DDP, constants)
    yield Row(
        id="Fig2.share",
        name="all-to-all's share of a MoE layer's forward, 12 layers, 16 experts",
        paper=74.9,
        simulated=100 * all_to_all_share(forward_seconds(step.events)),
        unit="%",
        fitted=True,
    )
    yield Row(
        id="Fig8b.ffn",
        name="backward of a layer's experts, which pipelining hides",
        paper=1.6,
        simulated=1e3 * step.compute_s("experts", phase="B") / 12,
        unit="ms",
        fitted=True,
    )
    slowed = under_gradients(bed, constants, DDP)
    yield Row(
        id="Fig3.median",
        name="slowdown of backward all-to-all under all-reduce, median",
        paper=1.83,
        simulated=median(slowed) if slowed else 1.0,
        unit="x",
        fitted=True,
        marks="k",
    )
    yield Row(
        id="Fig3.worst",
        name="the same, worst",
        paper=4.14,
        simulated=max(slowed, default=1.0),
        unit="x",
        note="even sharing among two at most doubles",
    )


def under_gradients(bed: Bed, constants: Constants, baseline: Plan) -> list[float]:
    """Slowdowns of backward all-to-alls that meet gradients, over Table 1's models with 16 experts, against the forward ones,
    which meet none."""
    found = []
    for layers in LAYERS:
        step = bed.step(txl(layers), 16, baseline, constants)
        found += slowdowns([step.events], {"tokens": alone(step)}, "grads", "B")
    return found


def alone(step: Walk) -> Alone:
    forward = min(step.sends("tokens", "F"), key=lambda e: e.end_s - e.start_s)
    return Alone(0.0, (forward.end_s - forward.start_s) / forward.num_bytes)


def shares(bed: Bed, constants: Constants) -> Iterator[Row]:
    """The stated mean of Table 1's shares, and Figure 4."""
    rows = [row for row in table_1(bed, constants) if row.id.endswith("percent")]
    mean_share = mean(float(row.simulated or 0) for row in rows)
    yield Row(id="S2.2.mean", name="mean share of all-to-all", paper=34.1, simulated=mean_share, unit="%", marks="a")
    for experts, paper, marks in ((2, 33.4, ""), (16, 44.5, "j")):
        yield Row(
            id=f"Fig4.E{experts}",
            name=f"share of all-to-all in a training step, {experts} experts",
            paper=paper,
            simulated=100 * bed.step(TXL, experts, DDP, constants).all_to_all_share,
            unit="%",
            marks=marks,
            note=FIG_4_NOTE,
        )
    grows = [bed.step(TXL, experts, DDP, constants).all_to_all_share for experts in (2, 4, 8, 16)]
    yield Row(
        id="Fig4.grows", name="share over 2, 4, 8, 16 experts", paper="grows", simulated=grows == sorted(grows), note=FIG_4_NOTE
    )
    plain = replace(constants, inside_factor=1.0, between_factor=1.0)  # what is sent, not what it takes
    leaves = {experts: bed.step(TXL, experts, DDP, plain).sends("tokens")[0].num_bytes for experts in (2, 4, 8, 16)}
    sizes = [experts * num_bytes * experts / (experts - 1) for experts, num_bytes in leaves.items()]  # with what stays
    linear = all(abs(b / a - 2) < 0.01 for a, b in zip(sizes, sizes[1:], strict=False))
    note = "over all GPUs, which all have the same batch; with what each keeps for itself"
    yield Row(id="Fig4.bytes", name="bytes of an all-to-all", paper="linear in experts", simulated=linear, note=note)
    yield Row(
        id="S2.2.sm",
        name="SM efficiency during all-to-all",
        paper=3.7,
        simulated=None,
        unit="%",
        note="a counter of the GPU; here a device computes or it doesn't",
    )
