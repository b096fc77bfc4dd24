"""Balance: the load-balance loss of Switch Transformers (Fedus et al. 2022, section 2.2), for top-k routing.

E experts, G groups of tokens, T tokens, L layers.  A group's loss is E / top_k x sum over experts of
(share of the group's tokens that chose the expert) x (mean probability of the expert): 1 when both are even.
Shares are counts, without gradient and before drops; so each rank can add its own tokens' part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def balance_loss(prob_TE: Tensor, group_T: Tensor, chosen_GE: Tensor, tokens_G: Tensor, top_k: int) -> Tensor:
    """Scalar: these tokens' part of the sum over groups of (tokens of the group) x (loss of the group).

    `group_T`: each token's group, G for padding; `chosen_GE`: counts over all tokens of the group.
    """
    num_experts = prob_TE.shape[1]
    factor_G = (num_experts / top_k) / tokens_G.clamp(min=1).to(prob_TE.dtype)
    share_GE = chosen_GE.to(prob_TE.dtype) * factor_G[:, None]
    share_TE = F.pad(share_GE, (0, 0, 0, 1))[group_T]
    return torch.dot(prob_TE.reshape(-1), share_TE.view(-1))


def global_balance(prob_LE: Tensor, chosen_LE: Tensor, valid_tokens: Tensor | int, top_k: int) -> Tensor:
    """Scalar: a rank's part of valid_tokens x (sum over layers of the loss), all tokens of all ranks being one group.

    `prob_LE`: sums of probabilities over the rank's own tokens; `chosen_LE`, `valid_tokens`: counts over all ranks.
    """
    tokens = torch.as_tensor(valid_tokens).clamp(min=1)  # nothing but padding: 0, not nan
    share_LE = chosen_LE.to(prob_LE.dtype) * (prob_LE.shape[1] / top_k) / tokens
    return (prob_LE * share_LE).sum()
