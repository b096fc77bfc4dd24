"""What Lina gains at inference (section 7.3): rows I1 to I10 and Table 5, on `placement_lab/serving/simulator.py`.

Predictor, planner, split and trigger are the engine's, as conf/infer/lina_paper.yaml has them; the baseline leaves experts where
training had them, one a device, and "Ideal" sends as many rows to each.  Planning takes what the paper says; an expert comes over
PCIe at an assumed rate.  A batch has the tokens of a training step; those of the routing stand for equal numbers of them each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np

from megalina.blocks.model import plain_shape
from megalina.config import InferConfig
from megalina.perfmodel.forecast.network import network_of
from megalina.perfmodel.sim.virtual import Timeline
from megalina.placement.controller import Outcome
from megalina.placement.planners.identity import identity
from megalina.serve.policies import Served, policy_of
from megalina.timeline.contention import quantile
from megalina.timeline.recorder import COMPUTE
from papers.lina.models import SEQ_LEN, SEQUENCES, Model, config_of
from papers.lina.routing import SKEWS, Routed, next_concentration
from papers.lina.row import Row
from papers.lina.walk import Bed, Constants
from placement_lab.serving.decisions import Decider, even_choices, shared_evenly
from placement_lab.serving.seconds import GivenTimes
from placement_lab.serving.simulator import BatchTime, PlannerSeconds, Serving, measured, walk

PLAN_MS, CHECK_MS = 6.2, 1.45  # section 7.3
PCIE_BYTES_PER_S = 12e9  # a host's memory to a GPU, PCIe 3 x16; assumed
TXL_12 = Model("TXL", 12, 512, 8, 256, 2, 4)  # 6.2 ms a layer for 24.0% of its batch means 12 layers
BERT_LARGE = Model("BERT-Large", 12, 1024, 16, 30522, 2, 2)  # 12 layers, as the paper says; BERT-Large's width
SERVED = (TXL_12, BERT_LARGE)
PATHS = (1, 3, 6)
TABLE_5 = {  # median and 95th percentile over Ideal, phase 2 and accuracy in percent
    (TXL_12, 1): (1.41, 1.32, 76.5, 31.6),
    (TXL_12, 3): (1.16, 1.04, 25.7, 60.4),
    (TXL_12, 6): (1.19, 1.11, 22.5, 71.4),
    (BERT_LARGE, 1): (1.34, 1.35, 71.3, 28.3),
    (BERT_LARGE, 3): (1.07, 1.04, 32.2, 63.5),
    (BERT_LARGE, 6): (1.00, 1.11, 27.1, 66.0),
}
TABLE_6 = (("BERT-IMDB", 1.08, 64.4), ("BERT-Twitter", 1.11, 62.3), ("T5-French", 1.04, 68.8), ("T5-Russian", 1.08, 62.5))

STATIC, LINA, IDEAL, NO_ESTIMATION, NO_PHASE_2 = "static", "lina", "ideal", "no estimation", "no phase 2"
FREE = "free planning"  # planning takes no time, experts still do
MODES: Mapping[str, Mapping[str, Any]] = {  # what differs from lina_paper.yaml; of `STATIC` and `IDEAL`: from static.yaml
    **dict.fromkeys((STATIC, IDEAL, LINA, FREE), {}),
    NO_ESTIMATION: {"predictor": "none", "trigger": "always", "first_planned": 0},
    NO_PHASE_2: {"trigger": "never"},
    **{f"path {n}": {"path_length": n, "first_planned": n} for n in PATHS},
}


@dataclass(frozen=True, slots=True)
class Replay:
    """A mode's batches, one after another."""

    times: Sequence[BatchTime]
    idle_percents: Sequence[float]  # of each batch: the device with the least to compute, for the busiest one's sake
    outcomes: Sequence[Outcome]
    attention_s: float  # of each layer, which isn't the MoE layer's
    agreed: int
    decided: int  # layers of batches that were planned

    def median_s(self) -> float:
        return median(time.seconds for time in self.times)

    def tail_s(self) -> float:
        return _p95([time.seconds for time in self.times])

    def layer_tail_s(self) -> float:
        """95th percentile of MoE layers."""
        return _p95([layer.seconds - self.attention_s for time in self.times for layer in time.layers])

    def all_to_all_tails_s(self) -> list[float]:
        """Of each layer: 95th percentile of its two all-to-alls, as the mean device waits for them."""
        waits = ("wait dispatch", "wait combine")
        by_layer = zip(*(time.layers for time in self.times), strict=True)
        return [_p95([sum(layer.parts_s.get(w, 0.0) for w in waits) for layer in layers]) for layers in by_layer]

    @property
    def accuracy(self) -> float:
        """Percent of the plans with whose list of favourites phase 2 was content."""
        return 100 * self.agreed / self.decided

    @property
    def misordered(self) -> float:
        """Experts that are not where they were expected to be in the order of popularity; mean over layers and batches."""
        known = [o for o in self.outcomes if o.expected_E is not None]
        return mean(_misplaced(o) for o in known)


class Inference:
    """Replays that were asked for, by what was asked.

    `routed(model, experts)`: what is served; `lina`, `static`: conf/infer's modes of these names."""

    def __init__(
        self,
        bed: Bed,
        constants: Constants,
        *,
        lina: InferConfig,
        static: InferConfig,
        routed: Callable[[Model, int], Routed],
        progress: Callable[[str], None] = lambda what: None,
    ):
        self.bed, self.constants, self.lina, self.static = bed, constants, lina, static
        self._routed, self._progress = routed, progress
        self._replays: dict[tuple[Model, int, str], Replay] = {}
        self._routings: dict[tuple[Model, int], Routed] = {}

    def routed(self, model: Model, experts: int) -> Routed:
        if (model, experts) not in self._routings:
            self._routings[model, experts] = self._routed(model, experts)
        return self._routings[model, experts]

    def replay(self, model: Model, experts: int, mode: str) -> Replay:
        if (model, experts, mode) not in self._replays:
            self._progress(f"inference: {model.name}, {experts} experts, {mode}")
            self._replays[model, experts, mode] = self._walked(model, experts, mode)
        return self._replays[model, experts, mode]

    def _walked(self, model: Model, experts: int, mode: str) -> Replay:
        routed = self.routed(model, experts)
        batches = [shared_evenly(ids_TLK, experts) for ids_TLK in routed.batches]
        if mode == IDEAL:
            batches = [even_choices(batches[0], experts)]  # all are alike
        setting, attention_s = self._setting(model, experts, mode, tokens=len(routed.batches[0]))
        server = Decider(setting.policy, setting.residents)
        times, idle, outcomes = [], [], []
        for batch in batches:
            decisions = server.decide(batch)
            outcomes += [decision.outcome for decision in decisions]
            # Phase 1 is worked out beside the devices, from the first all-to-all of the layer before to its second
            # (section 6.2), which take longer.
            timeline = walk(batch, [replace(d, planned=False) for d in decisions], setting)
            time = measured(timeline, decisions, setting)
            times.append(replace(time, seconds=time.seconds + self.constants.outside_ms / 1e3))
            idle.append(_idle_percent(timeline, times[-1].seconds))
        planned = [layer for time in times for layer in time.layers if layer.planned]
        agreed = sum(layer.agreed for layer in planned)
        return Replay(times, idle, outcomes, attention_s, agreed, len(planned))

    def _setting(self, model: Model, experts: int, mode: str, *, tokens: int) -> tuple[Serving, float]:
        """And the seconds of a layer's attention.  `tokens`: of the routing's batches, each of which stands for several."""
        config = config_of(self.bed.base, model, experts, top_k=1)
        even = self.bed.batch(model, experts, self.constants)
        instruction_s = {name: even.compute_s(name) / model.layers for name in ("attention", "route", "experts", "mix")}
        device = GivenTimes(
            attention_s=instruction_s["attention"],
            experts_full_s=instruction_s["experts"],
            even_tokens=tokens / experts,
            even_rows=tokens / experts,
            others_s={"score": instruction_s["route"], "mix": instruction_s["mix"]},
        )
        inside = experts <= config.cluster.ranks_per_node
        factor = self.constants.inside_factor if inside else self.constants.between_factor
        each = SEQUENCES * SEQ_LEN * experts / tokens
        infer = replace(self.static if mode in (STATIC, IDEAL) else self.lina, **MODES[mode])
        profile = self.routed(model, experts).profile if infer.predictor != "none" else None
        slots = infer.slots_per_device or 1
        setting = Serving(
            shape=plain_shape((True,) * model.layers),
            policy=policy_of(infer, Served(experts, 1, experts), profile),
            residents=[identity(np.ones(experts), experts, slots)] * model.layers,
            device=device,
            network=network_of(config.cluster),
            row_bytes=each * factor * 4 * model.d_model,
            expert_s=2 * model.d_model * 4 * model.d_model * 4 / PCIE_BYTES_PER_S,
            planner=PlannerSeconds() if mode == FREE else PlannerSeconds(plan_s=PLAN_MS / 1e3, check_s=CHECK_MS / 1e3),
        )
        return setting, instruction_s["attention"]

    def rows(self) -> Iterator[Row]:
        """In the paper's order."""
        note = self.routed(TXL_12, 16).note
        for row in (*self._put_in(), *self._gains(), *self._left_out(), *self._planning(), *self._table_5()):
            yield replace(row, note="; ".join(filter(None, (note, row.note))))
        for task, tail, accuracy in TABLE_6:
            for name, paper, unit in (("p95", tail, "x"), ("accuracy", accuracy, "%")):
                reason = "no routing of this task is at hand, and made routing of one task is like that of another"
                yield Row(id=f"Tab6.{task}.{name}", name=f"{task}, {name}", paper=paper, simulated=None, unit=unit, note=reason)

    def _put_in(self) -> Iterator[Row]:
        """What routing is made by."""
        for experts, paper in SKEWS.items():
            routed = self.routed(TXL_12, experts)
            name = f"most over least popular expert, {experts} experts"
            yield Row(id=f"Fig6.E{experts}", name=name, paper=paper, simulated=routed.skew, unit="x", fitted=True, put_in=True)
        idle = max(max(self.replay(TXL_12, experts, STATIC).idle_percents) for experts in (4, 16))
        text = "idle time of the least popular expert's device while the busiest computes, of a batch, the most"
        yield Row(id="Fig6.idle", name=text, paper=29.4, simulated=idle, unit="%")
        served = np.concatenate(self.routed(TXL_12, 16).batches)
        for most, paper in ((1, 41.94), (2, 54.59)):
            text = f"tokens of an expert whose next one is among their group's {most} most chosen"
            found = 100 * next_concentration(served, 16, most)
            yield Row(id=f"Fig9.k{most}", name=text, paper=paper, simulated=found, unit="%", fitted=True, put_in=True)

    def _gain(self, model: Model, experts: int, seconds: Callable[[Replay], float]) -> float:
        return seconds(self.replay(model, experts, STATIC)) / seconds(self.replay(model, experts, LINA))

    def _gains(self) -> Iterator[Row]:
        medians = {}
        for id, model, papers in (("I1", TXL_12, (1.54, 1.45)), ("I2", BERT_LARGE, (1.36, 1.46))):
            for experts, paper in zip((4, 16), papers, strict=True):
                medians[model, experts] = self._gain(model, experts, Replay.median_s)
                marks, name = "m" if model is TXL_12 else "", f"batch, median, {model.name}, {experts} experts"
                yield _x(f"{id}.E{experts}", name, paper, medians[model, experts], marks=marks)
        yield _x("I1+I2.mean", "the same, mean", 1.45, mean(medians.values()))
        for model, paper in zip(SERVED, (1.82, 1.68), strict=True):
            name = f"batch, 95th percentile, {model.name}, 16 experts"
            yield _x(f"I3.{model.name}", name, paper, self._gain(model, 16, Replay.tail_s), marks="f")
        tails = [self._gain(model, experts, Replay.tail_s) for model in SERVED for experts in (4, 8, 16)]
        yield _x("I3.mean", "the same, mean over 4, 8, 16 experts", 1.63, mean(tails), marks="f")
        for model, papers in zip(SERVED, ((1.87, 1.77), (1.58, 1.81)), strict=True):
            for experts, paper in zip((8, 16), papers, strict=True):
                name = f"MoE layer, 95th percentile, {model.name}, {experts} experts"
                yield _x(f"I4.{model.name}.E{experts}", name, paper, self._gain(model, experts, Replay.layer_tail_s))
        tails_s = [self.replay(TXL_12, 16, mode).all_to_all_tails_s() for mode in (STATIC, LINA)]
        gains = [a / b for a, b in zip(*tails_s, strict=True)]
        yield _x("I5.mean", "all-to-alls, 95th percentile, TXL, 16 experts, mean over layers", 1.96, mean(gains))
        yield _x("I5.max", "the same, largest of a layer", 2.50, max(gains))

    def _left_out(self) -> Iterator[Row]:
        for model, paper in zip(SERVED, (24.0, 18.6), strict=True):
            found = self.replay(model, 16, NO_ESTIMATION).median_s() / self.replay(model, 16, LINA).median_s()
            name = f"longer without estimation, median, {model.name}, 16 experts"
            yield _percent(f"I6.{model.name}", name, paper, 100 * (found - 1))
        for model, paper in zip(SERVED, (26.7, 33.1), strict=True):
            found = self.replay(model, 16, NO_PHASE_2).tail_s() / self.replay(model, 16, LINA).tail_s()
            name = f"longer without phase 2, 95th percentile, {model.name}, 16 experts"
            yield _percent(f"I7.{model.name}", name, paper, 100 * (found - 1))

    def _planning(self) -> Iterator[Row]:
        for id, name, paper in (("plan", "planning", PLAN_MS), ("check", "phase 2 that agrees", CHECK_MS)):
            yield Row(id=f"I8.{id}", name=name, paper=paper, simulated=paper, unit="ms", fitted=True, put_in=True)
        fires = mean(100 - self.replay(model, 16, LINA).accuracy for model in SERVED)
        yield _percent("I8.fires", "phase 2 plans anew, of all plans, 16 experts", 23.0, fires, marks="de")
        for model, paper in zip(SERVED, (58.41, 54.16), strict=True):
            name = f"both favourites right, in their order, {model.name}"
            yield _percent(f"I9.{model.name}", name, paper, self.replay(model, 16, LINA).accuracy, marks="de")
        found = self.replay(TXL_12, 16, LINA).misordered
        yield Row(id="I10", name="misordered experts, TXL, mean", paper=3.67, simulated=found, note="of 16")

    def _table_5(self) -> Iterator[Row]:
        for (model, path), papers in TABLE_5.items():
            lina, ideal = self.replay(model, 16, f"path {path}"), self.replay(model, 16, IDEAL)
            found = {
                "median": lina.median_s() / ideal.median_s(),
                "p95": lina.tail_s() / ideal.tail_s(),
                "phase_2": 100 - lina.accuracy,
                "accuracy": lina.accuracy,
            }
            for (name, value), paper in zip(found.items(), papers, strict=True):
                unit = "x" if name in ("median", "p95") else "%"
                marks = "d" if unit == "%" else "c" if papers[1] < papers[0] else ""
                text = f"{name} over ideal" if unit == "x" else name.replace("_", " ")
                text = f"{text}, {model.name}, paths of {path}"
                yield Row(id=f"Tab5.{model.name}.l{path}.{name}", name=text, paper=paper, simulated=value, unit=unit, marks=marks)


def _idle_percent(timeline: Timeline, batch_s: float) -> float:
    ranks = range(len(timeline.recorders))
    busy_s = [sum(e.end_s - e.start_s for e in timeline.events(rank) if e.kind == COMPUTE) for rank in ranks]
    return 100 * (max(busy_s) - min(busy_s)) / batch_s


def _misplaced(outcome: Outcome) -> int:
    assert outcome.expected_E is not None
    expected, actual = (np.argsort(-np.asarray(x), kind="stable") for x in (outcome.expected_E, outcome.count_E))
    return int((expected != actual).sum())


def _p95(values: Sequence[float]) -> float:
    found = quantile(sorted(values), 0.95)
    assert found is not None
    return found


def _x(id: str, name: str, paper: float, simulated: float, *, marks: str = "") -> Row:
    return Row(id=id, name=name, paper=paper, simulated=simulated, unit="x", marks=marks)


def _percent(id: str, name: str, paper: float, simulated: float, *, marks: str = "") -> Row:
    return Row(id=id, name=name, paper=paper, simulated=simulated, unit="%", marks=marks)
