"""Auxiliary losses depend on how tokens are split over ranks.

The balance loss is a product of two means over tokens: how many chose an expert, and how probable it was.  The product of means
of a rank, averaged over the ranks, is another number: each rank balances its own tokens, a part of a sequence with tensor or
context parallelism.  Sums over own tokens, of means over all tokens, add up to the loss of one process.

Reported as https://github.com/NVIDIA/Megatron-LM/issues/1652 and https://github.com/NVIDIA/Megatron-LM/pull/5047
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant balance_loss_per_rank
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
EXPERTS = 4
x, router = torch.randn(32, 8) + torch.linspace(-1, 1, 32)[:, None], torch.randn(8, EXPERTS)


def share_that_chose_each(tokens: Tensor) -> Tensor:
    return torch.bincount((tokens @ router).argmax(1), minlength=EXPERTS) / len(tokens)


def balance(ranks: int, share_is_of_rank: bool = False) -> tuple[Tensor, Tensor]:
    """The loss, and the router's gradient."""
    w, loss = router.clone().requires_grad_(), torch.zeros(())
    for own in x.chunk(ranks):
        share = share_that_chose_each(own if share_is_of_rank else x)  # of all: an all-reduce of the counts
        loss = loss + EXPERTS * (share * (own @ w).softmax(1)).sum() / len(x)
    loss.backward()
    return loss.detach(), w.grad


one = balance(1)
print(f"{'one process':26} balance loss {one[0]:.4f}, gradient of the router: norm {one[1].norm():.4f}")
for ranks in (2, 4):
    right, wrong = balance(ranks), balance(ranks, share_is_of_rank=True)
    for who, (loss, gradient) in ((f"tp*cp={ranks}", right), (f"with the bug, tp*cp={ranks}", wrong)):
        print(f"{who:26} balance loss {loss:.4f}, gradient of the router: norm {gradient.norm():.4f}")
    assert_close(right, one)
    assert not torch.allclose(wrong[0], one[0])
    assert not torch.allclose(wrong[1], one[1])
assert not torch.allclose(balance(2, True)[0], balance(4, True)[0])
print(
    "how to see it in your framework: print the auxiliary loss and the router's gradient for several tp and cp; "
    "all must be equal to those of one process."
)
