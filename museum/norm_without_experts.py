"""With expert and tensor parallelism, the norm of the gradients leaves some experts out.

A parameter that tensor parallelism doesn't cut is on every rank of the group, so that only the first rank's copy counts.  An
expert isn't cut either, but each rank has another one: those of all ranks but the first are taken for copies, and left out.
The norm is too small and less is clipped; as long as nothing is clipped, the weights are right.

Reported as https://github.com/NVIDIA/Megatron-LM/pull/5916
The same in this project, of all experts: python tools/verify_layouts.py model=tiny --ranks 4 --plant norm_without_experts
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)


@dataclass
class Gradient:
    values: Tensor
    is_cut: bool = False
    is_expert: bool = False


matrix, layer_norm, experts = torch.randn(8, 8), torch.randn(8), 3 * torch.randn(2, 8, 8)
cuts = zip(matrix.chunk(2), experts)
ranks = [[Gradient(part, is_cut=True), Gradient(layer_norm), Gradient(expert, is_expert=True)] for part, expert in cuts]


def counts(g: Gradient, rank: int) -> bool:
    return g.is_cut or g.is_expert or rank == 0


def counts_unless_copy(g: Gradient, rank: int) -> bool:
    return g.is_cut or rank == 0


def norm(of: Callable[[Gradient, int], bool]) -> float:
    squares = [g.values.square().sum() for rank, held in enumerate(ranks) for g in held if of(g, rank)]
    return torch.stack(squares).sum().sqrt().item()


def step(norm: float, clip: float) -> float:
    """By which a layer norm's first weight moves."""
    return layer_norm[0].item() * min(1.0, clip / norm)


one = torch.cat([matrix.flatten(), layer_norm, experts.flatten()]).norm().item()
right, wrong = norm(counts), norm(counts_unless_copy)
for who, found in (("one process", one), ("tp=2, ep=2", right), ("with the bug, tp=2, ep=2", wrong)):
    print(f"{who:25} norm {found:.4f}; a weight moves by {step(found, 1000.0):.4f}, clipped at 1 by {step(found, 1.0):.4f}")
assert abs(right - one) < 1e-12 and wrong < 0.9 * one
assert step(wrong, 1000.0) == step(one, 1000.0) and abs(step(wrong, 1.0)) > abs(step(one, 1.0))
print("how to see it in your framework: print the norm of the gradients without and with expert parallelism; it must be equal.")
