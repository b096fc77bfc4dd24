"""Groups of experts are ranked by their best expert where the model was trained with the sum of the best two.

DeepSeek-V2 takes the groups whose best expert scores highest, DeepSeek-V3 those whose best two do together.  The other rule gives
most tokens the same experts, and some tokens experts that were never trained on their like.

Reported as https://github.com/vllm-project/vllm/pull/13474 and https://github.com/NVIDIA/Megatron-LM/issues/1378
The same in this project: python tools/verify_layouts.py model=tiny --ranks 4 --plant group_rule_of_other_family
"""

from collections.abc import Callable

import torch
from torch import Tensor

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
GROUPS, GROUPS_OF_TOKEN, TOP_K = 4, 2, 2
scores = torch.rand(1000, 16)
scores[0] = torch.tensor([0.9, 0.1, 0.1, 0.1] + [0.75, 0.6, 0.1, 0.1] + [0.8, 0.7, 0.1, 0.1] + [0.1, 0.1, 0.1, 0.1])


def best_two(grouped: Tensor) -> Tensor:
    return grouped.topk(2, 2).values.sum(2)


def best_one(grouped: Tensor) -> Tensor:
    return grouped.amax(2)


def chosen(scores: Tensor, worth: Callable[[Tensor], Tensor]) -> Tensor:
    """[token, TOP_K]: experts, in the order of their numbers."""
    grouped = scores.unflatten(1, (GROUPS, -1))
    groups = worth(grouped).topk(GROUPS_OF_TOKEN, 1).indices
    open_ = torch.zeros(len(scores), GROUPS).scatter(1, groups, 1.0).bool()[:, :, None]
    return grouped.masked_fill(~open_, 0.0).flatten(1).topk(TOP_K, 1).indices.sort(1).values


def one_token(score: Tensor) -> list[int]:
    """By hand."""
    of_group = [sorted(group.tolist())[-2:] for group in score.chunk(GROUPS)]
    best = sorted(range(GROUPS), key=lambda g: -sum(of_group[g]))[:GROUPS_OF_TOKEN]
    experts = [e for e in range(len(score)) if e // (len(score) // GROUPS) in best]
    return sorted(sorted(experts, key=lambda e: -score[e])[:TOP_K])


one = torch.tensor([one_token(s) for s in scores])
right, wrong = (torch.cat([chosen(own, worth) for own in scores.chunk(2)]) for worth in (best_two, best_one))
for who, found in (("one process, by hand", one), ("2 ranks", right), ("with the bug, 2 ranks", wrong)):
    print(f"{who:22} experts of the first token {found[0].tolist()}; {(found != one).any(1).sum()} of 1000 tokens have others")
assert torch.equal(right, one)
assert wrong[0].tolist() != one[0].tolist()
print("how to see it in your framework: print each token's experts, and those of the model's own code; both must be equal.")
