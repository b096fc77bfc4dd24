"""Two pipeline stages share an embedding, and each sums its own part of the gradient.

The first stage looks words up in it, the last one computes logits with it; each has a copy, and a gradient by its use.  Both
parts have to be summed on both stages, or the copies drift apart, and the model has two embeddings where it should have one.

Reported as https://github.com/uw-syfi/piper/issues/13 and https://github.com/NVIDIA/Megatron-LM/pull/6500
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant embedding_summed_by_stages
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
WORDS, WIDTH, RATE = 12, 8, 0.1
words, labels = torch.randint(WORDS, (2, 16))
embedding = torch.randn(WORDS, WIDTH)


def one_process() -> Tensor:
    """The embedding after a step of SGD."""
    shared = embedding.clone().requires_grad_()
    cross_entropy(shared[words].tanh() @ shared.T, labels).backward()
    return embedding - RATE * shared.grad


def stages(summed: bool) -> tuple[Tensor, Tensor]:
    """The embedding on the first stage and on the last, after a step."""
    first, last = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    sent = first[words].tanh()
    got = sent.detach().requires_grad_()
    cross_entropy(got @ last.T, labels).backward()
    sent.backward(got.grad)
    both = first.grad + last.grad  # an all-reduce between the two stages
    of_first, of_last = (both, both) if summed else (first.grad, last.grad)
    return embedding - RATE * of_first, embedding - RATE * of_last


one, right, wrong = one_process(), stages(summed=True), stages(summed=False)
print(f"{'one process':19} the embedding moves by {(one - embedding).norm():.4f}")
for who, (first, last) in (("pp=2", right), ("with the bug, pp=2", wrong)):
    moved = f"{(first - embedding).norm():.4f} on the first stage, {(last - embedding).norm():.4f} on the last"
    print(f"{who:19} the embedding moves by {moved}; they differ by {(first - last).norm():.4f}")
for found in right:
    assert_close(found, one)
assert not torch.allclose(*wrong)
print("how to see it in your framework: print the embedding on the first and on the last stage after a step; both must be equal.")
