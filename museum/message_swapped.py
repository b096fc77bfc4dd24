"""Two messages between the same two stages are received in each other's place.

Messages of the same two ranks have no names: the first that is sent is the first that is received.  Where a stage posts receives
in another order than the other stage sends, shapes fit, and it computes one micro-batch with the labels of another.

Reported as https://github.com/NVIDIA/Megatron-LM/pull/5271 and https://github.com/NVIDIA/Megatron-LM/issues/1450
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant message_swapped
"""

from collections import deque

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
WORDS = 6
xs, labels = torch.randn(2, 10, 8), torch.randint(WORDS, (2, 10))  # by micro-batch
first, second = torch.randn(8, 8), torch.randn(8, WORDS)  # a stage each


class Link:
    """Between two stages."""

    def __init__(self) -> None:
        self.under_way: deque[Tensor] = deque()

    def send(self, message: Tensor) -> None:
        self.under_way.append(message)

    def receive(self) -> Tensor:
        return self.under_way.popleft()


def pipeline(receives: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """What the second stage takes for each micro-batch's input, and the loss.  `receives`: in which order it asks for them."""
    link = Link()
    for x in xs:  # both are computed before the other stage is ready
        link.send((x @ first).tanh())
    got = {micro_batch: link.receive() for micro_batch in receives}
    return [got[0], got[1]], torch.stack([cross_entropy(got[m] @ second, labels[m]) for m in (0, 1)]).mean()


inputs = [(x @ first).tanh() for x in xs]
one = inputs, cross_entropy(torch.cat(inputs) @ second, labels.flatten())
right, wrong = pipeline((0, 1)), pipeline((1, 0))
for who, (found, loss) in (("one process", one), ("pp=2", right), ("with the bug, pp=2", wrong)):
    print(f"{who:19} input of the second stage: norms {found[0].norm():.4f} and {found[1].norm():.4f}; loss {loss:.4f}")
assert_close(right, one)
assert_close(wrong[0], inputs[::-1])
assert not torch.allclose(wrong[1], one[1])
print("how to see it in your framework: print the second stage's input per micro-batch, with pp=1 and pp=2; both must be equal.")
