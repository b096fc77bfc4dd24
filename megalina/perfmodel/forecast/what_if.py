"""What if: memory of a layout by recompute mode and by skew of the routing, and the smallest change that makes it fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import fits_in
from megalina.perfmodel.forecast.priced_step import PricedStep, Shared
from megalina.perfmodel.forecast.search import RECOMPUTE, Candidate, accepted, divisors, with_recompute
from megalina.plan_settings import strategy_of
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Op, Program

MOST_NODES = 64  # times as many: further is no small change


@dataclass(frozen=True, slots=True)
class UnderLoad:
    """What the busiest rank holds where it gets `load` times the mean's rows.  Bytes."""

    load: float
    peaks: Mapping[str, int]  # by recompute mode
    sent: int  # rows of the largest all-to-all that leave ...
    received: int  # ... and that come


def under_loads(
    config: PretrainConfig, plan: Plan, world: int, loads: Sequence[float], *, vocab_size: int, shared: Shared
) -> list[UnderLoad]:
    """For each load.  ValueError for one that is none."""
    out = []
    for load in loads:
        peaks, sent, received = {}, 0, 0
        for mode in RECOMPUTE:
            changed = with_recompute(config, mode)
            step = PricedStep(changed, world, plan, vocab_size=vocab_size, load=load, shared=shared)
            program, (peaks[mode], _) = step.list_for_memory, step.peak
            arrivals = {s.reads[0]: s for s in program if s.kind is Kind.WAIT}
            for start in _token_starts(program):
                arrival = arrivals[start.writes[0]]
                sent = max(sent, step.held.value(start.reads[0], start))
                received = max(received, step.held.value(arrival.writes[0], arrival))
        out.append(UnderLoad(load, peaks, sent, received))
    return out


def fits_under(found: Candidate, load: float, world: int, *, vocab_size: int, shared: Shared) -> bool:
    """Whether a candidate fits as it is where the busiest rank has so many times the mean's rows."""
    step = PricedStep(found.config, world, found.plan, vocab_size=vocab_size, load=load, shared=shared)
    return fits_in(found.config.cluster, step.peak[0])


def what_fits(config: PretrainConfig, plan: Plan, world: int, *, vocab_size: int) -> tuple[str, ...]:
    """The overrides of the smallest change with which this plan fits and the trainer's checks agree: more recompute, ZeRO-1,
    smaller micro-batches, experts over more ranks; then more nodes, with as much more of a batch.  (): none that was tried."""
    config, shared = replace(config, strategy=strategy_of(plan, config.strategy)), Shared()
    for words, changed, ranks in _changes(config, world):
        if not accepted(changed, ranks):
            continue
        step = PricedStep(changed, ranks, plan, vocab_size=vocab_size, shared=shared)
        if fits_in(changed.cluster, step.state_bytes) and fits_in(changed.cluster, step.peak[0]):
            return words
    return ()


def _changes(config: PretrainConfig, world: int) -> Iterator[tuple[tuple[str, ...], PretrainConfig, int]]:
    """Overrides, what they make of the configuration, and how many ranks there are then."""
    train, parallel, nodes = config.train, config.parallel, max(1, config.cluster.nodes)
    factors = [2**i for i in range(MOST_NODES.bit_length())]
    experts_over = [ep for ep in divisors(config.model.num_experts) if ep >= parallel.ep]
    micros = [m for m in reversed(divisors(train.micro_batch_size)) if m <= train.micro_batch_size]
    for more in factors:
        for ep in experts_over:
            for micro in micros:
                for zero in range(parallel.zero, 2):
                    for mode in RECOMPUTE[RECOMPUTE.index(train.recompute) :]:
                        batch = train.global_batch_size * more
                        words = (
                            (more > 1, f"nodes={nodes * more}"),
                            (more > 1, f"train.global_batch_size={batch}"),
                            (ep != parallel.ep, f"parallel.ep={ep}"),
                            (micro != train.micro_batch_size, f"train.micro_batch_size={micro}"),
                            (zero != parallel.zero, f"parallel.zero={zero}"),
                            (mode != train.recompute, f"train.recompute={mode}"),
                        )
                        changed = replace(
                            config,
                            train=replace(train, global_batch_size=batch, micro_batch_size=micro, recompute=mode),
                            parallel=replace(parallel, ep=ep, zero=zero),
                        )
                        yield tuple(word for changes, word in words if changes), changed, world * more


def _token_starts(program: Program) -> Iterator[Instruction]:
    return (s for s in program if s.op is Op.TOKENS and s.kind is Kind.START)
