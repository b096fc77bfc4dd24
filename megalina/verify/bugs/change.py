"""How a rank's `Trainable` is changed: its instructions' functions, the seeds of its losses, its program."""

from collections.abc import Callable
from typing import Any

from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction, Program

Function = Callable[..., Any]


def around(trainable: Trainable, change: Callable[[Instruction, Function], Function]) -> None:
    """Every compute instruction's function becomes `change(instruction, function)`."""
    inner = trainable.functions
    trainable.run_with(trainable.program, lambda instruction: change(instruction, inner(instruction)))


def after(trainable: Trainable, name: str, change: Callable[..., Any]) -> None:
    """`change(out, *arguments)` is what the instructions of a name give."""

    def of(instruction: Instruction, function: Function) -> Function:
        return (lambda *a: change(function(*a), *a)) if instruction.name == name else function

    around(trainable, of)


def seeds(trainable: Trainable, factor: Callable[[str, str], float]) -> None:
    """The gradient that a loss starts from is multiplied by `factor(kind of loss, part)`."""

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name != "seed":
            return function
        factors = [factor(loss.split(".")[0], instruction.part) for loss in instruction.reads[1:]]
        return lambda *a: tuple(f * g for f, g in zip(factors, function(*a), strict=True))

    around(trainable, of)


def with_program(trainable: Trainable, program: Program) -> None:
    trainable.run_with(program, trainable.functions)


def expert_buckets(trainable: Trainable) -> list[str]:
    """The buckets of experts."""
    return [name for name in trainable.buckets if name.startswith("experts.")]
