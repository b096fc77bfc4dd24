"""Bugs in attention."""

from typing import Any

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.model.attention import Attention, Heads
from megalina.model.late_gradients import Later
from megalina.model.mla import LatentHeads
from megalina.model.rope import rotate
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction
from megalina.verify.bugs.change import Function, around
from megalina.zigzag import by_rank


def rope_interleaved(trainable: Trainable, config: PretrainConfig) -> None:
    """Queries' pairs are neighbours; the keys' are not."""
    for layer in trainable.gpt.layers:
        if isinstance(layer.attention, LatentHeads):
            layer.attention.positioned_queries = _with_neighbours(layer.attention)  # type: ignore[method-assign]


def _with_neighbours(heads: LatentHeads) -> Function:
    right = heads.positioned_queries

    def queries(q_Tx: Tensor, batch: Batch, later: Later | None) -> Tensor:
        q_BSHx = right(q_Tx, batch, later)
        cos_BSi, sin_BSi = heads.rotary[0].rows(batch, q_BSHx.dtype)
        still, turned = rotate(q_BSHx, cos_BSi, -sin_BSi, heads.still).split((heads.still, heads.turned), -1)
        halves = torch.cat([turned[..., 0::2], turned[..., 1::2]], -1)
        first, second = rotate(halves, cos_BSi, sin_BSi).chunk(2, -1)
        return torch.cat([still, torch.stack([first, second], -1).flatten(-2)], -1)

    return queries


def norm_of_own_heads(trainable: Trainable, config: PretrainConfig) -> None:
    """Each tp rank norms its heads' queries and keys by their own squares."""

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name != "attention_core":
            return function
        heads, ranks = trainable.gpt.layers[instruction.layer].attention, trainable.mesh.tp.size
        return lambda q, k, v, square, batch: function(q, k, v, ranks * heads.squares(q, k), batch)

    around(trainable, of)


def window_too_wide(trainable: Trainable, config: PretrainConfig) -> None:
    """A token sees one token more than its window has."""
    for layer in trainable.gpt.layers:
        if layer.attention.window:
            layer.attention.window += 1


def zigzag_undone_wrongly(trainable: Trainable, config: PretrainConfig) -> None:
    """What ranks have is put together rank after rank, as if each had one run of tokens."""

    def of(instruction: Instruction, function: Function) -> Function:
        place = {"attention_gathered": 1, "attention_of_heads": 0}.get(instruction.name)
        if place is None:
            return function

        def joined(*values: Any, **asked: Any) -> Any:
            batch: Batch = values[-1]
            rows = values[place].unflatten(0, (batch.contexts, len(batch.sample_B), -1)).transpose(0, 1).flatten(1, 2)
            return function(*values[:place], by_rank(rows, batch.contexts), *values[place + 1 :], **asked)

        return joined

    around(trainable, of)


def mask_of_another_piece(trainable: Trainable, config: PretrainConfig) -> None:
    """The mask of a rank's second piece is that of the piece right behind its first."""
    for layer in trainable.gpt.layers:
        functions = layer.functions["attention"]
        assert isinstance(functions, Attention)
        functions.piece_ends = _neighbours(functions)  # type: ignore[method-assign]


def _neighbours(functions: Attention) -> Function:
    right = functions.piece_ends

    def ends(batch: Batch) -> list[int]:
        first, _ = right(batch)
        return [first, first + batch.tokens_BS.shape[1] // 2]

    return ends


def sinks_left_out(trainable: Trainable, config: PretrainConfig) -> None:
    for layer in trainable.gpt.layers:
        name = "mixed" if isinstance(layer.attention, Heads) else "attended"  # of latent heads
        setattr(layer.attention, name, _without_sinks(layer.attention, getattr(layer.attention, name)))


def _without_sinks(heads: nn.Module, right: Function) -> Function:
    """They are parameters still, of which nobody asks."""

    def mixed(*arguments: Any) -> Tensor:
        sinks: Any = heads.sinks
        heads.register_parameter("sinks", None)
        try:
            return right(*arguments)
        finally:
            heads.register_parameter("sinks", sinks)

    return mixed
