"""A step of ranks that differ: one device is slower, or one place of each expert-parallel group gets more rows than the others.

All ranks walk, for all wait for the slow one.  A forecast of ranks that are alike lets one of them walk for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_seconds import instruction_seconds
from megalina.perfmodel.forecast.forecast import WALKED, Forecast, Walked, walked_rounds
from megalina.perfmodel.forecast.network import network_for
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.perfmodel.sim.collectives import Floats
from megalina.perfmodel.sim.memory import memory_of
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import Timeline, simulate
from megalina.step.program import Instruction, Kind, Op, Program
from megalina.timeline.contention import summary

MOST_RANKS = 256  # that walk one by one; each takes as long as a whole forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class Unevenness:
    """`slow_rank` takes `slow_factor` times as long for all that it computes (-1: no rank does).  The first rank of each
    expert-parallel group gets `busiest_load` times the mean of its group's rows; the others share the rest."""

    slow_rank: int = -1
    slow_factor: float = 1.0
    busiest_load: float = 1.0

    @property
    def all_alike(self) -> bool:
        return self.busiest_load == 1.0 and (self.slow_rank < 0 or self.slow_factor == 1.0)

    def check(self, world: int) -> None:
        """ValueError for what no rank can be, and for more ranks than can walk."""
        if not -1 <= self.slow_rank < world:
            raise ValueError(f"simulate.slow_rank={self.slow_rank}: there are ranks 0 to {world - 1}; -1: none is slow")
        if not 0 < self.slow_factor < 1e6:
            raise ValueError(
                f"simulate.slow_factor={self.slow_factor:g} must be above 0 (2: it takes twice as long) and below 1e6"
            )
        if self.slow_factor != 1.0 and self.slow_rank < 0:
            raise ValueError(f"simulate.slow_factor={self.slow_factor:g} belongs to no rank: give simulate.slow_rank=N")
        if not self.busiest_load >= 1:
            raise ValueError(f"simulate.busiest_load={self.busiest_load:g} is below the mean: give 1 (even) or more")
        if not self.all_alike and world > MOST_RANKS:
            raise ValueError(
                f"simulate.slow_rank and simulate.busiest_load walk every rank, at most {MOST_RANKS}, and there are {world}: "
                "take fewer cluster.nodes, or leave them out"
            )

    def load(self, rank: int, ep_ranks: tuple[int, ...]) -> float:
        """Rows of its experts over the mean."""
        return float(self.share_N(len(ep_ranks))[ep_ranks.index(rank)] * len(ep_ranks))

    def share_N(self, ranks: int) -> Floats:
        """Of a group's rows, by place.  ValueError where the busiest would get more than all."""
        if self.busiest_load > ranks:
            raise ValueError(
                f"simulate.busiest_load={self.busiest_load:g}: a group of {ranks} ranks has {ranks} times the mean in "
                "all: lower it, or raise parallel.ep"
            )
        rest = (ranks - self.busiest_load) / (ranks - 1) if ranks > 1 else 1.0
        return np.array([self.busiest_load, *[rest] * (ranks - 1)]) / ranks


def forecast_unevenly(config: PretrainConfig, even: Forecast, world: int, *, vocab_size: int, unevenness: Unevenness) -> Forecast:
    """`even`, the forecast of ranks that are alike, with the times of ranks that aren't and the memory of the busiest.

    Seconds computed and waited are means over the ranks."""
    step = PricedStep(config, world, even.plan, vocab_size=vocab_size)
    programs = [step.listed(rounds) for rounds in walked_rounds(step.rounds)]
    timelines = [_timeline(step, program, unevenness) for program in programs]
    walked = [_mean(timeline, world) for timeline in timelines]
    busiest = PricedStep(config, world, even.plan, vocab_size=vocab_size, load=unevenness.busiest_load)
    return replace(
        even,
        walked=walked[0] if len(walked) == 1 else walked[1].longer(walked[0], step.rounds - WALKED),
        timeline=timelines[-1],
        memory=memory_of(busiest.held, programs[-1]),
    )


def _timeline(step: PricedStep, program: Program, unevenness: Unevenness) -> Timeline:
    world, ranks = step.world, step.ranks_of
    load_R = [unevenness.load(rank, ranks("ep", rank)) for rank in range(world)]
    by_load = {load: instruction_seconds(step.config, step.work, load=load) for load in set(load_R)}

    def seconds(rank: int, instruction: Instruction) -> float:
        slower = unevenness.slow_factor if rank == unevenness.slow_rank and instruction.kind is Kind.COMPUTE else 1.0
        return by_load[load_R[rank]](instruction) * slower

    sizes, network = step.sizes, network_for(step.config, step.plan.packing)
    if unevenness.busiest_load != 1.0:
        sizes = replace(sizes, matrix_of=matrix_of(sizes, unevenness))
    return simulate([program] * world, ranks_of=ranks, seconds=seconds, network=network, sizes=sizes)


def matrix_of(sizes: Sizes, unevenness: Unevenness) -> Callable[[Instruction, tuple[int, ...]], Floats | None]:
    """Every rank's own tokens are as many as ever; more of them go to the busiest rank's experts, and come back from there."""

    def of(instruction: Instruction, ranks: tuple[int, ...]) -> Floats | None:
        if instruction.op is not Op.TOKENS or len(ranks) == 1:
            return None
        sent_N = sizes.bytes_of(instruction) * unevenness.share_N(len(ranks))
        sent_NN = np.tile(sent_N, (len(ranks), 1))
        return sent_NN if instruction.outward else sent_NN.T

    return of


def _mean(timeline: Timeline, world: int) -> Walked:
    found = [summary(timeline.events(rank), {}) for rank in range(world)]
    exposed_s = {name: sum(f.traffic[name].exposed_s for f in found) / world for name in found[0].traffic}
    return Walked(timeline.step_s, sum(f.compute_s for f in found) / world, exposed_s)
