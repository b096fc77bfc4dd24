"""`strategy=search`, and the end of `strategy=auto`: measure a few steps, search a list in virtual time, walk it from then on.

Two plans are measured: the one that the run follows, and one in parts with deferred weights, so that costs are known of both.
Two networks are fitted to these steps (`fitted_network`), and a search is made in each: on two ranks at the same time, and on
more of them from other seeds, where there are cores for it.  They send what they have found to all others, so that all have the
same lists whatever their machines make of the last digits.  Virtual time is off by more than the best lists of several plans
differ by; so their steps are measured, too.  With these, networks are fitted anew and searched once more.  The fastest plans are
measured again, and that whose steps were shortest is kept, with its order.
"""

import logging
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.distributed as dist

from megalina.config import PretrainConfig
from megalina.layout import ranks_of
from megalina.mesh import Mesh, all_gather_object
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.sim.fitted_network import fitted
from megalina.perfmodel.sim.folding import FoldedLoads, Use
from megalina.perfmodel.sim.list_clock import ListClock
from megalina.perfmodel.sim.list_search import Found, Start, first_of, search
from megalina.perfmodel.sim.memory import peak_of
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.virtual import uses_of
from megalina.plan_settings import AUTO
from megalina.step.candidates import FLOW, LANCET, to_search_from
from megalina.step.order import order_of
from megalina.step.plan import Plan
from megalina.step.program import Program
from megalina.step.strategy import Setting, training_step
from megalina.timeline.recorder import Event
from megalina.train.measured_costs import MeasuredCosts, Sample, sample_of
from megalina.validate_strategy import runs

logger = logging.getLogger("megalina")
WARM_UP = 2  # steps of a process that are not measured
SETTLE = 1  # step after another plan that is not measured
STEPS = 3  # that a plan is measured over
SEARCHES = 2
FINALS = 3  # plans, the fastest ones, that are measured once more at the end: few steps flatter one of many
MOST_SEARCHERS = 8  # ranks that search at the same time
FINALISTS = (1, 2)  # lists that are measured of those that a search has found: in the first network, in the second
NO_WIRE_BYTES_PER_S = 1e15  # where nothing was sent
AUTO_INSTRUCTIONS = 20_000_000  # auto: that its search walks over, half a minute each time; the lists of large models are long
FEWEST_EVALUATIONS = 300  # auto: a search of fewer would hardly leave its starts
FITTED_LISTS = 4  # of those measured, the fastest ones: networks are fitted to them
FITTED_INSTRUCTIONS = 1_000_000  # that are walked for it: ten seconds or two
FITTED_RANKS = 25_600  # in all walks together: folding many ranks takes its time, too
OF_LIBRARY = {  # how many of an axis it carries at a time, and what shares a link evenly
    "gloo": {"at_once": 2, "share": "flow"},  # two threads a group; TCP
    "nccl": {"at_once": 1, "share": "collective"},  # one stream a communicator; channels that keep pace
}


Told = tuple[int, int, list[tuple[dict[str, Any], float]]]  # network, walks in it, plans of lists as JSON with their seconds


class ListSearch:
    """All ranks call it alike.  `adopt(plan)`: from the next step on; `trainable()`: that of now; `others()`: plans, of another
    packing say, with which all is done once more, as what their lists have to give is not known before."""

    def __init__(
        self,
        config: PretrainConfig,
        mesh: Mesh,
        adopt: Callable[[Plan], object],
        trainable: Callable[[], Trainable],
        *,
        vocab_size: int,
        ranks_per_node: int,
        others: Callable[[], Sequence[Plan]] = tuple,
        done: bool = False,
    ):
        self._config, self._mesh, self._adopt, self._trainable, self._vocab_size = config, mesh, adopt, trainable, vocab_size
        self._ranks_per_node, self._others = ranks_per_node, others
        self.searches = 0  # that have come to an end
        self.evidence = ""
        self.begin()
        self.done = done  # a plan was chosen

    def begin(self) -> None:
        """Search, or search again."""
        self.done = False
        self._to_wait = WARM_UP
        self._steps: list[Sequence[Event]] = []
        self._measured: dict[Plan, list[float]] = {}  # seconds a step of the slowest rank, each time that it was measured
        self._to_begin_with: list[Plan] | None = None  # other plans; None: not asked yet
        self._searches: list[str] = []  # in words
        self._finals: list[Plan] | None = None  # yet to be measured again; None: not there yet
        self._begin_with()

    def _begin_with(self) -> None:
        self._walked: list[Plan] = []  # that were measured of those that this search is of
        self._costs: MeasuredCosts | None = None
        self._to_measure: list[Plan] = []
        self._searched = 0

    def decided(self, plan: Plan) -> bool:
        return self.done

    def measuring(self, plan: Plan) -> bool:
        """Whether the next step must be recorded."""
        return not self.done and self._to_wait == 0

    def after(self, step: int, events: Callable[[], Sequence[Event]], plan: Plan) -> None:
        """Between two steps; `events` of `step`, which was a step of `plan`."""
        if self.done:
            return
        if not self._measured and evaluations_of(self._config, self._trainable().program) == 0:  # the same on all ranks
            self.done = True
            return
        if self._to_wait:
            self._to_wait -= 1
            return
        self._steps.append(events())
        if len(self._steps) < STEPS:
            return
        trainable = self._trainable()
        own = sample_of(self._steps, trainable.program, partial(_places, trainable.mesh))
        everywhere = all_gather_object(self._mesh, own)
        self._steps, self._to_wait = [], SETTLE
        self._measured.setdefault(plan, []).append(max(sample.step_s for sample in everywhere))
        if self._finals is None:
            self._walked.append(plan)
            self._learn(everywhere)
            self._go_on()
        if self._finals:
            self._adopt(self._finals.pop(0))
        elif self._finals is not None:
            self._choose(step)

    def _go_on(self) -> None:
        """To what is measured next, or to the finals."""
        plan = self._walked[-1]
        if len(self._walked) == 1 and (second := self._second(plan)) != plan:
            self._to_measure = [second]
        elif not self._to_measure and self._searched < SEARCHES:
            self._to_measure = self._search()
        if self._to_begin_with is None:
            self._to_begin_with = list(self._others())
        if self._to_measure:
            self._adopt(self._to_measure.pop(0))
        elif self._to_begin_with:
            self._begin_with()
            self._adopt(self._to_begin_with.pop(0))
        else:
            self._finals = sorted(self._measured, key=lambda p: min(self._measured[p]))[:FINALS]

    def _learn(self, everywhere: Sequence[Sample]) -> None:
        if self._costs is None:
            trainable = self._trainable()
            weight_bytes = next(iter(trainable.buckets.values())).param.element_size()
            self._costs = MeasuredCosts(trainable.setting.element_bytes, weight_bytes)
        self._costs.add(everywhere, self._trainable().program)

    def _second(self, plan: Plan) -> Plan:
        """What else is measured: parts, and weights' gradients by themselves."""
        wanted = [replace(FLOW, deferred_weights="all"), LANCET]
        wanted = [replace(p, packing=plan.packing, piece_bytes=plan.piece_bytes) for p in wanted]
        return next((p for p in wanted if runs(self._config, p, self._mesh.world.size)), plan)

    def _search(self) -> list[Plan]:
        """What is to be measured; nothing where only what was measured is found again."""
        rank = self._mesh.world.rank
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        searchers = with_own_cores(all_gather_object(self._mesh, (platform.node(), cores)))
        own: list[Told] = []
        if rank in searchers:
            costs, per_node = self._costs, self._ranks_per_node
            share = Share(searchers.index(rank), len(searchers))
            found = found_lists(self._config, self._trainable(), self._walked, costs, self._vocab_size, per_node, share)
            own = [(n, one.evaluations, [(f.plan.as_json(), f.step_s) for f in one.finalists]) for n, one in found.items()]
        told = [one for of_rank in all_gather_object(self._mesh, own) for one in of_rank]
        best_s = min(step_s for *_, lists in told for _, step_s in lists)
        self._searched += 1
        self._searches.append(f"{sum(walks for _, walks, _ in told)} steps in virtual time, the best {best_s * 1e3:.1f} ms")
        if rank == 0:
            logger.info("search of lists: %s", self._searches[-1])
        return [plan for plan in best_plans(told) if plan not in self._walked]

    def _choose(self, step: int) -> None:
        typical_s = {plan: statistics.fmean(times_s) for plan, times_s in self._measured.items() if len(times_s) > 1}
        best = min(typical_s, key=typical_s.__getitem__)
        if best != self._trainable().plan:
            self._adopt(best)
        if not best.order:  # written down, so that a run that takes it need not search
            best = replace(best, order=order_of(self._trainable().program))
            self._adopt(best)
        tried = "; ".join(
            f"{' and '.join(f'{s * 1e3:.1f}' for s in times_s)} ms {plan}"
            for plan, times_s in sorted(self._measured.items(), key=lambda item: min(item[1]))
        )
        self.done, self.searches = True, self.searches + 1
        words = f"{'; '.join(self._searches)}; measured over {STEPS} steps, slowest rank: {tried}"
        self.evidence = f"plan from step {step + 1} on: {best} ({words})"
        if self._mesh.world.rank == 0:
            logger.info("%s", self.evidence)


def with_own_cores(cores_of: Sequence[tuple[str, Sequence[int]]]) -> list[int]:
    """The first ranks that can all have a core of their own, of each rank's machine and cores.  A machine may have many ranks, an
    emulated cluster has all of them on one."""
    taken: set[tuple[str, int]] = set()
    ranks: list[int] = []
    for rank, (machine, cores) in enumerate(cores_of):
        free = next((core for core in cores if (machine, core) not in taken), None)
        if free is not None and len(ranks) < MOST_SEARCHERS:
            taken.add((machine, free))
            ranks.append(rank)
    return ranks


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several ranks searches."""

    searcher: int
    searchers: int

    def networks(self, number: int) -> Sequence[int]:
        """One of so many; all of them where there are fewer ranks."""
        return range(number) if self.searchers < number else [self.searcher % number]

    def seed(self, number: int) -> int:
        """Those that search in the same of so many networks have other ones."""
        return self.searcher // number if self.searchers >= number else 0


def best_plans(told: Sequence[Told]) -> list[Plan]:
    """Of each network as many lists as one search would give, the best of all ranks."""
    plans: dict[Plan, None] = {}
    for network, number in enumerate(FINALISTS):
        found = [(Plan.from_json(values), s) for n, _, lists in told if n == network for values, s in lists]
        first = first_of(sorted(found, key=lambda one: one[1]), number, lambda one: one[0].parts)
        plans |= dict.fromkeys(plan for plan, _ in first)
    return list(plans)


def evaluations_of(config: PretrainConfig, program: Program) -> int:
    """Walks that the search may take; under auto at most as many as take some half a minute, and none where those are too few."""
    most = config.strategy.search_evaluations
    if config.strategy.name != AUTO:
        return most
    in_time = AUTO_INSTRUCTIONS // len(program)
    return min(most, in_time) if in_time >= FEWEST_EVALUATIONS else 0


def found_lists(
    config: PretrainConfig,
    trainable: Trainable,
    walked: Sequence[Plan],
    costs: MeasuredCosts | None,
    vocab_size: int,
    ranks_per_node: int,
    share: Share,
) -> dict[int, Found]:
    """What a search finds by these costs, in each network of this rank's share; by the network's number.  No rank is asked
    anything.  `walked`: plans that were measured, the run's own first; under auto a list holds no more than one of them did, if
    `search_mb` says nothing else."""
    assert costs is not None
    mesh, setting, begun, more_mb = trainable.mesh, trainable.setting, walked[0], config.strategy.search_mb
    world, packing = mesh.world.size, begun.packing
    plans = to_search_from(
        zero=bool(config.parallel.zero),
        piece_bytes=begun.piece_bytes,
        packing=packing,
        newton_schulz_after=begun.newton_schulz_after,
    )
    settings = [setting.under(plan) for plan in plans if runs(config, plan, world)]
    per_node = ranks_per_node if mesh.sums_by_node else 0
    held = InstructionBytes(config, world, vocab_size=vocab_size, packing=packing, ranks_per_node=per_node)
    before = [training_step(plan.strategy, setting.under(plan)) for plan in walked]
    held_bytes = [peak_of(held, program)[0] for program in before]
    most_bytes = held_bytes[0] + more_mb * 2**20 if more_mb else max(held_bytes)

    def fits(program: Program) -> bool:
        return peak_of(held, program)[0] <= most_bytes

    clock_of = clocks(mesh.shape, world, setting, costs, by_node=mesh.sums_by_node, tokens_by_node=mesh.ep.nodes is not None)
    fitting = fitted(
        sorted(costs.seen, key=lambda seen: seen.step_s)[:FITTED_LISTS],
        networks(costs, dist.get_backend(mesh.world.group) if world > 1 else "gloo", world, ranks_per_node),
        lambda network, program: clock_of(network)(program),
        walks=min(FITTED_INSTRUCTIONS // len(before[0]), FITTED_RANKS // world, evaluations_of(config, before[0])),
    )
    starts = [Start(replace(plan, order=()), program) for plan, program in zip(walked, before, strict=True)]
    starts += [Start(s.plan, training_step(s.plan.strategy, s)) for s in settings]

    own = share.networks(len(fitting))
    return {
        number: search(
            starts,
            clock_of(fitting[number]),
            evaluations=evaluations_of(config, before[0]) // len(own),
            seed=config.train.seed + share.seed(len(fitting)),
            fits=fits if more_mb or config.strategy.name == AUTO else None,
            finalists=FINALISTS[number],
        )
        for number in own
    }


def networks(costs: MeasuredCosts, backend: str, world: int, ranks_per_node: int) -> list[Network]:
    """What the ranks may be joined by: a card for each node, or one for each rank; what is inside a node takes no time."""
    rate = 1.0 / costs.s_per_byte if costs.s_per_byte else NO_WIRE_BYTES_PER_S
    nodes = -(-world // ranks_per_node)
    per_node = ranks_per_node if nodes > 1 else 1  # all on one node: each rank has what it reaches others by
    library = OF_LIBRARY["nccl" if backend == "nccl" else "gloo"]
    one = Network(nic_bytes_per_s=rate, ranks_per_node=per_node, latency_s=costs.latency_s, reduce_scatter="direct", **library)  # type: ignore[arg-type]
    return [one] if per_node == 1 else [one, replace(one, nics_per_node=per_node)]


def _places(mesh: Mesh, axis: str) -> int:
    """Among which an exchange along this axis parts its bytes: ranks, or nodes where rows go once to each."""
    along = mesh.axis(axis)
    return len(along.nodes.grid) if axis == "ep" and along.nodes is not None else along.size


def clocks(
    shape: Mapping[str, int],
    world: int,
    setting: Setting,
    costs: MeasuredCosts,
    *,
    by_node: bool = False,
    tokens_by_node: bool = False,
) -> Callable[[Network], Callable[[Program], ListClock]]:
    """A network -> a program -> its clock, by these costs.  `by_node`, `tokens_by_node`: as of `Sizes`."""
    sizes = costs.sizes_of(
        [name for name, spec in setting.buckets.items() if spec.sharded], by_node=by_node, tokens_by_node=tokens_by_node
    )
    groups = ranks_of(shape)

    def under(network: Network) -> Callable[[Program], ListClock]:
        known: dict[tuple[Use, ...], FoldedLoads] = {}

        def of(program: Program) -> ListClock:
            uses = uses_of(program, sizes)
            if uses not in known:
                known[uses] = FoldedLoads(network, world, groups, uses, slowest=True)
            return ListClock(program, seconds=costs.seconds, sizes=sizes, loads=known[uses], ranks_of=groups)

        return of

    return under
