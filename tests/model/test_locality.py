"""The locality loss: its value by the definition, its gradient by autograd, alike however the tokens are cut."""

import pytest
import torch
import torch.nn.functional as F

from megalina.batch import Batch
from megalina.blocks.routers import check_router
from megalina.config import RouterConfig
from megalina.model.locality import ELSEWHERE, aim, locality_loss
from megalina.model.tokens import ALL, RouterTokens, router_tokens

B, S, E, NODES = 4, 6, 8, 2
SAMPLES = (3, 4, 5, 6)


def tokens() -> RouterTokens:
    """Sequences of which one ends in padding and one is nothing else."""
    numbers = torch.arange(B * S).view(B, S)
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[2, 4:] = valid[3] = False
    return router_tokens(Batch(numbers, numbers, valid, valid, numbers, None, torch.tensor(SAMPLES)))


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(B * S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(prob_AE: torch.Tensor, of: RouterTokens) -> torch.Tensor:
    total = prob_AE.new_zeros(())
    for b, sample in enumerate(SAMPLES):
        valid = of.valid_A.view(B, S)[b]
        if valid.any():
            mean_E = prob_AE.view(B, S, E)[b, valid].mean(0)
            near = [i for i in range(E) if i * NODES // E == sample % NODES]
            wanted_E = torch.full((E,), ELSEWHERE / (E - len(near)), dtype=torch.float64)
            wanted_E[near] = (1 - ELSEWHERE) / len(near)
            total = total + valid.sum() * (mean_E * (mean_E / wanted_E).log()).sum()
    return total


def test_value_and_gradient_are_those_of_the_divergence() -> None:
    of = tokens()
    ours, theirs = logits().requires_grad_(), logits().requires_grad_()
    prob_TE = ours.softmax(1)
    loss = locality_loss(prob_TE, prob_TE.detach(), of, ALL, NODES)
    want = by_definition(theirs.softmax(1), of)
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)


def test_parts_of_the_tokens_add_up() -> None:
    of, prob_AE = tokens(), logits().softmax(1)
    whole = locality_loss(prob_AE, prob_AE, of, ALL, NODES)
    parts = [locality_loss(prob_AE[own], prob_AE, of, own, NODES) for own in (slice(0, 9), slice(9, B * S))]
    assert sum(p.item() for p in parts) == pytest.approx(whole.item(), rel=1e-12)


def test_it_is_nothing_at_home_finite_elsewhere_and_draws_tokens_home() -> None:
    of = tokens()
    home_B = torch.tensor(SAMPLES) % NODES
    at_home_AE = aim(home_B, E, NODES, torch.float64).repeat_interleave(S, 0)
    assert torch.allclose(at_home_AE.sum(1), torch.ones(B * S, dtype=torch.float64))
    assert locality_loss(at_home_AE, at_home_AE, of, ALL, NODES).abs() < 1e-12
    one_AE = F.one_hot(torch.zeros(B * S, dtype=torch.long), E).double()
    assert locality_loss(one_AE, one_AE, of, ALL, NODES).isfinite()
    drawn = logits().requires_grad_()
    locality_loss(drawn.softmax(1), drawn.softmax(1).detach(), of, ALL, NODES).backward()
    moved, near_AE, valid_A = (drawn - 0.1 * drawn.grad).softmax(1), at_home_AE > 1 / E, of.valid_A
    assert (moved * near_AE)[valid_A].sum() > (drawn.softmax(1) * near_AE)[valid_A].sum()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"locality_loss": 0.1}, "router.locality_loss=0.1 needs to know of how many nodes: give router.locality_nodes"),
        ({"locality_loss": 0.1, "locality_nodes": 9}, r"router.locality_nodes \(9\) is more than model.num_experts \(8\)"),
        ({"kind": "hash", "locality_loss": 0.1, "locality_nodes": 2}, "and router=hash has none"),
        ({"kind": "expert_choice", "locality_loss": 0.1, "locality_nodes": 2}, "and router=expert_choice has none"),
    ],
)
def test_what_can_not_be_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_router(RouterConfig(**settings), E, 64)
