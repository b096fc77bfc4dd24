"""The optimizers, as far as costs, checkpoints and configurations must know them; `megalina/train/optim.py` and
`megalina/train/muon.py` have their torch functions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megalina.blocks.parameter import Parameter
from megalina.config import OptimConfig
from megalina.reference import is_reference, load


class OptimizerKind:
    """One of your own: a subclass, named in `optim.name=folder/file.py:Name`.

    It updates each element from that element's gradient and state alone, so that it doesn't matter to whom a slice belongs; but
    for the parameters that it `takes_whole`, of which a rank updates whole matrices."""

    functions: ClassVar[str]  # its torch class, a `megalina.train.optim.Rule`: "package.module:Class" or "folder/file.py:Class"
    states: ClassVar[Sequence[str]] = ()  # what it keeps of each parameter between updates, each as large as the main weights
    passes: ClassVar[int] = 3  # numbers that an update of a parameter reads and writes: gradient, weight, weight; and its states
    matrix_states: ClassVar[Sequence[str]] = ()  # of what it takes as whole matrices
    matrix_passes: ClassVar[int] = 3  # of what it takes as whole matrices, besides the products
    has_apex: ClassVar[bool] = False  # NVIDIA Apex has a version of it
    magnifies_rounding: ClassVar[bool] = False  # it divides by what may be next to nothing: rounding shows after an update
    clips_heads: ClassVar[bool] = False  # after an update rows of queries and keys are scaled by the largest logits (QK-clip)

    @classmethod
    def takes_whole(cls, parameter: Parameter, config: OptimConfig) -> bool:
        """Whether it updates the last two dimensions of a parameter as matrices."""
        return False

    @classmethod
    def matrix_products(cls, rows: int, columns: int, config: OptimConfig) -> Sequence[tuple[int, int, int]]:
        """Rows, columns and depth of each product that the update of a whole matrix takes."""
        return ()

    @classmethod
    def states_of(cls, parameter: Parameter, config: OptimConfig) -> Sequence[str]:
        """What it keeps of a parameter."""
        return cls.matrix_states if cls.takes_whole(parameter, config) else cls.states


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


class Muon(AdamW):
    """Momentum made orthogonal by Newton-Schulz (Jordan et al. 2024; Moonlight, arXiv:2502.16982), matrix by matrix; AdamW for
    embeddings, the output matrix, norms and biases."""

    functions = "megalina.train.muon:Muon"
    matrix_states = ("momentum",)
    matrix_passes = 10  # momentum is multiplied and added to, and so are weights
    has_apex = False

    @classmethod
    def takes_whole(cls, parameter: Parameter, config: OptimConfig) -> bool:
        return parameter.decay and (parameter.matrix == "hidden" or (parameter.matrix == "router" and config.muon_routers))

    @classmethod
    def matrix_products(cls, rows: int, columns: int, config: OptimConfig) -> Sequence[tuple[int, int, int]]:
        """Of X, with the fewer numbers along its rows: A = X X', A A, and (b A + c A A) X."""
        short, long = sorted((rows, columns))
        return [(short, short, long), (short, short, short), (short, long, short)] * config.muon_steps


class MuonClip(Muon):
    """With QK-clip (Kimi K2, arXiv:2507.20534, section 2.1)."""

    clips_heads = True


# `optim.name`; each has a file in conf/optim/
OPTIMIZERS: Mapping[str, type[OptimizerKind]] = {"adamw": AdamW, "sgd": Sgd, "muon": Muon, "muon_clip": MuonClip}


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


def matrix_flops(rows: int, columns: int, config: OptimConfig) -> float:
    """Of the update of a whole matrix."""
    return float(sum(2 * r * c * d for r, c, d in optimizer_of(config).matrix_products(rows, columns, config)))
