"""How a configuration is pipelined: its schedule's lists, and which layers are in each stage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megalina.blocks.model import blocks_of
from megalina.blocks.sizes import Rank
from megalina.config import ModelConfig, PretrainConfig, RouterConfig, is_moe_layer
from megalina.reference import is_reference, load
from megalina.step.forward import plain
from megalina.step.pipeline.cell import Pipeline, Work
from megalina.step.pipeline.check import check
from megalina.step.pipeline.job import Pipelined
from megalina.step.pipeline.messages import with_messages
from megalina.step.pipeline.schedules.schedule import Schedule, Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.stages import StageLayers, cut, stages_from
from megalina.step.pipeline.torch_table import from_csv
from megalina.step.pipeline.walk import Times
from megalina.step.program import Kind

TABLE = ".csv"  # how `strategy.pipeline` ends where it is a file


@dataclass(frozen=True, slots=True)
class _Costs:
    """FLOPs."""

    layers: tuple[float, ...]
    embedding: float
    head: float


def pipelined(config: PretrainConfig, world: int, *, vocab_size: int = 0) -> Pipelined:
    """The pipeline of `parallel.pp` ranks, each the same part of `world` ranks.  `vocab_size`: 0: the configuration's.

    ValueError, with the numbers and what to change, for layers that can't be cut so, micro-batches that the schedule isn't made
    for, and a table that can't be read or isn't of so many ranks and micro-batches."""
    parallel, train = config.parallel, config.train
    dp = world // (parallel.pp * parallel.cp * parallel.tp)
    micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
    table = read_table(config.strategy.pipeline, micro_batches) if config.strategy.pipeline.endswith(TABLE) else None
    if table is not None and table.ranks != parallel.pp:
        raise ValueError(
            f"strategy.pipeline={config.strategy.pipeline} has lists of {table.ranks} ranks, and parallel.pp is {parallel.pp}: "
            f"set parallel.pp={table.ranks}, or give a table of {parallel.pp} rows"
        )
    number = parallel.pp * parallel.pp_chunks
    if table is not None and table.stages != number:
        raise ValueError(
            f"strategy.pipeline={config.strategy.pipeline} has {table.stages} stages, and parallel.pp ({parallel.pp}) x "
            f"parallel.pp_chunks ({parallel.pp_chunks}) is {number}: set parallel.pp_chunks to as many as a rank has"
        )
    costs = _costs(config.model, config.router, train.seq_len, vocab_size or config.model.vocab_size or 1)
    stages = _stages(config, number, costs)
    shares, name = _shares(stages, costs, parallel.pp), config.strategy.name
    pipeline, pairs = _lists(config, table, shares, micro_batches, dp), None
    if name in ("pair", "auto"):  # which may choose pairs where there are some
        try:
            pairs = _lists(config, table, shares, micro_batches, dp, paired=True)
        except ValueError:
            if name == "pair":
                raise
    words = [s for s, of in enumerate(stages) if of.embedding]
    words += [s for s, of in enumerate(stages) if of.head and (config.model.tie_embeddings or config.model.mtp_layers)]
    return Pipelined(pipeline, stages, tuple(dict.fromkeys(words)), pairs)


def _lists(
    config: PretrainConfig,
    table: Pipeline | None,
    shares: tuple[float, ...],
    micro_batches: int,
    dp: int,
    *,
    paired: bool = False,
) -> Pipeline:
    """Of all ranks, with messages."""
    parallel, train, name = config.parallel, config.train, config.strategy.pipeline
    where = f"parallel.pp={parallel.pp}, parallel.pp_chunks={parallel.pp_chunks} and {micro_batches} micro-batches a step on each"
    where += f" of {dp} data-parallel ranks"
    found = table
    if found is None:
        size = Size(parallel.pp, parallel.pp_chunks, micro_batches, Times(shares=shares), paired=paired)
        try:
            found = schedule_of(name).pipeline(size)
            if name not in SCHEDULES:  # those that are there are known to be right
                check(found)
        except ValueError as error:
            raise ValueError(f"strategy.pipeline={name} with {where}: {error}") from None
    if paired and not found.has_pairs:
        raise ValueError(
            f"strategy=pair, and no forward goes with a backward in strategy.pipeline={name} with {where}: raise "
            f"train.global_batch_size ({train.global_batch_size}), lower train.micro_batch_size ({train.micro_batch_size}), or "
            "take another strategy"
        )
    return found if found.has_messages else with_messages(found, Times(shares=shares))


def most_moe_layers(config: PretrainConfig, world: int) -> int:
    """Of the pipeline rank that has most, multi-token prediction's among them.  ValueError as `pipelined`."""
    job = pipelined(config, world)
    return max(sum(is_moe_layer(config.model, i) for i in job.held(rank).layers) for rank in range(job.ranks))


def layers_in_stages(config: PretrainConfig, *, vocab_size: int = 0) -> tuple[StageLayers, ...]:
    """Of the stages of `pipelined`, first stage first.  ValueError for layers that can't be cut so."""
    costs = _costs(config.model, config.router, config.train.seq_len, vocab_size or config.model.vocab_size or 1)
    return _stages(config, config.parallel.pp * config.parallel.pp_chunks, costs)


def schedule_of(name: str) -> Schedule:
    """By its name, or your own by a reference.  ValueError where there is none."""
    if name in SCHEDULES:
        return SCHEDULES[name]
    if not is_reference(name):
        raise ValueError(
            f"there is no such schedule: choose one of {', '.join(SCHEDULES)}, FILE{TABLE} or folder/file.py:SCHEDULE"
        )
    found = load(name)
    if not isinstance(found, Schedule):
        raise ValueError(f"{name} is no Schedule: make one as docs/pipelines.md shows")
    return found


def read_table(path: str, micro_batches: int) -> Pipeline:
    """Of torch.distributed.pipelining, without FSDP's cells, which ZeRO-1's lists have no use for."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"strategy.pipeline={path} can't be read ({error}): give a table as docs/pipelines.md shows") from None
    try:
        table = from_csv(text)
        fsdp = (Work.UNSHARD, Work.RESHARD, Work.REDUCE_GRAD)
        lists = tuple(tuple(entry for entry in cells if entry[0].work not in fsdp) for cells in table.lists)
        found = replace(table, lists=lists)
        if found.micro_batches != micro_batches:
            raise ValueError(f"it is of {found.micro_batches} micro-batches, and a step has {micro_batches}: make one of as many")
        check(found)
    except ValueError as error:
        raise ValueError(f"strategy.pipeline={path}: {error}") from None
    return found


def _stages(config: PretrainConfig, number: int, costs: _Costs) -> tuple[StageLayers, ...]:
    """Layers of multi-token prediction share the last norm and the output matrix, so they are in the last stage."""
    model, layout = config.model, config.parallel.pp_layout
    if layout:
        stages = stages_from(layout, num_layers=model.num_layers, mtp_layers=model.mtp_layers)
        if len(stages) != number:
            raise ValueError(
                f"parallel.pp_layout={layout} has {len(stages)} stages, and parallel.pp ({config.parallel.pp}) x "
                f"parallel.pp_chunks ({config.parallel.pp_chunks}) is {number}: give as many"
            )
        if early := [s for s, of in enumerate(stages[:-1]) if any(layer >= model.num_layers for layer in of.layers)]:
            raise ValueError(
                f"parallel.pp_layout={layout} has a layer of multi-token prediction in stage {early[0]}, and these share the "
                "last norm and the output matrix: put all m into the last stage, before its L"
            )
        return stages
    if number > model.num_layers:
        raise ValueError(
            f"model.num_layers ({model.num_layers}) are fewer than parallel.pp ({config.parallel.pp}) x parallel.pp_chunks = "
            f"{number} stages: lower one of the two, or say what is in each stage with parallel.pp_layout"
        )
    found = cut(costs.layers, number, embedding=costs.embedding, head=costs.head)
    ahead = tuple(range(model.num_layers, model.num_layers + model.mtp_layers))
    return (*found[:-1], replace(found[-1], layers=(*found[-1].layers, *ahead)))


def _shares(stages: Sequence[StageLayers], costs: _Costs, ranks: int) -> tuple[float, ...]:
    """Of each stage, of what a rank computes on average."""
    own = [
        sum(costs.layers[i] for i in of.layers if i < len(costs.layers)) + costs.embedding * of.embedding + costs.head * of.head
        for of in stages
    ]
    mean = sum(own) / ranks
    return tuple(max(cost / mean, 1e-3) for cost in own)


def _costs(model: ModelConfig, router: RouterConfig, seq_len: int, vocab_size: int) -> _Costs:
    """FLOPs of each layer's forward and backward, and of what is before and behind the layers, for one sequence on one device.
    Multi-token prediction counts with the head."""
    config = PretrainConfig(model=model, router=router)
    config.train.micro_batch_size, config.train.seq_len = 1, seq_len
    blocks = blocks_of(model, router, max_positions=model.max_positions or seq_len)
    rank = Rank(config=config, ep=1, vocab_rows=vocab_size)
    layers, ends = [0.0] * model.num_layers, [0.0, 0.0]
    for instruction in plain(blocks.shape(tp=1, sequence=True)):
        if instruction.kind is Kind.COMPUTE:
            piece = blocks.block_of(instruction).work(rank.at(instruction))
            flops = sum(work.flops for work in (piece.forward, piece.backward, piece.weights))
            if 0 <= instruction.layer < model.num_layers:
                layers[instruction.layer] += flops
            else:
                ends[instruction.name != "embed"] += flops
    return _Costs(tuple(layers), *ends)
