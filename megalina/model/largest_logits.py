"""The largest attention logit of each group of heads that share a key head: what QK-clip goes by.

Fused kernels don't tell their logits, so queries and keys are multiplied once more, in blocks of queries: half of the products of
attention's own forward pass.  Letters as in `megalina/model/attend.py`.
"""

import torch
from torch import Tensor

from megalina.blocks.attention import QUERIES_A_BLOCK


@torch.no_grad()
def largest_logits(
    q_BSHd: Tensor, k_BLGd: Tensor, document_BL: Tensor | None = None, *, scale: float | None = None, window: int = 0
) -> Tensor:
    """[G], of what a query sees: keys at its own and earlier positions, of the same document if `document_BL` is given, and no
    more than `window` if that is above 0.  `scale`: of scores, None: d^-1/2."""
    batch, length, heads, size = q_BSHd.shape
    before, groups = k_BLGd.shape[1] - length, k_BLGd.shape[2]
    largest_G = q_BSHd.new_full((groups,), float("-inf"))
    if not batch:
        return largest_G
    k_BGdL = k_BLGd.permute(0, 2, 3, 1)
    for begin in range(0, length, QUERIES_A_BLOCK):
        stop = min(begin + QUERIES_A_BLOCK, length)
        queries, shared = stop - begin, heads // groups
        first, end = before + begin, before + stop  # among the keys
        q_BGrqd = q_BSHd[:, begin:stop].reshape(batch, queries, groups, shared, size).permute(0, 2, 3, 1, 4)
        logit_BGnl = torch.matmul(q_BGrqd.flatten(2, 3), k_BGdL[..., :end])
        logit_BGrql = logit_BGnl.view(batch, groups, shared, queries, end)
        hidden_Bql = torch.ones(1, queries, end, dtype=torch.bool, device=q_BSHd.device).triu(first + 1)
        if window:
            hidden_Bql = hidden_Bql | torch.ones_like(hidden_Bql).tril(first - window)
        if document_BL is not None:
            hidden_Bql = hidden_Bql | (document_BL[:, first:end, None] != document_BL[:, None, :end])
        logit_BGrql.masked_fill_(hidden_Bql[:, None, None], float("-inf"))
        largest_G = torch.maximum(largest_G, logit_BGrql.amax(dim=(0, 2, 3, 4)))
    return largest_G * (size**-0.5 if scale is None else scale)
