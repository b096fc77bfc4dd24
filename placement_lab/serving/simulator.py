"""Inference batches in virtual time: real routing, and the predictors, planners, splits and triggers that the engine has.

    policy = policy_of(read_mode(Path("conf/infer"), "lina_paper"), Served(num_experts=16, top_k=1, num_devices=16), profile)
    residents = [identity(np.ones(16), 16, 4)] * 12                 # of 12 MoE layers; 16 devices of 4 slots
    device = RooflineSeconds(config)                                # or GivenTimes(attention_s=..., ...)
    setting = Serving(shape=plain_shape((True,) * 12), policy=policy, residents=residents, device=device,
                      network=network_of(config.cluster), row_bytes=2048, expert_s=3.5e-4)
    server = Decider(policy, residents)
    times = [serve(shared_evenly(ids_TLK, 16), server, setting) for ids_TLK in batches]

First it is decided who sends how many rows where (`decisions.py`), which no clock has a say in.  Then the list of the
engine (`megalina/step/inference.py`) is walked by all ranks, which differ: each computes its own tokens and the rows that came to
its slots (`seconds.py`), and the all-to-alls send what was decided.

The engine fetches experts behind its list, on a thread or a stream.  Here that is an instruction: what a layer lacks leaves when
the layer has been planned, comes after so many experts' time, and is awaited before the layer's counts are exchanged.  All wait
for the slowest device there, as they do in the engine, where the exchange of counts waits for everybody.  It costs a launch and
a hop.

Shapes: L MoE layers, E experts, R ranks, each a device, N of them, S slots of a device.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megalina.perfmodel.sim.collectives import Floats
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import Timeline, simulate
from megalina.placement.controller import Policy
from megalina.placement.placement import Placement
from megalina.step.forward import Shape
from megalina.step.inference import inference_step
from megalina.step.program import Instruction, Kind, Op, Program
from megalina.timeline.recorder import COMPUTE, SEND
from placement_lab.serving.decisions import Decider, Decision, ServedBatch
from placement_lab.serving.seconds import DeviceSeconds

NUMBER_BYTES = 8  # of what is exchanged
FETCH = "fetch"  # instruction and axis


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSeconds:
    """What deciding takes on every rank.  Lina: 6.2 ms to plan, 1.45 ms to find phase 2 content (section 7.3)."""

    plan_s: float = 0.0  # a layer's plan, in either phase
    check_s: float = 0.0  # phase 2, where it keeps the plan
    hides: bool = True  # phase 1 plans under the dispatch of the layer before; False: before it, so nothing hides it


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What serves: a model, how its experts are placed, and on what.

    `network`: its all-gather tells counts; with algorithm="direct" to everybody at once, as the engine does with gloo.
    ValueError where the shape has another number of MoE layers than there are residents, and for negative numbers."""

    shape: Shape
    policy: Policy
    residents: Sequence[Placement]  # of each MoE layer, at first
    device: DeviceSeconds
    network: Network
    row_bytes: float  # of a row on the wire
    expert_s: float = 0.0  # for a device to fetch an expert, one after another
    planner: PlannerSeconds = PlannerSeconds()
    combine_chunks: int = 1
    once_per_rank: bool = False  # tokens travel once to each device, with a byte for each of its slots

    def __post_init__(self) -> None:
        if sum(self.shape.moe) != len(self.residents):
            raise ValueError(f"{sum(self.shape.moe)} MoE layers, but placements of {len(self.residents)}")
        if min(self.row_bytes, self.expert_s, self.planner.plan_s, self.planner.check_s) < 0:
            raise ValueError(
                f"row_bytes {self.row_bytes:g}, expert_s {self.expert_s:g}, plan_s {self.planner.plan_s:g}, check_s "
                f"{self.planner.check_s:g}: give 0 or more"
            )


@dataclass(frozen=True, slots=True)
class LayerTime:
    """A MoE layer in one batch, with the dense layers before it; the first one with the embedding."""

    layer: int  # among MoE layers
    seconds: float  # from the end of the MoE layer before until the last device has mixed
    parts_s: Mapping[
        str, float
    ]  # mean over devices: of each compute instruction; "wait dispatch" and so on: it stood still for that
    load_max: int  # rows of the busiest device
    load_mean: float
    planned: bool  # before the router had spoken
    agreed: bool
    replanned: bool
    in_vain: bool  # planned anew, to no use
    fetched: int  # experts, of all devices: behind what is computed
    fetched_again: int  # everything waited for them
    planner_s: float  # of deciding, in both phases


@dataclass(frozen=True, slots=True)
class BatchTime:
    """A batch.  Sums over its MoE layers."""

    seconds: float
    layers: tuple[LayerTime, ...]

    @property
    def max_over_mean(self) -> list[float]:
        """The busiest device's rows over the mean device's, of each MoE layer that had rows."""
        return [layer.load_max / layer.load_mean for layer in self.layers if layer.load_mean]

    @property
    def planner_s(self) -> float:
        return sum(layer.planner_s for layer in self.layers)

    @property
    def fetched(self) -> int:
        return sum(layer.fetched + layer.fetched_again for layer in self.layers)

    @property
    def replanned(self) -> int:
        return sum(layer.replanned for layer in self.layers)

    @property
    def parts_s(self) -> dict[str, float]:
        total: defaultdict[str, float] = defaultdict(float)
        for layer in self.layers:
            for name, seconds in layer.parts_s.items():
                total[name] += seconds
        return dict(total)


def serve(batch: ServedBatch, server: Decider, setting: Serving) -> BatchTime:
    """The next batch.  `server` remembers placements and what was learned; it is of the setting's policy and residents."""
    decisions = server.decide(batch)
    return measured(walk(batch, decisions, setting), decisions, setting)


def walk(batch: ServedBatch, decisions: Sequence[Decision], setting: Serving) -> Timeline:
    """One batch in virtual time, as it was decided."""
    ranks = len(batch.tokens_R)
    everybody = tuple(range(ranks))
    return simulate(
        [program_of(decisions, setting)] * ranks,
        ranks_of=lambda axis, rank: everybody,
        seconds=_seconds(batch, decisions, setting),
        network=setting.network,
        sizes=sizes_of(decisions, setting, ranks),
    )


def program_of(decisions: Sequence[Decision], setting: Serving) -> Program:
    """The engine's list, with an instruction for each layer whose experts are fetched before its router has spoken."""
    learns = setting.policy.predictor is not None
    number_of = _number_of(setting.shape)
    fetches = {d.layer for d in decisions if d.fetched_N.any()}
    out: list[Instruction] = []
    for instruction in inference_step(setting.shape, learns=learns, chunks=setting.combine_chunks, once=setting.once_per_rank):
        lacks = number_of.get(instruction.layer) in fetches
        plan, wire, there = (f"#{name}.{instruction.layer}.0" for name in ("plan", "fetch>", "fetched"))
        if lacks and instruction.name == "told" and instruction.kind is Kind.START:
            out.append(Instruction("F", Kind.WAIT, FETCH, instruction.layer, "0", (wire,), (there,), op=Op.TOKENS, axis=FETCH))
        out.append(instruction)
        if lacks and instruction.name == "foresee":
            out.append(Instruction("F", Kind.START, FETCH, instruction.layer, "0", (plan,), (wire,), op=Op.TOKENS, axis=FETCH))
    return tuple(out)


def measured(timeline: Timeline, decisions: Sequence[Decision], setting: Serving) -> BatchTime:
    """Seconds of a walk, layer by layer."""
    ranks = len(timeline.recorders)
    counted_with = _counted_with(setting.shape)
    parts: list[defaultdict[str, float]] = [defaultdict(float) for _ in decisions]
    mixed_s = [0.0] * len(decisions)
    for rank in range(ranks):
        for event in timeline.events(rank):
            if event.kind == SEND:
                continue
            at = counted_with[event.layer] if event.layer >= 0 else 0 if event.name == "embed" else len(decisions) - 1
            if event.kind == COMPUTE:
                parts[at][event.name] += (event.end_s - event.start_s) / ranks
            else:
                parts[at][f"wait {event.name}"] += event.exposed_s / ranks
            if event.name == "mix":
                mixed_s[at] = max(mixed_s[at], event.end_s)
    mixed_s[-1:] = [timeline.step_s]  # what comes after the last layer is the last one's
    layers = []
    for d, end_s, begin_s, own in zip(decisions, mixed_s, [0.0, *mixed_s], parts, strict=False):
        layers.append(
            LayerTime(
                d.layer,
                end_s - begin_s,
                dict(own),
                int(d.load_N.max()),
                float(d.load_N.mean()),
                d.planned,
                d.agreed,
                d.replanned,
                d.in_vain,
                int(d.fetched_N.sum()),
                int(d.fetched_again_N.sum()),
                _plan_s(d, setting.planner) + _correct_s(d, setting.planner),
            )
        )
    return BatchTime(timeline.step_s, tuple(layers))


def _plan_s(decision: Decision, planner: PlannerSeconds) -> float:
    """Phase 1."""
    return planner.plan_s if decision.planned else 0.0


def _correct_s(decision: Decision, planner: PlannerSeconds) -> float:
    """Phase 2, without what is fetched."""
    if decision.replanned or decision.in_vain:
        return planner.plan_s
    return planner.check_s if decision.agreed else 0.0


def _seconds(batch: ServedBatch, decisions: Sequence[Decision], setting: Serving) -> Callable[[int, Instruction], float]:
    """Of each rank's instructions; of a fetch: until it has come."""
    tokens_R, device, planner, number_of = batch.tokens_R.tolist(), setting.device, setting.planner, _number_of(setting.shape)
    own_R: dict[str, list[float]] = {}
    known: dict[tuple[str, int, tuple[int, int]], list[float]] = {}

    def of_ranks(instruction: Instruction) -> list[float]:
        decision = decisions[number_of[instruction.layer]] if instruction.layer in number_of else None
        if instruction.name == "experts" and decision is not None:
            rows_NS = decision.rows_RNS.sum(0)[:, slice(*_chunk(instruction, decision))]
            return [device.experts_s(rows_S) for rows_S in rows_NS.tolist()]
        if instruction.name == FETCH and decision is not None:
            return (decision.fetched_N * setting.expert_s).tolist()
        if instruction.name not in own_R:
            own_R[instruction.name] = [device.instruction_s(instruction.name, tokens) for tokens in tokens_R]
        own = own_R[instruction.name]
        if instruction.name == "foresee" and decision is not None:
            hidden_s = _plan_s(decision, planner) if planner.hides or decision.layer == 0 else 0.0
            return [s + hidden_s for s in own]
        if instruction.name == "assign" and decision is not None:
            all_s = _correct_s(decision, planner)
            if not planner.hides and decision.layer + 1 < len(decisions):
                all_s += _plan_s(decisions[decision.layer + 1], planner)
            return [s + all_s + n * setting.expert_s for s, n in zip(own, decision.fetched_again_N.tolist(), strict=True)]
        return own

    def seconds(rank: int, instruction: Instruction) -> float:
        if instruction.kind is not Kind.COMPUTE and not (instruction.name == FETCH and instruction.kind is Kind.START):
            return 0.0
        key = instruction.name, instruction.layer, instruction.chunk
        if key not in known:
            known[key] = of_ranks(instruction)
        return known[key][rank]

    return seconds


def sizes_of(decisions: Sequence[Decision], setting: Serving, ranks: int) -> Sizes:
    """What is exchanged, and the rows that were decided to be sent: they go back the way they came."""
    number_of = _number_of(setting.shape)

    def bytes_of(instruction: Instruction) -> float:
        decision = decisions[number_of[instruction.layer]]
        if instruction.op is Op.GATHER:
            return float(decision.told_numbers * NUMBER_BYTES * ranks)
        if instruction.op is Op.COUNTS:
            return float(NUMBER_BYTES * ranks)
        return 0.0 if instruction.name == FETCH else float(matrix_of(instruction, ()).sum()) / ranks

    def matrix_of(instruction: Instruction, group: tuple[int, ...]) -> Floats:
        if instruction.name == FETCH:
            return np.zeros((ranks, ranks))
        decision = decisions[number_of[instruction.layer]]
        if instruction.op is Op.COUNTS:
            return np.full((ranks, ranks), float(NUMBER_BYTES))
        if setting.once_per_rank and instruction.name == "dispatch":
            return decision.once_RN() * np.float64(setting.row_bytes + decision.rows_RNS.shape[2])
        sent_RN: Floats = decision.sent_RN(range(*_chunk(instruction, decision))) * np.float64(setting.row_bytes)
        return sent_RN if instruction.name == "dispatch" else sent_RN.T

    return Sizes(bytes_of, matrix_of=matrix_of)


def _chunk(instruction: Instruction, decision: Decision) -> tuple[int, int]:
    """First and last slot, exclusive, of the instruction's chunk, as `megalina/serve/slot_counts.py` cuts them."""
    c, n = instruction.chunk
    slots = decision.rows_RNS.shape[2]
    return -(-c * slots // n), -(-(c + 1) * slots // n)


def _number_of(shape: Shape) -> dict[int, int]:
    """Of the model's layers, those that are MoE layers, counted."""
    return {layer: number for number, layer in enumerate(i for i, moe in enumerate(shape.moe) if moe)}


def _counted_with(shape: Shape) -> list[int]:
    """Of each of the model's layers: itself if it is a MoE layer, else the next one; after the last one that one."""
    number_of = _number_of(shape)
    following = [[number_of[i] for i in range(layer, shape.num_layers) if i in number_of] for layer in range(shape.num_layers)]
    return [numbers[0] if numbers else len(number_of) - 1 for numbers in following]
