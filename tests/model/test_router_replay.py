"""Replayed choices: tokens go where they say, by the router's own scores; all else is as if nobody had said anything."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.blocks.routers import check_router
from megalina.config import RouterConfig
from megalina.model.routers import Router, Routing, TopK
from megalina.model.tokens import RouterTokens
from tests.model.test_routers import CONFIGS, A, E, S, loss_of, make_logits, make_router, make_tokens, route, some_padding

LAYER = 2  # of `make_router`
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
DROPLESS = [name for name, config in CONFIGS.items() if not config.has_capacity and config.kind != "expert_choice"]


def drawn(top_k: int, *, without: float = 0.3, layers: int = LAYER + 1) -> Tensor:
    """int16 [A, layers, K]: distinct experts, -1 for some tokens."""
    random = torch.Generator().manual_seed(11)
    ids = torch.rand(A, layers, E, generator=random).argsort(2)[..., :top_k].short()
    ids[torch.rand(A, generator=random) < without] = -1
    return ids


def replaying(tokens: RouterTokens, replay_ALK: Tensor) -> RouterTokens:
    return replace(tokens, replay_ALK=replay_ALK)


def weights_by_hand(config: RouterConfig, logits_E: Tensor, experts: list[int]) -> list[Tensor]:
    """Of one token, from the scores of all experts."""
    if config.kind == "hash":
        return [logits_E.new_tensor(config.scale / config.top_k)] * len(experts)
    score_E = logits_E.sigmoid() if config.kind in ("sigmoid", "group_limited") else logits_E.exp() / logits_E.exp().sum()
    total = sum(score_E[e] for e in experts) if config.renormalize else 1.0
    return [config.scale * score_E[e] / total for e in experts]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", DROPLESS)
def test_tokens_go_where_they_are_sent_with_the_weights_of_the_routers_own_scores(name: str, padding: bool) -> None:
    config = replace(CONFIGS[name], noise_std=0.0)
    router, replay_ALK = make_router(config), drawn(config.top_k)
    plain = make_tokens(some_padding() if padding else None)
    logits = make_logits().requires_grad_()
    own = route(router, logits, plain)
    found = route(router, logits, replaying(plain, replay_ALK))
    want_weights, factors = [], []
    for a in range(A):
        given = replay_ALK[a, LAYER].tolist()
        experts = own.expert_TK[a].tolist() if given[0] < 0 else given
        if not plain.valid_A[a]:
            assert found.expert_TK[a].tolist() == [E] * config.top_k and not found.weight_TK[a].any()
            continue
        assert found.expert_TK[a].tolist() == experts
        want_weights += weights_by_hand(config, logits[a], experts)
        factors += [float(torch.cos(torch.tensor(a * 7.0 + e))) for e in experts]
        torch.testing.assert_close(found.weight_TK[a], torch.stack(want_weights[-config.top_k :]), **TOLERANCE)
    for field in ("balance", "z", "chosen_E", "dropped", "prob_E", "wanted_TK"):
        assert torch.equal(getattr(found, field), getattr(own, field)), field
    if router.has_scores:
        valid = plain.valid_A
        got = (found.weight_TK[valid].flatten() * torch.tensor(factors, dtype=torch.float64)).sum()
        want = sum(w * f for w, f in zip(want_weights, factors, strict=True))
        gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (got, want)]
        torch.testing.assert_close(*gradients, **TOLERANCE)


def test_scores_of_experts_that_the_router_would_not_choose_get_a_gradient() -> None:
    """Looked up among the chosen ones' alone they would be zeros, and nobody would learn."""
    router, logits = make_router(CONFIGS["topk_raw"]), make_logits().requires_grad_()
    worst_AK = logits.detach().argsort(1)[:, :2]
    found = route(router, logits, replaying(make_tokens(), worst_AK[:, None].expand(-1, LAYER + 1, -1)))
    assert torch.equal(found.expert_TK, worst_AK)
    (gradient,) = torch.autograd.grad(found.weight_TK.sum(), logits)
    assert bool((gradient.gather(1, worst_AK) > 0).all())


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", DROPLESS)
@pytest.mark.parametrize("tp", [2, 3])
def test_slices_of_the_tokens_replay_what_the_whole_does(name: str, tp: int) -> None:
    router = make_router(CONFIGS[name])
    tokens = replaying(make_tokens(some_padding()), drawn(CONFIGS[name].top_k))
    logits = make_logits().requires_grad_()
    whole = route(router, logits, tokens)
    width = A // tp
    slices = [slice(i * width, (i + 1) * width) for i in range(tp)]
    parts = [router(logits[own], tokens, logits.detach(), own) for own in slices]
    assert torch.equal(torch.cat([p.expert_TK for p in parts]), whole.expert_TK)
    torch.testing.assert_close(torch.cat([p.weight_TK for p in parts]), whole.weight_TK, **TOLERANCE)
    for field in ("chosen_E", "dropped"):
        assert torch.equal(sum(getattr(p, field) for p in parts), getattr(whole, field))  # type: ignore[arg-type]
    if router.has_scores:
        losses = [sum(loss_of(p, own) for p, own in zip(parts, slices, strict=True)), loss_of(whole, slice(0, A))]
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]  # type: ignore[arg-type]
        torch.testing.assert_close(*gradients, **TOLERANCE)


def test_layers_behind_those_that_were_served_choose_by_themselves() -> None:
    router, logits, tokens = make_router(CONFIGS["topk"]), make_logits(), make_tokens()
    assert torch.equal(
        route(router, logits, replaying(tokens, drawn(2, layers=LAYER))).expert_TK, route(router, logits, tokens).expert_TK
    )


def test_each_layer_has_choices_of_its_own() -> None:
    replay_ALK = drawn(2, without=0.0)
    for layer in range(LAYER + 1):
        router = make_router(CONFIGS["topk"])
        router.layer = layer
        assert torch.equal(
            route(router, make_logits(), replaying(make_tokens(), replay_ALK)).expert_TK, replay_ALK[:, layer].long()
        )


class OwnRouting(TopK):
    def routed(self, *arguments: Any) -> Routing:
        return super().routed(*arguments)


@pytest.mark.parametrize("name", ["expert_choice", "capacity", "own"])
def test_a_router_that_could_not_obey_refuses(name: str) -> None:
    config = CONFIGS["topk" if name == "own" else name]
    router: Router = OwnRouting(config, num_experts=E, layer=LAYER, seed=7) if name == "own" else make_router(config)
    with pytest.raises(ValueError, match=r"can't replay choices: it must let tokens choose, and have no capacity"):
        route(router, make_logits(), replaying(make_tokens(), drawn(2)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RouterConfig(kind="expert_choice", replay="f"), r"router.replay=f .* with router=expert_choice experts choose tokens"),
        (
            RouterConfig(kind="dense", renormalize=False, balance_loss=0.0, replay_validation="f"),
            r"router.replay_validation=f .* with router=dense all experts get all tokens",
        ),
        (RouterConfig(capacity_factor=1.5, replay="f"), r"router.replay=f with router.capacity_factor=1.5: capacity would take"),
        (RouterConfig(capacity_bound="locmoe", replay="f"), r"with router.capacity_bound=locmoe: capacity would take"),
    ],
)
def test_a_configuration_that_could_not_be_obeyed_is_refused(config: RouterConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_router(config, 4, S)
