"""Plans of a configuration: the one it begins with, and the questions that a search asks where it says auto."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megalina.config import PretrainConfig, StrategyConfig
from megalina.step.plan import Plan
from megalina.validate import check_config
from megalina.validate_strategy import PACKED

AUTO = "auto"
PIECE_BYTES = 2**19  # smaller ones cost their latency many times: a small all-reduce takes milliseconds whatever its size
PIECES_BYTES = (0, 2**19, 2**20)  # 0: whole buckets
CHUNKS = ("1", "2", "4")
PARTS = (2, 4)
LATE_LAYERS = (0, 2, 4)

Question = Callable[[Plan], Sequence[Plan]]  # the best plan so far -> alternatives to it


def first_plan(strategy: StrategyConfig, *, packing: int = 1) -> Plan:
    """What a run begins with: numbers as given; eager, whole layers and pieces of 0.5 MiB where they say auto."""
    if strategy.name == AUTO:
        return Plan("eager", packing=packing)
    return Plan(
        strategy.name,
        parts=strategy.parts,
        chunks="1" if strategy.chunks == AUTO else strategy.chunks,
        piece_bytes=PIECE_BYTES if strategy.partition_bytes == AUTO else int(strategy.partition_bytes),
        merge_bytes=int(strategy.bucket_mb * 2**20),
        yields=strategy.yields,
        late_layers=strategy.late_layers,
        packing=packing,
    )


def strategy_of(plan: Plan, rest: StrategyConfig) -> StrategyConfig:
    """The configuration that begins with this plan and searches nothing; windows are measured anew."""
    return replace(
        rest,
        name=plan.strategy,
        partition_bytes=str(plan.piece_bytes),
        bucket_mb=plan.merge_bytes / 2**20,
        parts=plan.parts,
        chunks=plan.chunks,
        yields=plan.yields,
        late_layers=plan.late_layers,
        windows=AUTO if plan.gap_bytes else "none",
        packing=str(plan.packing),
    )


def questions(config: PretrainConfig, world: int, *, packings: Sequence[int]) -> list[Question]:
    """What `config.strategy` leaves to measured steps, question by question; [] where it leaves nothing.

    `packings`: those that groups were made for, as far as they are worth a trial."""
    strategy = config.strategy
    asked: list[Question] = []
    if strategy.name == AUTO:
        asked += [lambda best: _strategies(config), lambda best: _packed(best, packings)]
    elif strategy.packing == AUTO:
        asked.append(lambda best: [replace(best, packing=k) for k in packings])
    if strategy.chunks == AUTO:
        asked.append(lambda best: [replace(best, chunks=chunks) for chunks in CHUNKS])
    if strategy.partition_bytes == AUTO or (strategy.name == AUTO and not config.parallel.zero):  # shards belong to pieces
        asked.append(lambda best: [replace(best, piece_bytes=size) for size in PIECES_BYTES])
    if strategy.name == AUTO:
        asked += [_yields, _late, _parts, lambda best: _packed(best, packings)]  # packings again, with what was found since
    return [_that_run(question, config, world) for question in asked]


def _strategies(config: PretrainConfig) -> list[Plan]:
    """Those that have won somewhere."""
    flow = Plan("flow", parts=2, late_layers=2)
    lina = Plan("lina", chunks="2", yields=True, piece_bytes=PIECE_BYTES)
    return [flow, lina, *([replace(flow, strategy="lina_zero", yields=True, late_layers=0)] if config.parallel.zero else [])]


def _packed(best: Plan, packings: Sequence[int]) -> list[Plan]:
    packed = best if best.strategy in PACKED else Plan("lina", yields=True, piece_bytes=PIECE_BYTES)
    return [replace(packed, packing=k) for k in packings]


def _yields(best: Plan) -> list[Plan]:
    return [replace(best, yields=not best.yields)] if best.strategy == "flow" else []


def _parts(best: Plan) -> list[Plan]:
    return [replace(best, parts=parts) for parts in PARTS] if best.parts > 1 else []


def _late(best: Plan) -> list[Plan]:
    return [replace(best, late_layers=layers) for layers in LATE_LAYERS] if best.strategy != "eager" else []


def _that_run(question: Question, config: PretrainConfig, world: int) -> Question:
    """Without alternatives that this configuration can't run."""
    return lambda best: [plan for plan in question(best) if _runs(config, world, plan)]


def _runs(config: PretrainConfig, world: int, plan: Plan) -> bool:
    try:
        check_config(replace(config, strategy=strategy_of(plan, config.strategy)), world)
    except ValueError:
        return False
    return True
