"""A mixture of experts whose tokens travel once to each node that has experts of theirs, in torch.

As of once per rank, but rows are packed for nodes: a rank there passes them on (`megalina/model/node_rows.py`), so what arrives
at a rank is what it would get if they had travelled once to each rank, in another order."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from megalina.model.node_rows import NodeRow, NodeWay
from megalina.model.once_moe import OnceMoE
from megalina.model.permute import RowOrder


class NodeMoE(OnceMoE):
    @property
    def _experts_there(self) -> int:
        return self.num_experts // self.block.whole.dispatch.nodes

    def pack(self, rows_ND: Tensor, weight_TK: Tensor, order: RowOrder) -> tuple[Tensor, RowOrder]:
        """Rows in the order of experts -> packed rows in the order of nodes, and that order."""
        sent_UC, way = super().pack(rows_ND, weight_TK, order)
        ranks = self._experts_there // self._experts_here
        row = NodeRow(self.block.model.d_model, ranks, self._weight_dtype)
        return sent_UC, replace(way, new_way=partial(NodeWay, row))
