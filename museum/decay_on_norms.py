"""Weight decay applies to norms and biases.

Weights that are not matrices are exempt from decay, each by an argument where it is made.  A norm that was rewritten leaves the
argument out, and the default is to decay: its weight shrinks towards zero, which has nothing to do with a smaller function.

Reported as https://github.com/ServiceNow/Fast-LLM/issues/542
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant decay_on_norms
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
RANKS, RATE, DECAY = 2, 0.1, 0.1


@dataclass
class Parameter:
    value: Tensor
    weight_decay: bool = True


def model(norm_says: dict[str, bool]) -> list[Parameter]:
    matrix, norm, bias = torch.full((4, 4), 0.5), torch.ones(4), torch.full((4,), 0.5)
    return [Parameter(matrix), Parameter(norm, **norm_says), Parameter(bias, **norm_says)]


def flat(parameters: list[Parameter]) -> tuple[Tensor, Tensor]:
    """All values, and of each whether it decays."""
    decays = [torch.full_like(p.value, p.weight_decay) for p in parameters]
    return torch.cat([p.value.flatten() for p in parameters]), torch.cat([d.flatten() for d in decays])


def step(parameters: list[Parameter], ranks: int) -> Tensor:
    """AdamW with a gradient of zero, each rank on its shard: nothing but decay is left of it."""
    shards = zip(*(tensor.chunk(ranks) for tensor in flat(parameters)))
    return torch.cat([own - RATE * DECAY * decays * own for own, decays in shards])


one = torch.cat([p.value.flatten() * (1 - RATE * DECAY if p.value.dim() > 1 else 1) for p in model({})])
right, wrong = step(model({"weight_decay": False}), RANKS), step(model({}), RANKS)
for who, found in (("one process", one), ("2 ranks", right), ("with the bug, 2 ranks", wrong)):
    matrix, norm, bias = found.split([16, 4, 4])
    values = f"a matrix {matrix[0]:.4f} (0.5), a norm {norm[0]:.4f} (1), a bias {bias[0]:.4f} (0.5)"
    print(f"{who:22} behind a step with gradient zero: {values}")
assert_close(right, one)
assert torch.equal(right[16:20], torch.ones(4))
assert not torch.allclose(wrong[16:], one[16:])
print(
    "how to see it in your framework: print a norm's weight before and after a step with all gradients at zero, on one rank and "
    "on several; it must not move."
)
