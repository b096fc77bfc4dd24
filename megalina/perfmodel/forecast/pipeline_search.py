"""A search among pipelines: how many stages, in how many chunks, by which schedule, beside all else that a layout has.

Three rounds, since the lists of a large pipeline have some hundred thousand instructions.  All layouts are weighed by formulas:
what the busiest rank computes and waits for in its cells, and the schedule's bubble.  Of the best ones the cells of all ranks are
walked (`megalina.step.pipeline.walk`), with what each stage takes (`layer_costs.py`).  The few that win there are priced as
whole lists, as every forecast is.  What a rank holds is counted alike: its state, and what its cells keep.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megalina.blocks.dispatch import on_cuda
from megalina.blocks.model import step_shape
from megalina.blocks.pipelined import layers_in_stages, schedule_of
from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.forecast.forecast import fits_in
from megalina.perfmodel.forecast.layer_costs import BEFORE, BEHIND, LayerBytes, LayerCosts, LayerSeconds
from megalina.perfmodel.forecast.network import network_for
from megalina.perfmodel.forecast.priced_pipeline import micro_batches_of, walked_number
from megalina.perfmodel.forecast.priced_step import Shared, nodes_that_sum
from megalina.plan_settings import strategy_of
from megalina.step.candidates import EAGER, PAIR
from megalina.step.forward import plain
from megalina.step.pipeline.cell import Cell, Entry, Pipeline, Work
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.stages import StageLayers, cut, layout_of
from megalina.step.pipeline.walk import Times, walk

SCHEDULES = (  # with chunks, and how cells are filled
    *(("1f1b", 1, EAGER), ("interleaved", 2, EAGER), ("interleaved", 4, EAGER), ("zb_h1", 1, EAGER), ("zbv", 2, EAGER)),
    *(("1f1b", 1, PAIR), ("interleaved", 2, PAIR), ("dualpipev", 2, PAIR)),
)
MOST_RANKS = 64  # of a pipeline
WALKED_CELLS = 24  # of the best by formulas, so many are walked cell by cell
WORTH_A_LAYOUT = 0.005  # of a step: for less the cut that the trainer makes by FLOPs stays


@dataclass(frozen=True, slots=True)
class CellTimes(Times):
    """Seconds of each stage's cells."""

    of_stage: tuple[LayerSeconds, ...] = ()

    def of_entry(self, entry: Entry, chunks: int) -> float:
        took_s = sum(self.of_stage[cell.stage].of(cell.work) for cell in entry)
        if len(entry) == 1:
            return took_s
        apart_s = sum(self.of_stage[cell.stage].whole for cell in entry)
        together_s = sum(self.of_stage[cell.stage].pair for cell in entry)
        return took_s * together_s / apart_s if apart_s else took_s


@dataclass(frozen=True, slots=True)
class Weighed:
    """A layout, weighed by formulas; `step_s` then by its cells."""

    config: PretrainConfig
    stages: tuple[StageLayers, ...]
    times: CellTimes  # empty where it doesn't fit
    held: tuple[LayerBytes, ...]  # of each stage; empty where the state alone is too much
    end_s: float
    memory_bytes: float  # of the rank that holds the most; where its state alone is too much only that
    step_s: float

    @property
    def of_state_alone(self) -> bool:
        return not self.held

    @property
    def fits(self) -> bool:
        return fits_in(self.config.cluster, self.memory_bytes)


@dataclass(slots=True)
class Lists:
    """Lists of cells, which many layouts have in common."""

    known: dict[tuple[str, int, int, int, bool], Pipeline | None] = field(default_factory=dict)

    def of(self, config: PretrainConfig, micro_batches: int) -> Pipeline | None:
        """Without messages; None: the schedule isn't made for so many micro-batches."""
        parallel, name = config.parallel, config.strategy.pipeline
        paired = config.strategy.name == PAIR.strategy
        key = name, parallel.pp, parallel.pp_chunks, micro_batches, paired
        if key not in self.known:
            try:
                size = Size(parallel.pp, parallel.pp_chunks, micro_batches, paired=paired)
                self.known[key] = schedule_of(name).pipeline(size)
            except ValueError:
                self.known[key] = None
        return self.known[key]


def pipelines_of(config: PretrainConfig, world: int) -> Iterator[PretrainConfig]:
    """The configuration with every number of pipeline ranks, chunks and schedule that its layers and batch allow, ZeRO-1 with
    each: it costs a pipeline nothing on the wire."""
    for ranks in (n for n in range(2, min(MOST_RANKS, world, config.model.num_layers) + 1) if world % n == 0):
        if ranks & (ranks - 1) and config.model.num_layers % ranks:
            continue
        for name, chunks, plan in SCHEDULES:
            if ranks * chunks <= config.model.num_layers:
                parallel = replace(config.parallel, pp=ranks, pp_chunks=chunks, pp_layout="", zero=1)
                strategy = replace(strategy_of(plan, config.strategy), pipeline=name)
                yield replace(config, parallel=parallel, strategy=strategy)


class PipelineSearch:
    """What is asked of many layouts is known once."""

    def __init__(self, world: int, *, vocab_size: int, shared: Shared):
        self.world, self.vocab_size, self.shared, self.lists = world, vocab_size, shared, Lists()
        self._cuts: dict[int, tuple[StageLayers, ...]] = {}
        self._costs: dict[object, LayerCosts] = {}
        self._uses: dict[bool, dict[int, set[str]]] = {}
        self._states: dict[object, list[int]] = {}
        self._held: dict[object, InstructionBytes] = {}

    def costs(self, config: PretrainConfig) -> LayerCosts:
        """Of its layout, micro-batch and recompute mode."""
        parallel, train = config.parallel, config.train
        key = (parallel.pp, parallel.tp, parallel.ep, parallel.cp, parallel.cp_kind, train.micro_batch_size, train.recompute)
        if key not in self._costs:
            self._costs[key] = LayerCosts(config, self.world, EAGER, vocab_size=self.vocab_size, shared=self.shared)
        return self._costs[key]

    def stages(self, config: PretrainConfig) -> tuple[StageLayers, ...]:
        """As the trainer cuts."""
        if config.parallel.pp_layout:
            return layers_in_stages(config, vocab_size=self.vocab_size)
        number = config.parallel.pp * config.parallel.pp_chunks
        if number not in self._cuts:
            self._cuts[number] = layers_in_stages(config, vocab_size=self.vocab_size)
        return self._cuts[number]

    def state_bytes(self, config: PretrainConfig, pipeline: Pipeline, stages: Sequence[StageLayers]) -> list[int]:
        """Of each rank, without an activation."""
        parallel = config.parallel
        key = parallel.pp, parallel.tp, parallel.ep, parallel.cp, tuple(stages), pipeline.rank_of
        if key not in self._states:
            used = [set[str]() for _ in range(pipeline.ranks)]
            for stage, rank in zip(stages, pipeline.rank_of, strict=True):
                used[rank] |= self.uses_of(config, stage)
            held = self._held_of(config, sum("embedding" in own for own in used))
            self._states[key] = [sum(held.of_buckets(own).state.values()) for own in used]
        return self._states[key]

    def uses_of(self, config: PretrainConfig, stage: StageLayers) -> set[str]:
        """The buckets that a stage has."""
        shape = step_shape(config)
        if shape.tp not in self._uses:
            forward = plain(shape)
            uses: dict[int, set[str]] = {BEFORE: set(), BEHIND: set()}
            first = next(i for i, s in enumerate(forward) if s.layer >= 0)
            for i, s in enumerate(forward):
                layer = s.layer if s.layer >= 0 else BEFORE if i < first else BEHIND
                uses.setdefault(layer, set()).update(s.uses)
            self._uses[shape.tp] = uses
        ends = (*([BEFORE] if stage.embedding else []), *([BEHIND] if stage.head else []))
        return set().union(*(self._uses[shape.tp][layer] for layer in (*ends, *stage.layers)))

    def _held_of(self, config: PretrainConfig, embedding_ranks: int) -> InstructionBytes:
        parallel = config.parallel
        key = parallel.pp, parallel.tp, parallel.ep, parallel.cp, embedding_ranks
        if key not in self._held:
            self._held[key] = InstructionBytes(
                config,
                self.world,
                vocab_size=self.vocab_size,
                cuda=on_cuda(config.cluster),
                embedding_ranks=max(1, embedding_ranks),
                ranks_per_node=nodes_that_sum(config),
            )
        return self._held[key]

    def weighed(self, config: PretrainConfig) -> Weighed | None:
        """By formulas.  None for micro-batches that the schedule isn't made for."""
        number = micro_batches_of(config, self.world)
        pipeline = self.lists.of(config, walked_number(config, number))
        if pipeline is None or self.lists.of(config, number) is None:
            return None
        stages = self.stages(config)
        state = self.state_bytes(config, pipeline, stages)
        if not fits_in(config.cluster, max(state)):
            return Weighed(config, stages, CellTimes(), (), 0.0, max(state), float("inf"))
        costs = self.costs(config)
        held = tuple(map(costs.stage_bytes, stages))
        activations = [_most_kept(pipeline, rank, held) for rank in range(pipeline.ranks)]
        working = [max(held[stage].working for stage in pipeline.stages_of(rank)) for rank in range(pipeline.ranks)]
        memory = max(map(sum, zip(state, activations, working, strict=True)))
        if not fits_in(config.cluster, memory):
            return Weighed(config, stages, CellTimes(), held, 0.0, memory, float("inf"))
        of_stage = tuple(map(costs.stage_seconds, stages))
        own = [[of_stage[stage] for stage in pipeline.stages_of(rank)] for rank in range(pipeline.ranks)]
        times = CellTimes(message=self._message_s(config), of_stage=of_stage)
        end_s = max(self._end_s(config, [stages[s] for s in pipeline.stages_of(rank)]) for rank in range(pipeline.ranks))
        pairs = any(len(entry) > 1 for entries in pipeline.lists for entry in entries)
        return Weighed(config, stages, times, held, end_s, memory, self._by_formula(config, number, own, pairs=pairs) + end_s)

    def _end_s(self, config: PretrainConfig, own: Sequence[StageLayers]) -> float:
        first = replace(own[0], layers=own[0].layers[:1], head=False)
        used = set().union(*(self.uses_of(config, stage) for stage in own))
        return self.costs(config).end_s(sorted(used), self.uses_of(config, first))

    def _by_formula(self, config: PretrainConfig, number: int, own: Sequence[Sequence[LayerSeconds]], *, pairs: bool) -> float:
        busiest = max((sum(of_rank, LayerSeconds()) for of_rank in own), key=lambda of_rank: of_rank.whole)
        pair = busiest.pair / busiest.whole if pairs else 1.0
        parallel, times = config.parallel, Times(busiest.forward, busiest.inputs, busiest.weights, pair=pair)
        size = Size(parallel.pp, parallel.pp_chunks, number, times, paired=pairs)
        bubble = schedule_of(config.strategy.pipeline).bubble(size)
        return number * busiest.whole * pair + (bubble if bubble is not None else (parallel.pp - 1) * busiest.whole)

    def _message_s(self, config: PretrainConfig) -> float:
        """Between neighbours, through adapters that their nodes' ranks share, or through the fast links of a node."""
        network = network_for(config)
        inside = self.world // config.parallel.pp < network.ranks_per_node
        if inside:
            rate, hop_s = network.fast_bytes_per_s, network.fast_hop_s
        else:
            rate, hop_s = network.nic_bytes_per_s * network.nics_per_node / network.ranks_per_node, network.hop_s
        return self.costs(config).message_s(rate, network.latency_s + hop_s)

    def walked(self, found: Weighed) -> Weighed:
        """By its cells."""
        pipeline = self.lists.of(found.config, micro_batches_of(found.config, self.world))
        assert pipeline is not None, "it has been weighed"
        return replace(found, step_s=walk(pipeline, found.times).makespan + found.end_s)

    def recut(self, found: Weighed) -> Weighed:
        """With layers cut by what they take instead of their FLOPs, where that pays and fits."""
        model, parallel, costs = found.config.model, found.config.parallel, self.costs(found.config)
        ahead = range(model.num_layers, model.num_layers + model.mtp_layers)
        head_s = sum(costs.seconds_of(layer).whole for layer in (BEHIND, *ahead))
        layers_s = [costs.seconds_of(layer).whole for layer in range(model.num_layers)]
        stages = cut(layers_s, parallel.pp * parallel.pp_chunks, embedding=costs.seconds_of(BEFORE).whole, head=head_s)
        stages = (*stages[:-1], replace(stages[-1], layers=(*stages[-1].layers, *ahead)))
        if stages == found.stages:
            return found
        layout = layout_of(stages, mtp_layers=model.mtp_layers)
        other = self.weighed(replace(found.config, parallel=replace(parallel, pp_layout=layout)))
        if other is None or not other.fits:
            return found
        other = self.walked(other)
        return other if other.step_s < found.step_s * (1 - WORTH_A_LAYOUT) else found


def _most_kept(pipeline: Pipeline, rank: int, of_stage: Sequence[LayerBytes]) -> int:
    """The most bytes that a rank's cells keep for backward at once."""
    split = {(cell.stage, cell.micro_batch) for _, cell in pipeline.cells(rank) if cell.work is Work.WEIGHT_GRADIENTS}
    now = most = 0

    def gone(cell: Cell) -> int:
        cost = of_stage[cell.stage]
        if cell.work is Work.WEIGHT_GRADIENTS:
            return cost.late
        return cost.kept - cost.late * ((cell.stage, cell.micro_batch) in split) if cell.work is not Work.FORWARD else 0

    for entry in pipeline.lists[rank]:
        now += sum(of_stage[cell.stage].kept for cell in entry if cell.work is Work.FORWARD)
        most = max(most, now)
        now -= sum(map(gone, entry))
    return most


def finalists(
    configs: Sequence[PretrainConfig],
    search: PipelineSearch,
    *,
    modes: Sequence[str],
    progress: Callable[[int, int, str], None],
) -> tuple[list[Weighed], list[Weighed]]:
    """Of layouts with pipelines the best by their cells, the fastest first; and what doesn't fit, the smallest first, those whose
    state alone is too much last.

    `modes`: of recompute, of which the first that fits is taken."""
    fitting, too_large = list[Weighed](), list[Weighed]()
    none_fits = dict[object, int]()  # of a layout the micro-batch with which it doesn't fit: larger ones hold no less
    for number, config in enumerate(configs):
        progress(number, len(configs), "pipelines")
        size, layout = config.train.micro_batch_size, (str(config.parallel), config.strategy.pipeline, config.strategy.name)
        if size > none_fits.get(layout, size):
            continue
        for mode in modes:
            found = search.weighed(replace(config, train=replace(config.train, recompute=mode)))
            if found is None:
                break
            if found.fits:
                fitting.append(found)
                break
            too_large.append(found)
        else:
            none_fits[layout] = size
    fitting.sort(key=lambda w: w.step_s)
    best = sorted(map(search.walked, fitting[:WALKED_CELLS]), key=lambda w: w.step_s)
    return best, sorted(too_large, key=lambda w: (w.of_state_alone, w.memory_bytes))
