"""Padding counts as tokens.

The losses of padded places are set to zero, and the sum is divided by the number of all places.  Batches with more padding weigh
less, and ranks whose sequences are short pull the mean down; the curve looks like any other.

Reported as https://github.com/huggingface/transformers/issues/28255 and https://github.com/huggingface/transformers/issues/31464
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant padding_counted
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
WORDS, LENGTHS = 16, (8, 3, 6, 2)
table = torch.randn(WORDS, WORDS)  # a model: which word follows a word
sequences = [torch.randint(WORDS, (length + 1,)) for length in LENGTHS]


def losses(length: int) -> tuple[Tensor, Tensor]:
    """Of a batch padded to a length, sequence by place, zero where there is padding; and which places are valid."""
    padded = torch.stack([pad(s, (0, length + 1 - len(s))) for s in sequences])
    valid = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    return cross_entropy(table[padded[:, :-1]].mT, padded[:, 1:], reduction="none") * valid, valid


def loss(length: int, ranks: int, padding_counts: bool = False) -> Tensor:
    """Each rank divides its sum by the number of all ranks' tokens."""
    by_place, valid = losses(length)
    counted = torch.ones_like(valid) if padding_counts else valid
    tokens = sum(own.sum() for own in counted.chunk(ranks))  # an all-reduce
    return sum(own.sum() / tokens for own in by_place.chunk(ranks))


one = torch.cat([cross_entropy(table[s[:-1]], s[1:], reduction="none") for s in sequences]).mean()  # no padding at all
print(f"{'one process, no padding':38} loss {one:.4f}")
for length in (8, 16, 32):
    right, wrong = loss(length, 2), loss(length, 2, padding_counts=True)
    print(f"{f'2 ranks, padded to {length}':38} loss {right:.4f}")
    print(f"{f'with the bug, 2 ranks, padded to {length}':38} loss {wrong:.4f}, {wrong / one:.2f} times as large")
    assert_close(right, one)
    assert not torch.allclose(wrong, one)
print(
    "how to see it in your framework: print the loss of a batch, and of the same batch with twice as much padding behind each "
    "sequence; both must be equal."
)
