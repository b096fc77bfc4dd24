"""Even routing: tokens go to experts in turn, whatever the router says, so that all devices get as many rows.

No placement can be faster, so it is the bound that others are held against (Lina's Ideal).  The text means nothing.

Shapes: T tokens of this rank, K choices a token, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EvenRouting:
    """Choice k of token t goes to expert (t x K + k + an offset of the rank) mod E; what went to nobody (id E) still does.

    Tokens are counted without padding; the offset spreads ranks with few tokens over the experts."""

    num_experts: int
    num_ranks: int
    rank: int

    def __call__(self, layer: int, chosen_TK: Tensor) -> Tensor:
        """`layer` counts MoE layers; all get the same."""
        nobody_T = (chosen_TK == self.num_experts).all(1)
        place_T = (~nobody_T).cumsum(0) - 1
        top_k = chosen_TK.shape[1]
        offset = self.rank * self.num_experts // self.num_ranks
        even_TK = (place_T[:, None] * top_k + torch.arange(top_k, device=chosen_TK.device) + offset) % self.num_experts
        return torch.where(chosen_TK == self.num_experts, chosen_TK, even_TK.to(chosen_TK.dtype))
