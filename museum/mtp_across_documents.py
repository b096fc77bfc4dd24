"""Multi-token prediction counts words of the next document.

It predicts the word after the next.  Labels are shifted by one place once more, also over the border between two documents that
are packed into a row: their last places learn to predict words that have nothing to do with them.

Reported as https://github.com/NVIDIA/Megatron-LM/pull/6205 and https://github.com/AI-Hypercomputer/maxtext/pull/4600
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant mtp_across_documents
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
WORDS, AHEAD = 16, 2
documents = [torch.randint(WORDS, (length,)) for length in (5, 9)]
here, following, head = torch.randn(WORDS, 8), torch.randn(WORDS, 8), torch.randn(8, WORDS)


def losses(words: Tensor) -> Tensor:
    """Of each place that has a word two places on; the layer sees the word of the place, and the next."""
    hidden = (here[words[:-AHEAD]] + following[words[1 : 1 - AHEAD]]).tanh()
    return cross_entropy(hidden @ head, words[AHEAD:], reduction="none")


def packed(counts_across: bool) -> tuple[Tensor, int]:
    """The loss of both documents in one row, and how many places count."""
    document = torch.cat([torch.full_like(words, number) for number, words in enumerate(documents)])
    counts = document[AHEAD:] == document[:-AHEAD]
    if counts_across:
        counts = torch.ones_like(counts)
    return losses(torch.cat(documents))[counts].mean(), int(counts.sum())


each = [losses(words) for words in documents]  # a rank each
tokens = sum(len(found) for found in each)
by_itself = sum(found.sum() / tokens for found in each), tokens
right, wrong = packed(counts_across=False), packed(counts_across=True)
for who, (loss, places) in (("2 ranks, a document each", by_itself), ("packed", right), ("with the bug, packed", wrong)):
    print(f"{who:26} loss of multi-token prediction {loss:.4f}, of {places} places")
assert_close(right, by_itself)
assert not torch.allclose(wrong[0], by_itself[0])
assert wrong[1] == tokens + AHEAD
print(
    "how to see it in your framework: print the loss of multi-token prediction of two documents packed together, and of each by "
    "itself, weighted by their tokens; both must be equal."
)
