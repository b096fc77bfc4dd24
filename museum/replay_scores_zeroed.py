"""Replayed experts outside of the router's own choice get weight zero.

A replay fixes which experts a token goes to; their weights are the router's scores.  They are looked up in the tensor from which
selection has deleted all scores but those of its own choice, so that an expert which the router wouldn't choose any more weighs
nothing, and isn't trained: just where the replay matters.

Reported as https://github.com/ISEEKYAN/Megatron-LM/pull/79
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant replay_scores_zeroed
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
EXPERTS, TOP_K, LAST = 4, 2, 3
x, router, experts = torch.randn(16, 8), 0.3 * torch.randn(8, EXPERTS), torch.randn(EXPERTS, 8, 8)
unlike = torch.tensor([0.0, 0.0, 0.0, -4.0])  # nobody would choose the last expert now
replayed = torch.stack([torch.randint(LAST, (16,)), torch.full((16,), LAST)], 1)  # but each token went there


def weights(tokens: Tensor, chosen: Tensor, of_own_choice: bool) -> Tensor:
    score = (tokens @ router + unlike).softmax(1)
    if of_own_choice:
        own = score.topk(TOP_K, 1).indices
        score = torch.zeros_like(score).scatter(1, own, score.gather(1, own))
    return score.gather(1, chosen)


def expert_gradients(ranks: int, of_own_choice: bool = False) -> Tensor:
    w = experts.clone().requires_grad_()
    for tokens, chosen in zip(x.chunk(ranks), replayed.chunk(ranks)):
        weight = weights(tokens, chosen, of_own_choice)
        out = torch.einsum("tk,td,tkdo->to", weight, tokens, w[chosen])
        (out.square().sum() / len(x)).backward()  # summed over ranks
    return w.grad


assert not ((x @ router + unlike).topk(TOP_K, 1).indices == LAST).any()
one, right, wrong = expert_gradients(1), expert_gradients(2), expert_gradients(2, of_own_choice=True)
for who, found in (("one process", one), ("2 ranks", right), ("with the bug, 2 ranks", wrong)):
    print(f"{who:22} gradient of the expert that is replayed alone: norm {found[LAST].norm():.6f}")
assert_close(right, one)
assert one[LAST].norm() > 0
assert not wrong[LAST].any()
print(
    "how to see it in your framework: replay choices that the router would not make, and print these experts' gradients, in your "
    "layout and with the scores of all experts on one process; both must be equal, and not zero."
)
