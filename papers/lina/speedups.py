"""What Lina gains in training (section 7.2): rows T1 to T16, none of which anything is fitted on.

Speed-ups are the baseline's time over the other's, means over the paper's three models unless a row says otherwise.  The baseline
is `ddp`, whose collectives share links evenly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import mean

from megalina.step.plan import Plan
from papers.lina.models import (
    BERT2GPT2,
    DDP,
    FIXED,
    GPT2,
    MB,
    PARTITION,
    PIPELINE,
    PRIORITY,
    SEQ_LEN,
    SEQUENCES,
    TRAINED,
    TXL,
    Model,
    lina,
)
from papers.lina.row import Row
from papers.lina.walk import Bed, Constants, Walk

EXPERTS = (2, 4, 8, 16)
GIB = 2**30
SWEPT_MB = (1, 10, 20, 30, 40, 50, 60, 80, 100, 200)
MOSTLY = 0.75  # "nearly always", "in most cases": of twelve pairs of a model and a number of experts
SMALL = 0.05  # "little": of a step
NOTHING = 1e-3  # of a step

LAYER = {
    (2, "F"): ("T3.forward", 1.84),
    (2, "B"): ("T3.backward", 2.41),
    (8, "F"): ("T4.forward", 1.89),
    (8, "B"): ("T4.backward", 2.32),
}
UTILISATION = {TXL: (66.2, 83.4), GPT2: (62.3, 78.2), BERT2GPT2: (63.5, 82.5)}
MEMORY = {TXL: (72.1, 100.0), GPT2: (83.8, 100.0), BERT2GPT2: (74.3, 94.2)}
EFFICIENCY = {TXL: (33, 86), GPT2: (36, 85), BERT2GPT2: (34, 79)}


class Speedups:
    """`rows()` in the paper's order."""

    def __init__(self, bed: Bed, constants: Constants):
        self.bed, self.constants = bed, constants

    def rows(self) -> Iterator[Row]:
        yield from self._steps()
        yield from self._parts()
        yield from self._devices()
        yield from self._ladder()
        yield from self._pieces()

    def walk(self, model: Model, experts: int, plan: Plan) -> Walk:
        return self.bed.step(model, experts, plan, self.constants)

    def gain(self, model: Model, experts: int, plan: Plan, *, over: Plan = DDP) -> float:
        return self.walk(model, experts, over).step_s / self.walk(model, experts, plan).step_s

    def lina_gain(self, model: Model, experts: int) -> float:
        return self.gain(model, experts, lina(model, experts))

    def _steps(self) -> Iterator[Row]:
        gains = {experts: mean(self.lina_gain(model, experts) for model in TRAINED) for experts in EXPERTS}
        for experts, paper in zip(EXPERTS, (1.71, 1.37, 1.73, 1.47), strict=True):
            name = f"step, all of Lina, {experts} experts"
            yield _x(f"T1.E{experts}", name, paper, gains[experts], marks="g" if experts == 2 else "")
        yield _x("T2.mean", "the same, mean over experts", 1.57, mean(gains.values()))
        yield _x("T2.max", "the same, largest", 1.73, max(gains.values()), note="the headline; itself a mean over models")

    def _parts(self) -> Iterator[Row]:
        for (experts, phase), (id, paper) in LAYER.items():
            name = f"MoE layer, {'forward' if phase == 'F' else 'backward'}, {experts} experts"
            yield _x(id, name, paper, self._mean_gain(experts, lambda walk, phase: walk.moe_layer_s(phase), phase))
        for experts, paper in ((4, 2.21), (8, 2.39), (16, 2.31)):
            name = f"backward all-to-all, {experts} experts"
            yield _x(f"T5.E{experts}", name, paper, self._mean_gain(experts, lambda walk, phase: walk.all_to_all_s(phase), "B"))

    def _mean_gain(self, experts: int, seconds: Callable[[Walk, str], float], phase: str) -> float:
        pairs = [(self.walk(m, experts, DDP), self.walk(m, experts, lina(m, experts))) for m in TRAINED]
        return mean(seconds(before, phase) / seconds(after, phase) for before, after in pairs)

    def _devices(self) -> Iterator[Row]:
        note = "the share of a step in which the device computes; the paper's counter is another"
        rises = []
        for model, (before, after) in UTILISATION.items():
            found = [100 * self.walk(model, 16, plan).compute_share for plan in (DDP, lina(model, 16))]
            rises.append(found[1] - found[0])
            yield _percent(f"T6.{model.name}.baseline", f"GPU utilisation, {model.name}, 16 experts", before, found[0], note=note)
            yield _percent(f"T6.{model.name}.lina", "the same with Lina", after, found[1], note=note)
        yield Row(id="T6.mean", name="its rise, mean", paper=17.6, simulated=mean(rises), unit="points", marks="b")
        for model, (before, after) in MEMORY.items():
            note = "DeepSpeed's masks of tokens, experts and places are not ours"
            for name, paper, plan in (("baseline", before, DDP), ("lina", after, lina(model, 16))):
                held = 100 * self.bed.memory(model, 16, plan).peak / (40 * GIB)
                text = f"peak memory of 40 GB, {model.name}, 16 experts, {name}"
                marks = "b" if model is BERT2GPT2 else ""
                more = "; the paper offloads to the host, which isn't simulated" if paper == 100 else ""
                yield _percent(f"T7.{model.name}.{name}", text, paper, held, note=note + more, marks=marks)
        gains = []
        for model, (without, packed) in EFFICIENCY.items():
            note = "taken as micro-operations of experts and of an all-to-all, the shorter over the longer; the paper doesn't say"
            found = [100 * efficiency(self.walk(model, 16, plan)) for plan in (PIPELINE, lina(model, 16))]
            gains.append(found[1] / found[0])
            yield _percent(
                f"T8.{model.name}.unpacked", f"pipelining efficiency, {model.name}, 16 experts", without, found[0], note=note
            )
            text = f"the same, packing {model.packed(16)}"
            yield _percent(f"T8.{model.name}.packed", text, packed, found[1], note=note)
        yield _x("T8.mean", "its gain by packing, mean", 2.43, mean(gains))

    def _ladder(self) -> Iterator[Row]:
        cases = [(model, experts) for model in TRAINED for experts in EXPERTS]
        only = {case: self.gain(*case, PRIORITY) for case in cases}
        yield _x("T9.mean", "step, priority alone, mean", 1.24, mean(only.values()), marks="h")
        most = mean(1.1 <= gain <= 1.3 for gain in only.values()) >= MOSTLY
        yield _holds("T9.range", "step, priority alone", "10-30% faster in most cases", most, marks="h")
        by_experts = [mean(only[model, experts] for model in TRAINED) for experts in EXPERTS]
        yield _holds("T9.grows", "the same over experts", "grows with devices", by_experts == sorted(by_experts))
        for experts, paper in zip(EXPERTS, (1.36, 1.36, 1.41, 1.42), strict=True):
            found = mean(self.gain(model, experts, PARTITION) for model in TRAINED)
            yield _x(f"T10.E{experts}", f"step, priority and partitioning, {experts} experts", paper, found, marks="hl")
        more = mean(self.gain(*case, PIPELINE, over=PARTITION) for case in cases)
        yield _holds(
            "T11", "pipelining besides", "adds little", 1 - SMALL < more < 1 + SMALL, note=f"{100 * (more - 1):+.1f}% here"
        )
        plans = (PRIORITY, PARTITION, PIPELINE)
        least = [self.gain(*case, FIXED) < min(self.gain(*case, plan) for plan in plans) - NOTHING for case in cases]
        note = f"{sum(least)} of {len(least)} here; in the others all gain the same"
        yield _holds("T12", "fixed schedule", "smallest gain nearly always", mean(least) >= MOSTLY, note=note)
        shares = [
            (self.gain(GPT2, e, PRIORITY) - 1) / (self.lina_gain(GPT2, e) - 1) for e in EXPERTS if self.lina_gain(GPT2, e) > 1
        ]
        mostly = mean(shares) > 0.5 if shares else False
        yield _holds("T16", "what GPT-2's gain comes from", "mostly priority", mostly)

    def _pieces(self) -> Iterator[Row]:
        for model in (TXL, BERT2GPT2):
            found = self.sweep(model)
            slower = all(found[size] > found[30] for size in SWEPT_MB if size > 50)
            yield _holds(f"T13.{model.name}", f"pieces above 50 MB, {model.name}", "slower than 30 MB", slower, marks="l")
        minima = [_local_minima([self.sweep(model)[size] for size in SWEPT_MB]) for model in TRAINED]
        yield _holds("T13.optima", "piece sizes", "several optima for a model", max(minima) > 1, marks="l")
        small = all(self.sweep(model)[1] > self.sweep(model)[10] for model in TRAINED)
        yield _holds(
            "T13.small", "pieces below 10 MB", "cost of each operation may dominate", small, note="1 MB against 10 MB here"
        )
        walks = [self.walk(model, 16, PIPELINE) for model in TRAINED]
        share = mean(100 * walk.compute_s("cut", "join") / walk.step_s for walk in walks)
        yield _percent(
            "T14",
            "chunk and concatenate, of a step",
            1.02,
            share,
            note="of rows; gradients are cut as views; with the fitted factor of the gate, which has dearer kernels",
        )
        longer = []
        for model, walk in zip(TRAINED, walks, strict=True):
            whole_s = self.walk(model, 16, PARTITION).all_to_all_s("F")
            longer.append(100 * (walk.all_to_all_s("F") / whole_s - 1))
        yield _percent("T15", "micro-operations' times over the whole one's, more", 1.7, mean(longer))

    def sweep(self, model: Model) -> dict[int, float]:
        """Seconds of a step by MB of a piece, 16 experts: gradients and tokens are both cut into such pieces."""
        row_bytes = SEQUENCES * SEQ_LEN * 2 * model.d_model * 4
        found = {}
        for size in SWEPT_MB:
            plan = replace(PIPELINE, piece_bytes=size * MB, chunks=(-(-row_bytes // (size * MB)),))
            found[size] = self.walk(model, 16, plan).step_s
        return found


def efficiency(walk: Walk) -> float:
    """Of a forward micro-operation of experts and one all-to-all: the shorter over the longer."""
    experts = [e.end_s - e.start_s for e in walk.events if e.name == "experts" and e.phase == "F"]
    sent = [e.end_s - e.start_s for e in walk.sends("tokens", "F")]
    return min(mean(experts), mean(sent)) / max(mean(experts), mean(sent))


def _local_minima(values: Sequence[float]) -> int:
    """Of neighbours that are equal to 0.1% only one counts."""
    kept = [values[0]]
    kept += [v for before, v in zip(values, values[1:], strict=False) if abs(v / before - 1) > NOTHING]
    ends = [float("inf"), *kept, float("inf")]
    return sum(a > b < c for a, b, c in zip(ends, ends[1:], ends[2:], strict=False))


def _x(id: str, name: str, paper: float, simulated: float, *, marks: str = "", note: str = "") -> Row:
    return Row(id=id, name=name, paper=paper, simulated=simulated, unit="x", marks=marks, note=note)


def _percent(id: str, name: str, paper: float, simulated: float, *, marks: str = "", note: str = "") -> Row:
    return Row(id=id, name=name, paper=paper, simulated=simulated, unit="%", marks=marks, note=note)


def _holds(id: str, name: str, paper: str, simulated: bool, *, marks: str = "", note: str = "") -> Row:
    return Row(id=id, name=name, paper=paper, simulated=simulated, marks=marks, note=note)
