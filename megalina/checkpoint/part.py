"""A part of a tensor: what one rank saves of it, or loads into."""

from dataclasses import dataclass

import torch

from megalina.comm.slice import Box


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one tensor: where it is saved from or loaded into."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    boxes: list[Box]
