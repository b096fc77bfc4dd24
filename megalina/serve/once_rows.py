"""Rows that travel to a device once, however many of its slots a token has chosen (`infer.dispatch=once_per_rank`).

Beside the token a packed row has a byte for each slot of the device: how many of its choices are there.  What experts give comes
back row by row: then it is added up in the order of choices, wherever experts sit, and a placement never changes an answer.

T tokens, K choices a token, U packed rows, R ranks (the devices), S slots of each, N rows (token and slot), D model width, C
columns of a packed row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalina.model.once_moe import pack_order
from megalina.model.permute import RowOrder


def pack(x_TD: Tensor, order: RowOrder, slots: int) -> tuple[Tensor, RowOrder]:
    """`order`: of rows for all R x S slots.  Packed rows [U, C], rank after rank, and their order."""
    way, _, place_TK = pack_order(order, slots)
    packed, size = len(way.token_N), x_TD.element_size()
    chosen = torch.zeros((packed + 1) * slots, dtype=torch.uint8, device=x_TD.device)
    chosen.scatter_add_(0, place_TK.reshape(-1).clamp(max=packed * slots), torch.ones_like(place_TK, dtype=torch.uint8).view(-1))
    padded_US = chosen.new_zeros(packed, -(-slots // size) * size)
    padded_US[:, :slots] = chosen[: packed * slots].view(packed, slots)
    return torch.cat([x_TD.index_select(0, way.token_N), padded_US.view(x_TD.dtype)], 1), way


def unpack(got_UC: Tensor, from_R: Sequence[int], slots: int, width: int) -> Tensor:
    """Packed rows, `from_R` of them from each rank -> rows [N, D] as they come without packing: by source rank, slot, token."""
    chosen_US = got_UC[:, width:].contiguous().view(torch.uint8)[:, :slots]
    packed, device = len(got_UC), got_UC.device
    source_U = torch.arange(len(from_R), device=device).repeat_interleave(torch.tensor(from_R, device=device))
    block_US = source_U[:, None] * slots + torch.arange(slots, device=device)
    row_US = torch.arange(packed, device=device)[:, None].expand(packed, slots)
    times = chosen_US.reshape(-1).long()
    block_N, row_N = (x_US.reshape(-1).repeat_interleave(times) for x_US in (block_US, row_US))
    return got_UC[:, :width].index_select(0, row_N[torch.sort(block_N, stable=True).indices])
