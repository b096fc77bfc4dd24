"""How a rank's `Trainable` is changed: its stages' functions, the seeds of its losses, its program."""

from collections.abc import Callable
from typing import Any

from megalina.parallel.trainable import Trainable
from megalina.step.program import Program, Stage

Function = Callable[..., Any]


def around(trainable: Trainable, change: Callable[[Stage, Function], Function]) -> None:
    """Every compute stage's function becomes `change(stage, function)`."""
    inner = trainable.functions
    trainable.run_with(trainable.program, lambda stage: change(stage, inner(stage)))


def after(trainable: Trainable, name: str, change: Callable[..., Any]) -> None:
    """`change(out, *arguments)` is what the stages of a name give."""

    def of(stage: Stage, function: Function) -> Function:
        return (lambda *a: change(function(*a), *a)) if stage.name == name else function

    around(trainable, of)


def seeds(trainable: Trainable, factor: Callable[[str, str], float]) -> None:
    """The gradient that a loss starts from is multiplied by `factor(kind of loss, part)`."""

    def of(stage: Stage, function: Function) -> Function:
        if stage.name != "seed":
            return function
        factors = [factor(loss.split(".")[0], stage.part) for loss in stage.reads[1:]]
        return lambda *a: tuple(f * g for f, g in zip(factors, function(*a), strict=True))

    around(trainable, of)


def with_program(trainable: Trainable, program: Program) -> None:
    trainable.run_with(program, trainable.functions)


def expert_buckets(trainable: Trainable) -> list[str]:
    """The buckets of experts."""
    return [name for name in trainable.buckets if name.startswith("experts.")]
