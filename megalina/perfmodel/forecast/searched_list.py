"""The list that `strategy=search` would find for a configuration, in virtual time, without starting anything."""

from collections.abc import Callable
from dataclasses import dataclass

from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.network import network_for
from megalina.perfmodel.forecast.priced_step import PricedStep, Shared
from megalina.perfmodel.sim.list_clock import ListClock
from megalina.perfmodel.sim.list_search import Found, Start, search
from megalina.perfmodel.sim.memory import peak_of
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.virtual import uses_of
from megalina.plan_settings import plan_of
from megalina.step.candidates import to_search_from
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Program
from megalina.step.strategy import training_step
from megalina.validate_strategy import runs


@dataclass(frozen=True, slots=True)
class Job:
    """What a list is searched for.  `vocab_size`: before padding; `network`, `seconds`: None: those of the configuration's
    cluster."""

    config: PretrainConfig
    world: int
    vocab_size: int
    network: Network | None = None
    seconds: Callable[[Instruction], float] | None = None
    packing: int = 1

    def priced(self, plan: Plan, shared: Shared) -> PricedStep:
        network, seconds = self.network, self.seconds
        return PricedStep(
            self.config, self.world, plan, vocab_size=self.vocab_size, shared=shared, network=network, seconds=seconds
        )


def starts_of(job: Job, shared: Shared, *, deferred: bool = True) -> list[Start]:
    """The lists to begin with, of plans that the configuration can run, with their times where they place by them.  Without
    `deferred` only those in which no weights' gradients are deferred."""
    config, begun = job.config, plan_of(job.config.strategy, packing=1)
    plans = to_search_from(
        zero=bool(config.parallel.zero),
        piece_bytes=begun.piece_bytes,
        packing=job.packing,
        newton_schulz_after=begun.newton_schulz_after,
    )
    plans = [plan for plan in plans if deferred or not plan.places_weights]
    settings = (job.priced(plan, shared).setting for plan in plans if runs(config, plan, job.world))
    return [Start(setting.plan, training_step(setting.plan.strategy, setting)) for setting in settings]


def clock_of(job: Job, shared: Shared) -> Callable[[Program], ListClock]:
    """A program -> its clock."""
    step = job.priced(Plan("eager", packing=job.packing), shared)
    network = job.network or network_for(job.config)

    def of(program: Program) -> ListClock:
        loads = shared.folded(network, step.held.axes, uses_of(program, step.sizes))
        return ListClock(program, seconds=step.seconds, sizes=step.sizes, loads=loads, ranks_of=step.ranks_of)

    return of


def searched_list(job: Job, *, evaluations: int, most_mb: float = 0.0, seed: int = 0, deferred: bool = True) -> Found:
    """`most_mb`: MiB that a list may hold beyond eager's; 0: no limit.  ValueError where the cluster's file lacks figures."""
    shared = Shared()
    eager = job.priced(Plan("eager", packing=job.packing), shared)
    most_bytes = peak_of(eager.held, eager.program)[0] + most_mb * 2**20
    fits = (lambda program: peak_of(eager.held, program)[0] <= most_bytes) if most_mb else None
    return search(starts_of(job, shared, deferred=deferred), clock_of(job, shared), evaluations=evaluations, seed=seed, fits=fits)
