"""Weights of experts that travel in a token's row, beside it.

They keep their bits: where they are wider than the row's numbers each of them takes several columns, and so do their gradients
on the way back.
"""

import math

import torch
from torch import Tensor

NOT_CHOSEN = -math.inf  # no router's weight; NaN stays what it is


def columns_of(weight_Ue: Tensor, dtype: torch.dtype) -> Tensor:
    """Their bits as numbers of another type, one or more of them each."""
    return weight_Ue if weight_Ue.dtype == dtype else weight_Ue.contiguous().view(dtype)


def weights_of(columns_UC: Tensor, dtype: torch.dtype) -> Tensor:
    """What `columns_of` was given."""
    return columns_UC if columns_UC.dtype == dtype else columns_UC.contiguous().view(dtype)
