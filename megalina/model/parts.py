"""Parts in torch: a micro-batch's sequences in parts, and their tokens and routed rows.

With tensor parallelism each rank may have a slice of the tokens.  A part is then the same share of every rank's slice, so that
nothing need be sent to cut or to join.  T tokens here, N rows, D width, K experts a token, E experts.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.model.block_functions import BlockFunctions
from megalina.model.late_gradients import Later
from megalina.model.permute import RowOrder, reorder, row_order
from megalina.step.program import Instruction

SLICED = ("own", "moe_n", "weight", "rows")  # values of the tokens that a rank routes
# of all tensor-parallel ranks' tokens, in any layout ...
GATHERED = ("n_all", "m_all", "a_part", "o_part", "q", "k", "v", "square_part", "square", "kv", "q_turned")
EVERYBODYS = ("kv_all", "qkv", "qkv_all", "mixed_part", "mixed_all")  # ... and of all context-parallel ones


class Parts(BlockFunctions):
    def bind(self, instruction: Instruction, later: Later | None) -> Callable[..., Any]:
        reads, writes = instruction.reads, instruction.writes
        match instruction.name:
            case "cut_batch":
                return partial(self.cut_batch, len(writes))
            case "cut_rows":
                return partial(self.cut_rows, len(writes) // len(reads))
            case "cut_tokens":
                return partial(self.cut_tokens, len(writes) // len(reads), [self._slices(v) for v in reads])
        return partial(self.join_tokens, len(reads) // len(writes), [self._slices(v) for v in writes])

    def _slices(self, value: str) -> int:
        """Of how many ranks a value has the tokens."""
        head = value.split(".")[0]
        if head in EVERYBODYS:
            return self.share.ranks * self.share.contexts
        return self.share.ranks if head in GATHERED else 1 if self.share.cut or head in SLICED else self.share.ranks

    def cut_batch(self, parts: int, batch: Batch) -> tuple[Batch, ...]:
        return tuple(batch.part(i, parts, self.share.ranks) for i in range(parts))

    def cut_tokens(self, parts: int, slices: list[int], *values: Tensor) -> tuple[Tensor, ...]:
        """Each value [T, ...] -> its parts, value after value."""
        return tuple(
            part.flatten(0, 1)
            for value, ranks in zip(values, slices, strict=True)
            for part in value.view(ranks, parts, -1, *value.shape[1:]).unbind(1)
        )

    def join_tokens(self, parts: int, slices: list[int], *values: Tensor) -> tuple[Tensor, ...]:
        """What `cut_tokens` undoes."""
        out = []
        for i, ranks in enumerate(slices):
            pieces = [v.view(ranks, -1, *v.shape[1:]) for v in values[i * parts : (i + 1) * parts]]
            out.append(torch.cat(pieces, 1).flatten(0, 1))
        return tuple(out)

    def cut_rows(self, parts: int, rows_ND: Tensor, order: RowOrder) -> tuple[Any, ...]:
        """The rows of each part's tokens, in the order of experts, and then each part's order."""
        num_experts, tokens = len(order.count_E), len(order.row_TK) // parts
        part_N = order.token_N // max(tokens, 1)
        index_N = torch.sort(part_N, stable=True).indices
        inverse_N = torch.empty_like(index_N).scatter_(0, index_N, torch.arange(len(index_N), device=index_N.device))
        counts = torch.bincount(part_N, minlength=parts).tolist()
        place_N = torch.arange(num_experts, device=part_N.device).repeat_interleave(order.count_E, output_size=len(part_N))
        place_TK = torch.cat([place_N, place_N.new_full((1,), num_experts)])[order.row_TK]
        orders = [row_order(place_tK, num_experts) for place_tK in place_TK.split(max(tokens, 1))]
        orders = [replace(of_part, expert_E=order.expert_E) for of_part in orders]
        return (*reorder(rows_ND, index_N, inverse_N).split(counts), *orders)
