"""Rows that travel once to each node, on the rank that passes them on there (`parallel.dispatch=once_per_node`).

A rank gets, of the ranks at its place of all nodes, rows with weights for all experts of its node.  `spread` makes of each the
rows for those of the node's ranks that have experts of it; `gathered` sums what they give, or gradients, in the order of ranks.

Shapes: A rows that came to be passed on, V rows passed on, D model width, P ranks of a node, e experts of a rank, C columns of a
row: D, and those of the weights where it has some.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megalina.model.permute import sum_rows
from megalina.model.weight_columns import NOT_CHOSEN, columns_of, weights_of


@dataclass(frozen=True, slots=True)
class NodeRow:
    """Of which a row is made: D numbers, and weights for the experts of all of a node's ranks."""

    width: int
    ranks: int
    weight_dtype: torch.dtype


class NodeWay:
    """Of one exchange to the experts and of those that go the same way: back, and of their gradients."""

    def __init__(self, row: NodeRow):
        self._row = row
        self._row_AP: Tensor | None = None  # where each rank's row of a token is among [V]; V: nowhere
        self._source_V, self._rank_V = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        self.send_P: list[int] = []  # rows to each rank of the node
        self.receive_P: list[int] = []  # rows from each, known once they have said so

    @torch.no_grad()
    def spread(self, arrived_AC: Tensor) -> Tensor:
        """[V, C], for rank after rank of the node.  The first time weights say what goes where."""
        row = self._row
        if arrived_AC.shape[1] == row.width:
            return arrived_AC.index_select(0, self._source_V)
        x_AD, columns_AC = arrived_AC[:, : row.width], arrived_AC[:, row.width :]
        weight_Ae = weights_of(columns_AC, row.weight_dtype)
        weight_APe = weight_Ae.view(len(arrived_AC), row.ranks, weight_Ae.shape[1] // row.ranks)  # there may be no row
        if self._row_AP is None:
            self._order(weight_APe)
        weight_Ve = weight_APe[self._source_V, self._rank_V]
        return torch.cat([x_AD.index_select(0, self._source_V), columns_of(weight_Ve, arrived_AC.dtype)], 1)

    @torch.no_grad()
    def gathered(self, back_VC: Tensor) -> Tensor:
        """[A, C]: the sum of the first D columns, then each weight in its place, zeros elsewhere."""
        row = self._row
        assert self._row_AP is not None
        sum_AD = sum_rows(back_VC[:, : row.width], None, self._row_AP)
        if back_VC.shape[1] == row.width:
            return sum_AD
        weight_Ve = weights_of(back_VC[:, row.width :], row.weight_dtype)
        weight_APe = weight_Ve.new_zeros(len(sum_AD), row.ranks, weight_Ve.shape[1])
        weight_APe[self._source_V, self._rank_V] = weight_Ve
        return torch.cat([sum_AD, columns_of(weight_APe.flatten(1), back_VC.dtype)], 1)

    def _order(self, weight_APe: Tensor) -> None:
        goes_PA = (weight_APe != NOT_CHOSEN).any(2).t()
        self.send_P = goes_PA.sum(1).tolist()
        self._rank_V, self._source_V = goes_PA.nonzero(as_tuple=True)  # by rank, then as they came
        rows = len(self._source_V)
        row_PA = torch.full(goes_PA.shape, rows, device=goes_PA.device)
        row_PA[goes_PA] = torch.arange(rows, device=goes_PA.device)
        self._row_AP = row_PA.t().contiguous()
