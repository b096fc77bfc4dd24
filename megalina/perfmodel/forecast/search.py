"""A search: which layout, recompute mode, micro-batch and strategy is fastest of those that fit.

Two rounds.  The first walks every layout that the trainer would accept under `eager`, with as little recomputed as fits; the
second walks the fastest of them under every strategy.  What fits is known before anything is walked in time.

What if: memory of a layout by recompute mode and by skew of the routing, and the smallest change that makes it fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megalina.config import BYTES, ParallelConfig, PretrainConfig, StrategyConfig, training_layers
from megalina.perfmodel.cost.instruction_bytes import bucket_specs
from megalina.perfmodel.forecast.forecast import Forecast, fits_in, forecast_of
from megalina.perfmodel.forecast.pipeline_search import PipelineSearch, finalists, pipelines_of
from megalina.perfmodel.forecast.priced_pipeline import micro_batches_of, priced, shortened, walked_number
from megalina.perfmodel.forecast.priced_step import Shared
from megalina.plan_settings import overrides_of, plan_of, strategy_of
from megalina.step.candidates import EAGER, OF_A_LAYOUT, piece_of
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Program
from megalina.validate import check_config
from megalina.validate_strategy import runs

RECOMPUTE = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 4, 8, 16)
FINALISTS = 8  # layouts that go to the second round
PIPED_FINALISTS = 3  # pipelines that are priced as whole lists
PIPED_MICRO_BATCH = 4  # at most: pipelines live on many micro-batches
PIPED_LAYERS = 400  # over all micro-batches that are walked: larger pipelines take long, and have no other strategies tried
PIECES_A_LAYER = 8
CONTEXTS = ("all_gather", "all_to_all")  # parallel.cp_kind
LEAST_TOKENS = 4096  # of a sequence that a rank keeps where the search cuts some
MOST_NODES = 64  # times as many: further is no small change


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration that the trainer would accept, and what comes of it."""

    config: PretrainConfig
    plan: Plan
    memory_bytes: int
    found: Forecast | None  # None: it doesn't fit, and was not walked in time

    @property
    def fits(self) -> bool:
        return self.found is not None

    def overrides(self) -> tuple[str, ...]:
        """What differs from the configuration that the search began with may differ in these alone."""
        train, parallel = self.config.train, self.config.parallel
        return (
            f"parallel.tp={parallel.tp}",
            f"parallel.ep={parallel.ep}",
            *(pipeline_words(self.config) if parallel.pp > 1 else ()),
            *([f"parallel.cp={parallel.cp}", f"parallel.cp_kind={parallel.cp_kind}"] if parallel.cp > 1 else []),
            f"parallel.zero={parallel.zero}",
            f"train.micro_batch_size={train.micro_batch_size}",
            f"train.recompute={train.recompute}",
            *overrides_of(self.plan),
        )


def pipeline_words(config: PretrainConfig) -> tuple[str, ...]:
    """How a configuration is pipelined, as overrides."""
    parallel = config.parallel
    layout = (f"parallel.pp_layout='{parallel.pp_layout}'",) if parallel.pp_layout else ()
    words = (f"parallel.pp={parallel.pp}", f"parallel.pp_chunks={parallel.pp_chunks}", *layout)
    return (*words, f"strategy.pipeline={config.strategy.pipeline}")


def search(
    config: PretrainConfig,
    world: int,
    *,
    vocab_size: int,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    shared: Shared | None = None,
) -> list[Candidate]:
    """All candidates, the fastest first; those that don't fit last, the smallest first.

    ValueError where no layout is accepted, with what the checks said of the configuration as it is."""
    config = without_pipelines(config)
    layouts = [c for c in layouts_of(config, world) if accepted(c, world)]
    shared, first = shared or Shared(), []
    piped = _pipelines(config, world, vocab_size=vocab_size, progress=progress, shared=shared)
    if not layouts and not piped:
        check_config(config, world)
        raise ValueError(f"no layout of {world} ranks is accepted with train.global_batch_size={config.train.global_batch_size}")
    for number, layout in enumerate(layouts):
        progress(number, len(layouts), "layouts")
        for mode in RECOMPUTE:
            first.append(candidate(with_recompute(layout, mode), EAGER, world, vocab_size=vocab_size, shared=shared))
            if first[-1].fits:
                break  # recomputing more only saves memory
    finalists = [c for c in ordered(first)[:FINALISTS] if c.fits]
    pairs = [(c.config, plan) for c in finalists for plan in plans_of(c.config, world, vocab_size=vocab_size) if plan != EAGER]
    pairs.sort(key=lambda pair: repr((pair[0].parallel, pair[0].train.recompute, pair[1])))  # micro-batches share a list
    second = []
    for number, (layout, plan) in enumerate(pairs):
        progress(number, len(pairs), "strategies")
        second.append(candidate(layout, plan, world, vocab_size=vocab_size, shared=shared))
    return ordered([*first, *second, *piped])


def without_pipelines(config: PretrainConfig) -> PretrainConfig:
    plain = ParallelConfig()
    parallel = replace(config.parallel, pp=plain.pp, pp_chunks=plain.pp_chunks, pp_layout=plain.pp_layout)
    return replace(config, parallel=parallel, strategy=replace(config.strategy, pipeline=StrategyConfig().pipeline))


def _pipelines(
    config: PretrainConfig, world: int, *, vocab_size: int, progress: Callable[[int, int, str], None], shared: Shared
) -> list[Candidate]:
    """Candidates with pipelines: of the best by their cells whole lists; the fastest of these under every strategy, if its lists
    are no large ones; where none fits the smallest."""
    of_stages: dict[int, list[PretrainConfig]] = {}
    search, configs = PipelineSearch(world, vocab_size=vocab_size, shared=shared), []
    for piped in pipelines_of(config, world):
        ranks = world // piped.parallel.pp
        if ranks not in of_stages:  # a stage is to the checks what a world is without pipelines
            some = (c for c in layouts_of(config, ranks) if c.parallel.zero and c.train.micro_batch_size <= PIPED_MICRO_BATCH)
            of_stages[ranks] = [c for c in some if accepted(c, ranks)]
        for layout in of_stages[ranks]:
            parallel = replace(piped.parallel, tp=layout.parallel.tp, ep=layout.parallel.ep, cp=layout.parallel.cp)
            parallel = replace(parallel, cp_kind=layout.parallel.cp_kind)
            configs.append(replace(piped, parallel=parallel, train=layout.train))
    best, too_large = finalists(configs, search, modes=RECOMPUTE, progress=progress)
    found = list[Candidate]()
    for number, weighed in enumerate(best):
        if len(found) == PIPED_FINALISTS:
            break
        progress(number, PIPED_FINALISTS, "whole lists of pipelines")
        recut = search.recut(weighed)
        if not accepted(shortened(recut.config, world), world):
            continue
        one = candidate(recut.config, plan_of(recut.config.strategy), world, vocab_size=vocab_size, shared=shared)
        if one.fits:
            found.append(one)
    winner = ordered(found)[0].config if found else None
    layers = len(training_layers(config.model))
    if winner is not None and layers * walked_number(winner, micro_batches_of(winner, world)) <= PIPED_LAYERS:
        known = [c.plan for c in found if c.config.parallel == winner.parallel]
        plans = [plan for plan in plans_of(winner, world, vocab_size=vocab_size) if plan not in known]
        for number, plan in enumerate(plans):
            progress(number, len(plans), "strategies of the fastest pipeline")
            found.append(candidate(winner, plan, world, vocab_size=vocab_size, shared=shared))
    smallest = next((w for w in too_large if accepted(shortened(w.config, world), world)), None) if not found else None
    return (
        found
        if smallest is None
        else [Candidate(smallest.config, plan_of(smallest.config.strategy), int(smallest.memory_bytes), None)]
    )


def plans_of(config: PretrainConfig, world: int, *, vocab_size: int) -> list[Plan]:
    """Candidates, with pieces that suit the model, as far as this layout can run them."""
    buckets = bucket_specs(config, world, vocab_size=vocab_size).values()
    layer_bytes = sum(b.numel for b in buckets) * max(BYTES[config.train.dtype], 4) // len(training_layers(config.model))
    size = piece_of(layer_bytes, PIECES_A_LAYER)
    plans = [replace(plan, piece_bytes=size if plan.piece_bytes else 0) for plan in OF_A_LAYOUT]
    if config.parallel.pp > 1:  # whose lists are not of every strategy
        short = shortened(config, world)
        return [plan for plan in plans if accepted(replace(short, strategy=strategy_of(plan, config.strategy)), world)]
    return [plan for plan in plans if runs(config, plan, world)]


def layouts_of(config: PretrainConfig, world: int) -> Iterator[PretrainConfig]:
    """Every combination of tp, ep, cp, ZeRO and micro-batch, accepted or not, under a plain strategy."""
    plain, contexts = strategy_of(EAGER, config.strategy), contexts_of(config, world)
    for tp in divisors(min(world, config.cluster.ranks_per_node or world)):
        for ep in divisors(config.model.num_experts):
            for (cp, cp_kind), zero in product(contexts, (0, 1)):
                for micro in MICRO_BATCHES:
                    parallel = replace(config.parallel, tp=tp, ep=ep, cp=cp, cp_kind=cp_kind, zero=zero)
                    train = replace(config.train, micro_batch_size=micro)
                    yield replace(config, parallel=parallel, train=train, strategy=plain)


def contexts_of(config: PretrainConfig, world: int) -> list[tuple[int, str]]:
    """(parallel.cp, parallel.cp_kind): the configuration's, and both kinds where each rank keeps many tokens of a sequence."""
    parallel, length = config.parallel, config.train.seq_len
    cut = [cp for cp in divisors(world) if cp > 1 and length // cp >= LEAST_TOKENS]
    return list(dict.fromkeys([(parallel.cp, parallel.cp_kind), *product(cut, CONTEXTS)]))


def with_recompute(config: PretrainConfig, mode: str) -> PretrainConfig:
    return replace(config, train=replace(config.train, recompute=mode))


def accepted(config: PretrainConfig, world: int) -> bool:
    """Whether the trainer's own checks accept it."""
    try:
        check_config(config, world)
    except ValueError:
        return False
    return True


def candidate(config: PretrainConfig, plan: Plan, world: int, *, vocab_size: int, shared: Shared | None = None) -> Candidate:
    """Walked in time if it fits."""
    config = replace(config, strategy=strategy_of(plan, config.strategy))
    step = priced(config, world, plan, vocab_size=vocab_size, shared=shared)
    if not fits_in(config.cluster, step.state_bytes):
        return Candidate(config, plan, step.state_bytes, None)
    peak_bytes, _ = step.peak
    return Candidate(config, plan, peak_bytes, forecast_of(step) if fits_in(config.cluster, peak_bytes) else None)


def ordered(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (not c.fits, c.found.step_s if c.found else c.memory_bytes))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


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
            step = priced(changed, world, plan, vocab_size=vocab_size, load=load, shared=shared)
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
    step = priced(found.config, world, found.plan, vocab_size=vocab_size, load=load, shared=shared)
    return fits_in(found.config.cluster, step.peak[0])


def what_fits(config: PretrainConfig, plan: Plan, world: int, *, vocab_size: int) -> tuple[str, ...]:
    """The overrides of the smallest change with which this plan fits and the trainer's checks agree: more recompute, ZeRO-1,
    smaller micro-batches, experts over more ranks; then more nodes, with as much more of a batch.  (): none that was tried."""
    config, shared = replace(config, strategy=strategy_of(plan, config.strategy)), Shared()
    for words, changed, ranks in _changes(config, world):
        if not accepted(shortened(changed, ranks) if changed.parallel.pp > 1 else changed, ranks):
            continue
        if changed.parallel.pp > 1:  # by its cells first: whole lists take their time
            weighed = PipelineSearch(ranks, vocab_size=vocab_size, shared=shared).weighed(changed)
            if weighed is None or not weighed.fits:
                continue
        step = priced(changed, ranks, plan, vocab_size=vocab_size, shared=shared)
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
    return (s for s in program if s.carries_tokens and s.kind is Kind.START)
