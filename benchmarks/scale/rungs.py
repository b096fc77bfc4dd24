"""One layout on one cluster, with the ideas of Lina (USENIX ATC 2023) added one after another, in virtual time.

Each rung takes the best of its own numbers (pieces, chunks, packing), the baseline too, so a rung is not held against a baseline
that nobody tuned.  Rungs are not held to be better than those below: priority may lose, and packing may.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_bytes import bucket_specs
from megalina.perfmodel.forecast.forecast import fits_in
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.perfmodel.sim.folding import FoldedLoads
from megalina.perfmodel.sim.network import Network
from megalina.step.candidates import DDP, EAGER, FLOW, LINA_NOPACK, LINA_ZERO, PACKINGS, PRIORITY, PRIORITY_PARTITION, piece_of
from megalina.step.plan import Plan
from megalina.step.program import Kind
from megalina.timeline.contention import summary

PIECES_A_LAYER = (2, 8)  # besides whole buckets
LATE_LAYERS = (0, 2)
RUNGS = ("priority", "packing", "chunks", "lina", "flow", "flow + packing", "lina_zero")  # above eager, the simplest first
LADDER = ("eager", "priority", "chunks", "lina")  # the paper's: each adds to the one before it
WORTHWHILE = 0.03  # less of a gain is nothing, for a simulation
AS_GOOD = 0.01  # the simplest rung that is so close to the best is what is named


@dataclass(frozen=True, slots=True)
class Rung:
    """The best plan of a rung.  Seconds of one step; all ranks do the same."""

    plan: Plan
    step_s: float
    compute_s: float
    exposed_s: Mapping[str, float]  # a2a, grads, params, other

    def as_json(self) -> dict[str, Any]:
        return {"plan": str(self.plan), "step_s": self.step_s, "compute_s": self.compute_s, "exposed_s": dict(self.exposed_s)}


@dataclass(frozen=True, slots=True)
class Point:
    """All rungs of one layout; those whose every plan needs more memory than there is are missing."""

    rungs: Mapping[str, Rung]
    compute_s: float  # of the layout without packing: no schedule of it is faster ...
    link_s: float  # ... nor than what its busiest link carries

    @property
    def bound_s(self) -> float:
        return max(self.compute_s, self.link_s)

    @property
    def pays(self) -> str:
        """The rung to take: "nothing" for a gain of no more than 3%; "" where nothing fits."""
        if "eager" not in self.rungs:
            return ""
        found = {name: self.rungs[name].step_s for name in RUNGS if name in self.rungs}
        best_s = min(found.values(), default=self.rungs["eager"].step_s)
        name = next((name for name, step_s in found.items() if step_s <= best_s * (1 + AS_GOOD)), "nothing")
        return name if self.gain(name) > 1 + WORTHWHILE else "nothing"

    def gain(self, name: str) -> float:
        """How many times as fast as tuned eager; 1 for nothing."""
        return self.rungs["eager"].step_s / self.rungs[name].step_s if name in self.rungs else 1.0

    def as_json(self) -> dict[str, Any]:
        """`saved_s`: what each rung of the paper's ladder takes from the one below it; together what Lina saves of eager."""
        pairs = [(below, name) for below, name in pairwise(LADDER) if below in self.rungs and name in self.rungs]
        return {
            "pays": self.pays,
            "gain": self.gain(self.pays),
            "compute_s": self.compute_s,
            "link_s": self.link_s,
            "bound_s": self.bound_s,
            "saved_s": {name: self.rungs[below].step_s - self.rungs[name].step_s for below, name in pairs},
            "rungs": {name: rung.as_json() for name, rung in self.rungs.items()},
        }


Walk = Callable[[Plan, int], Rung | None]  # a plan, and by how much parallel.ep is smaller; None: it doesn't fit


def point_of(config: PretrainConfig, world: int, *, vocab_size: int, network: Network) -> Point:
    """One micro-batch a step, so that nothing hides gradients but the step itself.  `network`: in place of the cluster's."""

    def walk(plan: Plan, less_ep: int = 1) -> Rung | None:
        parallel = replace(config.parallel, ep=config.parallel.ep // less_ep)
        return _walked(replace(config, parallel=parallel), plan, world, vocab_size=vocab_size, network=network)

    pieces = _pieces(config, world, vocab_size=vocab_size)
    packings = [k for k in PACKINGS if config.parallel.ep % k == 0]
    compute_s, link_s = _bounds(config, world, vocab_size=vocab_size, network=network)
    found = {name: rung for name, rung in _rungs(walk, pieces, packings, zero=config.parallel.zero) if rung}
    return Point(found, compute_s, link_s)


def _rungs(walk: Walk, pieces: list[int], packings: list[int], *, zero: int) -> Iterator[tuple[str, Rung | None]]:
    eager = _best(walk(plan, 1) for plan in (*(replace(EAGER, piece_bytes=size) for size in (0, *pieces)), DDP))
    yield "eager", eager
    if eager is not None:  # packing k is a parallel.ep that is k times smaller, which needs no other strategy
        yield "packing", _doubled(lambda k: walk(eager.plan, k), packings)
    in_pieces = (replace(PRIORITY_PARTITION, piece_bytes=size) for size in pieces)
    priority = _best(walk(plan, 1) for plan in (PRIORITY, *in_pieces))
    yield "priority", priority
    if priority is not None:
        chunked = replace(LINA_NOPACK, piece_bytes=priority.plan.piece_bytes)
        yield "chunks", walk(chunked, 1)
        lina = _doubled(lambda k: walk(replace(chunked, strategy="lina", packing=k), 1), packings)
        yield "lina", lina and _best([lina, walk(replace(lina.plan, chunks=(1,)), 1)])
    flow = _best(walk(replace(FLOW, late_layers=late), 1) for late in LATE_LAYERS)
    yield "flow", flow
    if flow is not None:
        yield "flow + packing", _doubled(lambda k: walk(replace(flow.plan, packing=k), 1), packings)
    if zero:
        yield "lina_zero", walk(replace(LINA_ZERO, piece_bytes=pieces[0]), 1)


def _best(rungs: Iterable[Rung | None]) -> Rung | None:
    return min((rung for rung in rungs if rung is not None), key=lambda rung: rung.step_s, default=None)


def _doubled(walk: Callable[[int], Rung | None], packings: list[int]) -> Rung | None:
    """Packing doubles while that pays, as in the paper's section 4.3, but by whole steps."""
    best: Rung | None = None
    for packing in packings:
        found = walk(packing)
        if found is None or (best is not None and found.step_s >= best.step_s):
            break
        best = found
    return best


def _pieces(config: PretrainConfig, world: int, *, vocab_size: int) -> list[int]:
    numel = sum(bucket.numel for bucket in bucket_specs(config, world, vocab_size=vocab_size).values())
    layer_bytes = 4 * numel // config.model.num_layers
    return sorted({piece_of(layer_bytes, n) for n in PIECES_A_LAYER})


def _walked(config: PretrainConfig, plan: Plan, world: int, *, vocab_size: int, network: Network) -> Rung | None:
    step = PricedStep(config, world, plan, vocab_size=vocab_size)
    if not fits_in(config.cluster, step.state_bytes) or not fits_in(config.cluster, step.peak[0]):
        return None
    timeline = step.walk(network)
    found = summary(timeline.events(0), {})
    exposed_s = {name: traffic.exposed_s for name, traffic in found.traffic.items()}
    return Rung(plan, timeline.step_s, found.compute_s, exposed_s)


def _bounds(config: PretrainConfig, world: int, *, vocab_size: int, network: Network) -> tuple[float, float]:
    """What the device computes, and what the busiest link carries of all ranks, with whole micro-batches and buckets."""
    step = PricedStep(config, world, EAGER, vocab_size=vocab_size)
    program, sizes, ranks = step.program, step.sizes, step.ranks_of
    starts = [s for s in program if s.kind is Kind.START and len(ranks(s.axis, 0)) > 1]
    loads = FoldedLoads(network, world, ranks, dict.fromkeys((s.axis, sizes.collective(s)) for s in starts), slowest=True)
    carried = sum(
        load.bytes_on(len(loads.capacity_L)) * sizes.bytes_of(s)
        for s in starts
        for load in loads.of(s.axis, sizes.collective(s), ranks(s.axis, 0))
    )
    link_s = float((carried / loads.capacity_L).max()) if starts else 0.0
    return sum(map(step.seconds, program)), link_s
