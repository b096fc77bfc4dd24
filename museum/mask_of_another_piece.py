"""With context parallelism a mask is made for tokens in another order than that in which ranks hold them.

So that ranks have as much to do, each holds a piece from the front of a sequence and one from its end.  Keys are gathered, and
put into the order of the sequence; a rank's mask says which of them its queries see.  Made for one run of tokens, it is right for
the rank's first piece, and shows the second one the tokens that a piece right behind the first would see.

Reported as https://github.com/AI-Hypercomputer/maxtext/pull/4364
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant mask_of_another_piece
"""

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RANKS, TOKENS, WIDTH = 4, 32, 8
PIECE = TOKENS // (2 * RANKS)
q, k, v = torch.randn(3, TOKENS, WIDTH)


def attention(queries: Tensor, position: Tensor) -> Tensor:
    """`position`: of the queries, as the mask has it."""
    scores = (queries @ k.T / WIDTH**0.5).masked_fill(torch.arange(TOKENS) > position[:, None], float("-inf"))
    return scores.softmax(1) @ v


def held(rank: int) -> Tensor:
    """The tokens of a rank."""
    first, second = rank * PIECE, (2 * RANKS - 1 - rank) * PIECE
    return torch.cat([torch.arange(first, first + PIECE), torch.arange(second, second + PIECE)])


def one_run(rank: int) -> Tensor:
    return torch.arange(rank * PIECE, (rank + 2) * PIECE)


one = attention(q, torch.arange(TOKENS))
for rank in range(RANKS):
    tokens = held(rank)
    right, wrong = attention(q[tokens], tokens), attention(q[tokens], one_run(rank))
    for who, out in (("cp=4", right), ("with the bug, cp=4", wrong)):
        first, second = (out - one[tokens]).norm(dim=1).split(PIECE)
        errors = f"{first.max():.4f} in its first piece, {second.max():.4f} in its second"
        print(f"{who:19} rank {rank}: output minus that of one process: {errors}")
    assert_close(right, one[tokens])
    assert_close(wrong[:PIECE], one[tokens[:PIECE]])
    assert torch.allclose(wrong, one[tokens]) == (rank == RANKS - 1)  # the last rank's pieces are neighbours
print(
    "how to see it in your framework: print attention's output token by token with cp=1 and with cp=2, in the order of the "
    "sequence; both must be equal."
)
