"""LocMoE's gate: fixed, orthogonal, without parameters; who is chosen, and by what the chosen count."""

import pytest
import torch

from megalina.batch import Batch
from megalina.blocks.routers import check_router
from megalina.config import RouterConfig
from megalina.model.locmoe import LocMoE, LocMoEPlus, grap
from megalina.model.routers import Router, router_class
from megalina.model.tokens import ALL, router_tokens

T, D, E = 600, 48, 8


def router(kind: str, **settings: object) -> Router:
    config = RouterConfig(**({"kind": kind, "top_k": 1, "renormalize": False, "temperature": 0.1} | settings))  # type: ignore[arg-type]
    return router_class(config)(config, num_experts=E, layer=0, seed=0)


def tokens(count: int = T) -> Batch:
    every = torch.ones(2, count // 2, dtype=torch.bool)
    numbers = torch.arange(count).view(2, -1)
    return Batch(numbers, numbers, every, every, numbers, None, torch.arange(2))


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def routed(of: Router, x_TD: torch.Tensor):
    logits_TE = of.logits(x_TD)
    return of(logits_TE, router_tokens(tokens()), logits_TE.detach(), ALL)


@pytest.mark.parametrize("width", [E, D, 50])
def test_the_gate_is_orthogonal_and_each_feature_is_of_one_expert(width: int) -> None:
    rows_ED = grap(E, torch.zeros(1, width, dtype=torch.float64))
    gram_EE = rows_ED @ rows_ED.t()
    assert torch.equal(gram_EE, gram_EE.diag().diag())
    assert torch.allclose(rows_ED.sum(1), torch.ones(E, dtype=torch.float64)) and ((rows_ED > 0).sum(0) == 1).all()
    if width % E == 0:  # equation 4, but for the factor that makes rows means
        x_TD = torch.randn(3, width, dtype=torch.float64)
        assert torch.allclose(x_TD @ rows_ED.t(), x_TD.view(3, E, -1).mean(2))


@pytest.mark.parametrize("kind", ["locmoe", "locmoe_plus"])
def test_nothing_is_learned_and_gradients_reach_the_tokens(kind: str) -> None:
    of, x_TD = router(kind), hidden().requires_grad_()
    assert not list(of.parameters()) and not list(of.buffers())
    found = routed(of, x_TD)
    (found.weight_TK.sum() + found.balance).backward()
    assert x_TD.grad is not None
    scored_T = (of.logits(x_TD) > 0).any(1) if kind == "locmoe" else torch.ones(T, dtype=torch.bool)
    assert torch.equal(x_TD.grad.abs().sum(1) > 0, scored_T) and scored_T.float().mean() > 0.98


def test_the_best_dot_product_is_the_best_cosine() -> None:
    """Lemma 1 of LocMoE, for rows of one length."""
    x_TD = hidden()
    assert torch.equal(routed(router("locmoe"), x_TD).expert_TK, routed(router("locmoe_plus"), x_TD).expert_TK)


def test_random_tokens_go_everywhere_alike() -> None:
    """Lemma 2."""
    chosen_E = routed(router("locmoe"), hidden()).chosen_E
    assert chosen_E.sum() == T and chosen_E.min() > 0.6 * T / E and chosen_E.max() < 1.5 * T / E


def test_the_weight_is_the_rectified_scores_softmax() -> None:
    x_TD, of = hidden(), router("locmoe", temperature=0.5)
    found = routed(of, x_TD)
    prob_TE = (of.logits(x_TD).relu() / 0.5).softmax(1)
    assert torch.allclose(found.weight_TK, prob_TE.gather(1, found.expert_TK))


def test_experts_keep_their_nearest_tokens() -> None:
    """The expert side of LocMoE+: exactly the best of those that chose it, up to its capacity."""
    x_TD = hidden()
    of = router("locmoe_plus", capacity_factor=0.5, drop="probability", group="micro_batch")
    found = routed(of, x_TD)
    room = T // E // 2 + (T % (2 * E) > 0)
    affinity_TE = of.logits(x_TD)
    wanted_T = affinity_TE.argmax(1)
    for e in range(E):
        (of_expert,) = (wanted_T == e).nonzero(as_tuple=True)
        near_first = of_expert[of.probabilities(affinity_TE)[of_expert, e].argsort(descending=True)]
        kept = set((found.expert_TK[:, 0] == e).nonzero().flatten().tolist())
        assert kept == set(near_first[:room].tolist())


def learned(seed: int = 2, **settings: object) -> Router:
    of = router("locmoe_plus_learned", **settings)
    rows_EF = torch.randn(E, D // E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    of.weight = torch.nn.Parameter(rows_EF)
    return of


def test_learned_rows_begin_as_the_fixed_gate_and_see_features_of_their_own() -> None:
    x_TD, of = hidden(), learned()
    assert of.weight is not None
    cosine_TE = torch.nn.functional.cosine_similarity(x_TD[:, None], torch.block_diag(*of.weight.detach()[:, None]), dim=2)
    assert torch.allclose(of.logits(x_TD), cosine_TE, rtol=1e-13, atol=1e-14)
    with torch.no_grad():
        of.weight.fill_(1.0)
    assert torch.allclose(of.logits(x_TD), router("locmoe_plus").logits(x_TD), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("way", ["autograd", "main gradient", "later"])
def test_learned_rows_get_the_gradients_of_autograd_whichever_way(way: str) -> None:
    x_TD, of, wanted = hidden().requires_grad_(), learned(), learned()
    assert of.weight is not None and wanted.weight is not None
    whole = torch.nn.functional.normalize(torch.block_diag(*wanted.weight[:, None]), dim=1)
    factor_TE = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (torch.nn.functional.normalize(x_TD, dim=1) @ whole.t() * factor_TE).sum().backward()
    dx_TD, x_TD.grad = x_TD.grad, None
    if way != "autograd":
        of.weight.main_grad = torch.ones_like(of.weight)  # type: ignore[attr-defined]
    later: list = []
    (of.logits(x_TD, later if way == "later" else None) * factor_TE).sum().backward()
    assert len(later) == (way == "later")
    for add in later:
        assert torch.equal(of.weight.main_grad, torch.ones_like(of.weight))  # type: ignore[attr-defined]
        add()
    found = of.weight.grad if way == "autograd" else of.weight.main_grad - 1  # type: ignore[attr-defined]
    assert torch.allclose(found, wanted.weight.grad, rtol=1e-11, atol=1e-13)
    assert torch.allclose(x_TD.grad, dx_TD, rtol=1e-12, atol=1e-14)


def test_unequal_features_are_refused_where_rows_are_learned() -> None:
    check_router(RouterConfig(kind="locmoe_plus", top_k=1), E, D + 2)
    with pytest.raises(ValueError, match=r"gives each of model.num_experts \(8\) equally many features, and model.d_model is 50"):
        check_router(RouterConfig(kind="locmoe_plus_learned", top_k=1), E, D + 2)


def test_more_experts_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"router=locmoe gives each of model.num_experts \(8\) features of its own, 8 in all"):
        check_router(RouterConfig(kind="locmoe", top_k=1), E, 4)
    with pytest.raises(
        ValueError, match="router.temperature .* works with router=locmoe or locmoe_plus or locmoe_plus_learned alone"
    ):
        check_router(RouterConfig(temperature=2.0), E, D)
    assert router_class(RouterConfig(kind="locmoe")) is LocMoE and router_class(RouterConfig(kind="locmoe_plus")) is LocMoEPlus
