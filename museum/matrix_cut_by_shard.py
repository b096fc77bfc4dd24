"""Muon takes a rank's part of a matrix for a matrix.

ZeRO cuts weights and gradients into shards without regard to matrices, which is fine for an optimizer that looks at one number
at a time.  Muon looks at whole matrices: a part of one, made orthogonal, is no part of the orthogonal whole.

Reported as https://github.com/deepspeedai/DeepSpeed/issues/8437
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant matrix_cut_by_shard
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RANKS = 2
x, weight = torch.randn(32, 8), torch.randn(8, 6)


def backward(tokens: Tensor) -> Tensor:
    w = weight.clone().requires_grad_()
    ((tokens @ w).tanh().square().sum() / len(x)).backward()
    return w.grad


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest; Newton-Schulz iterations come close to it."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def shards() -> list[Tensor]:
    """Each rank's rows of the gradient, behind a reduce-scatter."""
    return list(sum(backward(own) for own in x.chunk(RANKS)).chunk(RANKS))


def of_gathered() -> Tensor:
    """Each rank makes the whole matrix orthogonal, and updates its rows."""
    return torch.cat([orthogonal(torch.cat(shards())).chunk(RANKS)[rank] for rank in range(RANKS)])


def of_shards() -> Tensor:
    return torch.cat([orthogonal(own) for own in shards()])


gradient = backward(x)
one, right, wrong = orthogonal(gradient), of_gathered(), of_shards()
for who, update in (("one process", one), ("2 ranks", right), ("with the bug, 2 ranks", wrong)):
    angle = cosine_similarity(update.flatten(), one.flatten(), 0)
    print(f"{who:22} update: norm {update.norm():.4f}, cosine with that of one process {angle:.4f}")
assert_close(torch.cat(shards()), gradient)
assert_close(right, one)
assert not torch.allclose(wrong, one)
print("how to see it in your framework: print a matrix's update with one rank and with two; both must be equal.")
