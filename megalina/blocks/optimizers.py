"""The optimizers, as far as costs, checkpoints and configurations must know them; `megalina/train/optim.py` has their torch
functions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megalina.blocks.reference import is_reference, load
from megalina.config import OptimConfig


class OptimizerKind:
    """One of one's own: a subclass, named in `optim.name=folder/file.py:Name`.

    It updates each element from that element's gradient and state alone, so that it doesn't matter to whom a slice belongs."""

    functions: ClassVar[str]  # its torch class, a `megalina.train.optim.Rule`: "package.module:Class" or "folder/file.py:Class"
    states: ClassVar[Sequence[str]] = ()  # what it keeps of each parameter between updates, each as large as the main weights
    passes: ClassVar[int] = 3  # numbers that an update of a parameter reads and writes: gradient, weight, weight; and its states
    has_apex: ClassVar[bool] = False  # NVIDIA Apex has a version of it
    magnifies_rounding: ClassVar[bool] = False  # it divides by what may be next to nothing: rounding shows after an update


class AdamW(OptimizerKind):
    """Decoupled weight decay (Loshchilov and Hutter 2019)."""

    functions = "megalina.train.optim:AdamW"
    states = ("exp_avg", "exp_avg_sq")
    passes = 7
    has_apex = True
    magnifies_rounding = True


class Sgd(OptimizerKind):
    """No momentum; weight decay is added to the gradient."""

    functions = "megalina.train.optim:Sgd"


OPTIMIZERS: Mapping[str, type[OptimizerKind]] = {"adamw": AdamW, "sgd": Sgd}  # `optim.name`; each has a file in conf/optim/


def optimizer_of(config: OptimConfig) -> type[OptimizerKind]:
    """ValueError for one that isn't there."""
    if is_reference(config.name):
        kind = load(config.name)
        if not (isinstance(kind, type) and issubclass(kind, OptimizerKind)):
            base = "megalina.blocks.optimizers.OptimizerKind"
            raise ValueError(f"optim.name={config.name} is no OptimizerKind: derive it from {base}")
        return kind
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optim.name is {config.name!r}: choose one of {', '.join(OPTIMIZERS)}, or folder/file.py:Name")
    return OPTIMIZERS[config.name]
