"""Modes of serving side by side: one model serves the same batches under several placements, which take turns batch by batch.

So a machine that slows down for a while slows them all, and times can be held against each other.

N sequences may be none on a rank: it takes part all the same.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megalina.batch import Batch
from megalina.generate import Sampling
from megalina.mesh import all_gather_object
from megalina.placement.controller import Outcome, Planner, Policy
from megalina.placement.placement import Placement
from megalina.placement.predictors.predictor import Floats
from megalina.serve.decoding import write_on
from megalina.serve.engine import Engine
from megalina.timeline.contention import summary
from megalina.timeline.recorder import COMPUTE, SEND, Event, Recorder
from megalina.timeline.spans import length_s, union

HOST_INSTRUCTIONS = ("foresee", "learn")  # what a device would not do
WARM_UP_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Served:
    """One batch under one mode, on this rank.  Seconds, bytes."""

    latency_s: float  # from the barrier before it to the last layer's output
    tokens: int  # of this rank
    a2a_wire_s: float  # tokens were on the wire, its waiting for other ranks with it
    a2a_exposed_s: float  # it stood still for them
    busy_s: float  # it computed
    fetch_wait_s: float  # it stood still for experts
    fetched_bytes: int
    planner_s: tuple[float, ...]  # each call
    instruction_s: Mapping[tuple[int, str], float]  # (layer, or -1; instruction): computed, or on the wire
    moe_layer_s: Mapping[int, float]  # from a layer's router to its last sum


@dataclass(frozen=True, slots=True)
class Written:
    """Tokens written after some prompts under one mode, on this rank."""

    decode_s: float  # all passes after prefill
    tokens: int  # that these fed
    passes: int


class TimedPlanner:
    """A planner that notes how long it takes; `taken_s` of each call."""

    def __init__(self, planner: Planner):
        self._planner = planner
        self.taken_s: list[float] = []

    def __call__(self, share_E: Floats, num_devices: int, slots_per_device: int) -> Placement:
        began_s = time.perf_counter()
        placement = self._planner(share_E, num_devices, slots_per_device)
        self.taken_s.append(time.perf_counter() - began_s)
        return placement


@dataclass(slots=True)
class Competitor:
    """One mode: its engine, and what was measured on this rank."""

    name: str
    engine: Engine
    planner: TimedPlanner | None
    served: list[Served] = field(default_factory=list)  # of each timed batch
    written: list[Written] = field(default_factory=list)
    outcomes: list[tuple[Outcome, ...]] = field(default_factory=list)  # of each timed batch, alike on all ranks
    agreed: int = 0  # decisions that left the plan as it was, in timed batches
    replanned: int = 0
    emulated_s: float = 0.0  # that an emulated device computed in timed batches
    overrun_s: float = 0.0  # by which real work ended later there

    @property
    def overrun_share(self) -> float | None:
        """Of an emulated device's time; None: it is real."""
        return None if self.engine.device is None else self.overrun_s / max(self.emulated_s, 1e-9)


def timed(policy: Policy) -> tuple[Policy, TimedPlanner | None]:
    """The policy with a planner that is timed, and that planner; None: it has none."""
    if policy.planner is None:
        return policy, None
    planner = TimedPlanner(policy.planner)
    return replace(policy, planner=planner), planner


def run_interleaved(
    competitors: Sequence[Competitor],
    batch_of: Callable[[int], Batch],
    prompts: Sequence[Sequence[Sequence[int]]],
    *,
    rounds: int,
    decode: int,
    max_positions: int,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> None:
    """`rounds` in which every mode serves this rank's `batch_of(number)`, after one that is not timed; then for each of `prompts`
    a round in which `decode` tokens are decoded after prefill.  The order of turns rotates.

    All ranks call it together, with as many rounds and prompts (a rank's may be empty).  What was measured is added to the
    competitors.  `progress(done, total, mode)`."""
    total = (rounds + 1 + len(prompts)) * len(competitors)
    done = 0
    gc.collect()
    gc.freeze()  # a collection in a turn would slow the competitor whose turn it is
    gc.disable()
    try:
        for number in range(rounds + 1):
            batch = batch_of(max(0, number - 1))
            for competitor in _rotated(competitors, number):
                progress(done, total, competitor.name)
                _serve(competitor, batch, counts=number > 0)
                done += 1
        for number, texts in enumerate(prompts):
            for competitor in _rotated(competitors, number):
                progress(done, total, competitor.name)
                if number == 0:
                    _write(competitor, texts, min(decode, WARM_UP_TOKENS), max_positions)
                competitor.written.append(_write(competitor, texts, decode, max_positions))
                done += 1
        progress(total, total, "")
    finally:
        gc.enable()
        gc.unfreeze()


def _rotated(competitors: Sequence[Competitor], number: int) -> list[Competitor]:
    at = number % len(competitors)
    return [*competitors[at:], *competitors[:at]]


def _serve(competitor: Competitor, batch: Batch, *, counts: bool) -> None:
    engine = competitor.engine
    waited_s, num_bytes = engine.slots.done.waited_s, engine.slots.done.num_bytes
    device_before_s = _device_s(engine)
    if competitor.planner is not None:
        competitor.planner.taken_s = []
    all_gather_object(engine.mesh, None)  # nobody starts before the last one is there
    recorder = Recorder()
    began_s = time.perf_counter()
    outcomes = engine.run(batch, record=recorder, emulate=True).outcomes
    latency_s = time.perf_counter() - began_s
    if not counts:
        return
    competitor.agreed += sum(o.agreed or o.not_worth for o in outcomes)
    competitor.replanned += sum(o.replanned for o in outcomes)
    competitor.outcomes.append(outcomes)
    emulated_s, overrun_s = _device_s(engine)
    competitor.emulated_s += emulated_s - device_before_s[0]
    competitor.overrun_s += overrun_s - device_before_s[1]
    events = recorder.events()
    a2a = summary(events, {}).traffic["a2a"]
    done = engine.slots.done
    competitor.served.append(
        Served(
            latency_s=latency_s,
            tokens=int(batch.valid_BS.sum()),
            a2a_wire_s=a2a.wire_s,
            a2a_exposed_s=a2a.exposed_s,
            busy_s=_busy_s(events) - (done.waited_s - waited_s),  # fetches are awaited inside of an instruction
            fetch_wait_s=done.waited_s - waited_s,
            fetched_bytes=done.num_bytes - num_bytes,
            planner_s=tuple(competitor.planner.taken_s) if competitor.planner is not None else (),
            instruction_s=instruction_seconds(events),
            moe_layer_s=moe_layer_seconds(events),
        )
    )


def _device_s(engine: Engine) -> tuple[float, float]:
    """Seconds that an emulated device has computed so far, and by which real work was late."""
    return (engine.device.busy_s, engine.device.overrun_s) if engine.device is not None else (0.0, 0.0)


def _write(competitor: Competitor, prompts: Sequence[Sequence[int]], decode: int, max_positions: int) -> Written:
    engine = competitor.engine
    at_s: list[float] = []
    fed: list[int] = []

    def each_pass(passes: int, tokens: int) -> None:
        at_s.append(time.perf_counter())
        fed.append(tokens)

    sampling = Sampling(max_tokens=decode + 1, max_positions=max_positions, temperature=0.0)  # prefill gives one token
    all_gather_object(engine.mesh, None)
    with torch.inference_mode():
        write_on(engine, prompts, sampling, each_pass=each_pass, emulate=True)
    return Written(at_s[-1] - at_s[0], sum(fed[1:]), len(fed) - 1)


def instruction_seconds(events: Sequence[Event]) -> dict[tuple[int, str], float]:
    """{(layer, instruction): seconds} of one rank's batch: computed, or on the wire for exchanges.  Layer -1: of none."""
    out: dict[tuple[int, str], float] = {}
    for e in events:
        if e.kind in (COMPUTE, SEND):
            out[e.layer, e.name] = out.get((e.layer, e.name), 0.0) + e.end_s - e.start_s
    return out


def moe_layer_seconds(events: Sequence[Event]) -> dict[int, float]:
    """{layer: seconds} from the start of a MoE layer's `score` to the end of its `mix`."""
    start_s = {e.layer: e.start_s for e in events if e.kind == COMPUTE and e.name == "score"}
    return {e.layer: e.end_s - start_s[e.layer] for e in events if e.kind == COMPUTE and e.name == "mix"}


def _busy_s(events: Sequence[Event]) -> float:
    return length_s(union((e.start_s, e.end_s) for e in events if e.kind == COMPUTE and e.name not in HOST_INSTRUCTIONS))
