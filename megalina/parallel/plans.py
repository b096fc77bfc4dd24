"""Questions: what a configuration leaves to measured steps, one after another, where its strategy says auto."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megalina.config import PretrainConfig
from megalina.plan_settings import AUTO
from megalina.step import candidates
from megalina.step.plan import Plan
from megalina.validate_strategy import runs

Question = Callable[[Plan], Sequence[Plan]]  # the best plan so far -> alternatives to it


def questions(config: PretrainConfig, world: int, *, packings: Sequence[int]) -> list[Question]:
    """What `config.strategy` leaves to measured steps, question by question; [] where it leaves nothing.

    `packings`: those that groups were made for, as far as they are worth a trial."""
    strategy = config.strategy
    asked: list[Question] = []
    if strategy.name == AUTO:
        zero = bool(config.parallel.zero)
        asked += [lambda best: candidates.winners(zero=zero), lambda best: candidates.packed(best, packings)]
    elif strategy.packing == AUTO:
        asked.append(lambda best: [replace(best, packing=k) for k in packings])
    if strategy.chunks == AUTO:
        asked.append(candidates.in_chunks)
    if strategy.partition_bytes == AUTO or (strategy.name == AUTO and not config.parallel.zero):  # shards belong to pieces
        asked.append(candidates.in_pieces)
    if strategy.name == AUTO:
        asked += [candidates.yielding, candidates.with_late_layers, candidates.in_parts]
        asked.append(lambda best: candidates.packed(best, packings))  # again, with what was found since
    return [_that_run(question, config, world) for question in asked]


def _that_run(question: Question, config: PretrainConfig, world: int) -> Question:
    """Without alternatives that this configuration can't run."""
    return lambda best: [plan for plan in question(best) if runs(config, plan, world)]
