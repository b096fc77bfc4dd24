"""A strategy: which passes make a training step of a forward pass.  To add one, write a function like `eager`."""

from collections.abc import Mapping
from typing import Protocol

from megalina.step.forward import Shape, plain
from megalina.step.passes import RECOMPUTED, finish, place_gradients, recompute, step
from megalina.step.program import BucketSpec, Kind, Op, Program, Stage, check


class Strategy(Protocol):
    def __call__(
        self, shape: Shape, buckets: Mapping[str, BucketSpec], *, micro_batches: int, recompute_mode: str
    ) -> Program: ...


def eager(shape: Shape, buckets: Mapping[str, BucketSpec], *, micro_batches: int, recompute_mode: str) -> Program:
    """Every collective starts as soon as its input is there."""
    forward = recompute(plain(shape), RECOMPUTED[recompute_mode])
    program = place_gradients(step(forward, micro_batches), buckets)
    return finish(program, buckets)


STRATEGIES: Mapping[str, Strategy] = {"eager": eager}  # `strategy.name`; each has a file in conf/strategy/


def training_step(
    name: str, shape: Shape, buckets: Mapping[str, BucketSpec], *, micro_batches: int, recompute_mode: str
) -> Program:
    """The checked program of one training step.  ValueError for a strategy that isn't there."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy.name is {name!r}: choose one of {', '.join(STRATEGIES)}")
    program = STRATEGIES[name](shape, buckets, micro_batches=micro_batches, recompute_mode=recompute_mode)
    check(program, given(micro_batches, buckets), buckets)
    return program


def evaluation(shape: Shape, buckets: Mapping[str, BucketSpec]) -> Program:
    """The checked program of one forward pass without gradients, and the sum of its losses over the world."""
    forward = plain(shape)
    losses = tuple(v for s in forward for v in s.writes if v.startswith("loss."))
    program = (
        *forward,
        Stage("U", Kind.COMPUTE, "evaluated", reads=(*losses, "#batch.-.0"), writes=("#own_loss.-.0",)),
        Stage("U", Kind.START, "evaluated", reads=("#own_loss.-.0",), writes=("#own_loss>.-.0",), op=Op.SUM, axis="world"),
        Stage("U", Kind.WAIT, "evaluated", reads=("#own_loss>.-.0",), writes=("#loss.-.0",), op=Op.SUM, axis="world"),
    )
    check(program, given(1, buckets), buckets)
    return program


def given(micro_batches: int, buckets: Mapping[str, BucketSpec]) -> set[str]:
    """What exists before a step: the batches and the parameters."""
    return {f"#batch.-.{i}" for i in range(micro_batches)} | set(buckets)
