"""A loss as its block declares it: a scalar that each part's list writes, is minimized with a weight, and is reported."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Loss:
    """What is minimized is the sum over losses of weight x value / divisor; `U:seed` starts backward with weight / divisor."""

    name: str  # for people and records: "z_loss"
    values: tuple[str, ...]  # what the list calls it: `z.<layer>.<part>`, or `loss.-.<part>`
    weight: float
    divisor: Literal["loss_tokens", "valid_tokens"]  # of the whole step, over all ranks
    layers: int = 1  # it is reported as the mean over so many
