"""The activation between the two matrices of an MLP, as far as shapes, costs and memory must know it;
`megalina/model/activation.py` has its torch functions."""

from dataclasses import dataclass

from megalina.config import ModelConfig, choices_of

ACTIVATIONS = choices_of(ModelConfig, "activation")
GATED = ("swiglu", "swiglu_clamped")


@dataclass(frozen=True, slots=True)
class Activation:
    """ValueError for one that isn't there."""

    name: str
    limit: float = ModelConfig().activation_limit  # swiglu_clamped: the gate is at most this, the other input within +- this

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.name!r}")

    @property
    def inputs(self) -> int:
        """Numbers that it reads for each that it gives: a gated one a gate too."""
        return 2 if self.name in GATED else 1

    @property
    def clamps(self) -> bool:
        """Whether it has a scratch of its own: as large as its result in forward, a byte a number in backward."""
        return self.name == "swiglu_clamped"


def activation_of(model: ModelConfig) -> Activation:
    return Activation(model.activation, model.activation_limit)


def check_activation(model: ModelConfig) -> None:
    """ValueError for a setting that does nothing."""
    if not activation_of(model).clamps and model.activation_limit != ModelConfig().activation_limit:
        raise ValueError(
            f"model.activation_limit={model.activation_limit:g} does nothing with model.activation={model.activation}: "
            "set that to swiglu_clamped"
        )
