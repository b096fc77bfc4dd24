"""Bugs of tokens that travel once to each rank, or node, that has experts of theirs."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.config import PretrainConfig
from megalina.model.node_rows import NodeWay
from megalina.model.permute import RowOrder
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction
from megalina.verify.bugs.change import Function, after, around


def row_summed_twice(trainable: Trainable, config: PretrainConfig) -> None:
    """What comes back from where a token's first choice is counts twice."""

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name != "mix":
            return function

        def mix(h_TD: Tensor, back_UD: Tensor, *rest: Any) -> Tensor:
            way: RowOrder = rest[-2]
            first = way.row_TK[:, 0]
            times_U = torch.ones(len(back_UD), dtype=back_UD.dtype)
            times_U[first[first < len(back_UD)]] = 2
            return function(h_TD, back_UD * times_U[:, None], *rest)

        return mix

    around(trainable, of)


def weight_applied_twice(trainable: Trainable, config: PretrainConfig) -> None:
    """To what an expert reads the weights have been applied, and they are to what it gives: as if they were squared."""

    def of(instruction: Instruction, function: Function) -> Function:
        return (lambda rows, weight, order: function(rows, weight * weight, order)) if instruction.name == "pack" else function

    around(trainable, of)


def rank_forgotten(trainable: Trainable, config: PretrainConfig) -> None:
    after(trainable, "pack", _with_forgetful_way)


def _with_forgetful_way(out: tuple[Tensor, RowOrder], *_: Any) -> tuple[Tensor, RowOrder]:
    sent_UC, way = out
    assert isinstance(way.new_way, partial)
    return sent_UC, replace(way, new_way=partial(_Forgetful, *way.new_way.args))


class _Forgetful(NodeWay):
    """A rank that passes rows on, and sums nothing of what the last rank of its node gives."""

    @torch.no_grad()
    def gathered(self, back_VC: Tensor) -> Tensor:
        heard_V1 = (self._rank_V < self._row.ranks - 1).unsqueeze(1)
        return super().gathered(torch.where(heard_V1, back_VC, 0.0))
