"""Rows through experts, forward alone: for inference, where each expert's weights lie by themselves.

With a tile every kernel gets the same number of rows, the last ones padded with zeros.  What comes out of a row then depends
neither on how many rows its expert has nor on where among them it is: how a product is summed up is chosen by shapes, and all
have the same (measured by tests/model/test_rows.py for each dtype).

Shapes: N rows, D model width, F hidden width, H = 2F for a gated activation, else F.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megalina.blocks.activation import Activation
from megalina.model.activation import activate


def expert_rows(
    x_ND: Tensor,
    count_S: Sequence[int],
    weights_S: Sequence[Mapping[str, Tensor] | None],
    *,
    activation: Activation,
    tile: int = 0,
) -> Tensor:
    """Rows sorted by slot, `count_S` of them each; `weights_S`: w1 [H, D], w2 [D, F], perhaps b1 [H], b2 [D]; None where a slot
    gets no row.  Returns [N, D]."""
    out_ND = torch.empty_like(x_ND)
    start = 0
    for count, weights in zip(count_S, weights_S, strict=True):
        if count:
            assert weights is not None, "rows for a slot without an expert"
            rows = slice(start, start + count)
            if tile:
                _in_tiles(x_ND[rows], weights, activation, tile, out_ND[rows])
            else:
                _mlp(x_ND[rows], weights, activation, out_ND[rows])
        start += count
    return out_ND


def _mlp(x_ND: Tensor, weights: Mapping[str, Tensor], activation: Activation, out_ND: Tensor) -> None:
    w1_HD, w2_DF, b1_H, b2_D = (weights.get(name) for name in ("w1", "w2", "b1", "b2"))
    assert w1_HD is not None and w2_DF is not None
    h_NH = x_ND @ w1_HD.t() if b1_H is None else torch.addmm(b1_H, x_ND, w1_HD.t())
    a_NF = h_NH.new_empty(len(h_NH), w2_DF.shape[1])
    activate(h_NH, activation, a_NF)
    if b2_D is None:
        torch.mm(a_NF, w2_DF.t(), out=out_ND)
    else:
        torch.addmm(b2_D, a_NF, w2_DF.t(), out=out_ND)


def _in_tiles(x_ND: Tensor, weights: Mapping[str, Tensor], activation: Activation, tile: int, out_ND: Tensor) -> None:
    whole = len(x_ND) - len(x_ND) % tile
    for begin in range(0, whole, tile):
        _mlp(x_ND[begin : begin + tile], weights, activation, out_ND[begin : begin + tile])
    if whole < len(x_ND):
        padded_tD, result_tD = x_ND.new_zeros(2, tile, x_ND.shape[1]).unbind()
        padded_tD[: len(x_ND) - whole] = x_ND[whole:]
        _mlp(padded_tD, weights, activation, result_tD)
        out_ND[whole:] = result_tD[: len(x_ND) - whole]
