"""The mutual information loss: its value by the definition, its gradient by autograd, its extremes."""

import math

import pytest
import torch

from megalina.batch import Batch
from megalina.blocks.routers import check_router
from megalina.config import RouterConfig
from megalina.model.mutual_information import mutual_information_loss
from megalina.model.tokens import ALL, Groups, router_tokens

B, S, E = 3, 8, 4


def groups(together: bool) -> Groups:
    numbers = torch.arange(B * S).view(B, S)
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[2, 5:] = False
    tokens = router_tokens(Batch(numbers, numbers, valid, valid, numbers, None, torch.arange(B)))
    return tokens.together if together else tokens.by_sequence


def log_prob(seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(B * S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).log_softmax(1)


def by_definition(log_AE: torch.Tensor, of: Groups) -> torch.Tensor:
    total = log_AE.new_zeros(())
    for g in range(of.number):
        log_tE = log_AE[of.group_A == g]
        mean_E = log_tE.exp().mean(0)
        entropy = -(log_tE.exp() * log_tE).sum(1).mean()
        total = total + len(log_tE) * (entropy + (mean_E * mean_E.log()).sum())
    return total


@pytest.mark.parametrize("together", [False, True])
def test_value_and_gradient_are_those_of_the_definition(together: bool) -> None:
    of = groups(together)
    ours, theirs = log_prob().requires_grad_(), log_prob().requires_grad_()
    log_TE = ours.log_softmax(1)
    loss = mutual_information_loss(log_TE, log_TE.detach(), of, ALL)
    want = by_definition(theirs.log_softmax(1), of)
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12) and loss < 0
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)
    parts = [mutual_information_loss(log_TE[own], log_TE.detach(), of, own) for own in (slice(0, 11), slice(11, B * S))]
    assert sum(p.item() for p in parts) == pytest.approx(loss.item(), rel=1e-12)


def test_extremes() -> None:
    of, tokens = groups(True), int(groups(True).tokens_G)
    even = torch.full((B * S, E), 1 / E, dtype=torch.float64).log()
    assert mutual_information_loss(even, even, of, ALL).abs() < 1e-12
    same = torch.tensor([[0.97, 0.01, 0.01, 0.01]], dtype=torch.float64).log().expand(B * S, E)
    assert mutual_information_loss(same, same, of, ALL).abs() < 1e-9  # sure, but all of one
    sure = torch.eye(E, dtype=torch.float64).repeat(B * S // E, 1).clamp(min=1e-30).log()
    best = -tokens * math.log(E)
    assert best < mutual_information_loss(sure, sure, of, ALL) < 0.95 * best  # padding makes them a little uneven


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "hash"}, "and router=hash has none: set it to 0"),
        ({"kind": "expert_choice"}, "and router=expert_choice has none: set it to 0"),
        ({"group": "global"}, "set router.group=sequence or micro_batch"),
    ],
)
def test_what_can_not_be_is_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_router(RouterConfig(mutual_information_loss=0.1, **settings), E, 64)
