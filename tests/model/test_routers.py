"""Routers against a loop over tokens, written the plainest way, in float64."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalina.config import RouterConfig
from megalina.model.balance import global_balance
from megalina.model.routers import GroupSoFar, Router, Routing
from megalina.model.selection import best_groups, groups_of_best
from megalina.model.tokens import RouterTokens
from tests.model.made_router import made_router
from tests.model.slow_router import A, B, E, S, make_tokens, slow_route, some_padding

D = 5
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}

CONFIGS = {
    "topk": RouterConfig(),
    "topk_raw": RouterConfig(renormalize=False, scale=2.5),
    "topk_one": RouterConfig(top_k=1, renormalize=False),
    "topk_all": RouterConfig(top_k=E),
    "micro_batch": RouterConfig(group="micro_batch"),
    "global": RouterConfig(group="global"),
    "capacity": RouterConfig(capacity_factor=1.0),
    "capacity_probability": RouterConfig(capacity_factor=0.8, drop="probability"),
    "capacity_micro_batch": RouterConfig(capacity_factor=0.7, group="micro_batch"),
    "capacity_micro_batch_probability": RouterConfig(capacity_factor=0.7, group="micro_batch", drop="probability", top_k=3),
    "sigmoid": RouterConfig(kind="sigmoid", bias_update_rate=0.1, scale=1.5),
    "sigmoid_raw": RouterConfig(kind="sigmoid", renormalize=False),
    "sigmoid_capacity": RouterConfig(kind="sigmoid", bias_update_rate=0.1, capacity_factor=0.9, drop="probability"),
    "group_limited": RouterConfig(kind="group_limited", bias_update_rate=0.1, num_groups=3, groups_per_token=2, top_k=3),
    "group_limited_capacity": RouterConfig(kind="group_limited", num_groups=2, groups_per_token=1, capacity_factor=0.9),
    "group_limited_softmax": RouterConfig(
        kind="group_limited_softmax", num_groups=3, groups_per_token=2, top_k=3, renormalize=False, scale=16.0
    ),
    "noisy_topk": RouterConfig(kind="noisy_topk", noise_std=0.5),
    "noisy_topk_capacity": RouterConfig(kind="noisy_topk", noise_std=0.5, capacity_factor=0.9, drop="probability"),
    "hash": RouterConfig(kind="hash", scale=2.0),
    "hash_capacity": RouterConfig(kind="hash", capacity_factor=0.6),
    "expert_choice": RouterConfig(kind="expert_choice", renormalize=False),
    "expert_choice_renormalized": RouterConfig(kind="expert_choice", capacity_factor=1.3),
    "expert_choice_micro_batch": RouterConfig(kind="expert_choice", group="micro_batch", capacity_factor=0.6, scale=2.0),
}


def make_router(config: RouterConfig, num_experts: int = E) -> Router:
    config = replace(config, z_loss=config.z_loss or 0.1)  # without a weight it has no backward
    router = made_router(config, d_model=D, num_experts=num_experts, layer=2, seed=7)
    if router.bias_E is not None:
        router.bias_E.copy_(torch.linspace(-0.2, 0.2, num_experts).roll(2))
    return router


def make_logits(seed: int = 0, count: int = A, num_experts: int = E) -> Tensor:
    return torch.randn(count, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5


def route(router: Router, logits_AE: Tensor, tokens: RouterTokens) -> Routing:
    return router(logits_AE, tokens, logits_AE.detach(), slice(0, len(logits_AE)))


def loss_of(routing: Routing, own: slice) -> Tensor:
    """Something that depends on every differentiable output, weights by their expert."""
    factor_TE = torch.cos(torch.arange(1000, dtype=torch.float64)).view(-1, 1)[own] * torch.arange(1, E + 2)
    weighted = (routing.weight_TK * factor_TE.gather(1, routing.expert_TK)).sum()
    return weighted + 0.3 * routing.balance + 0.2 * routing.z + (routing.prob_E * torch.arange(E).sin()).sum()


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_router_equals_a_loop_over_tokens(name: str, padding: bool) -> None:
    config = CONFIGS[name]
    router = make_router(config)
    tokens = make_tokens(some_padding() if padding else None)
    fast_logits, slow_logits = make_logits().requires_grad_(), make_logits().requires_grad_()
    bias = [0.0] * E if router.bias_E is None else router.bias_E.tolist()
    fast = route(router, fast_logits, tokens)
    slow = slow_route(config, slow_logits, tokens, bias, training=True)

    pairs = {}
    for a, (experts, weights) in enumerate(zip(fast.expert_TK.tolist(), fast.weight_TK.tolist(), strict=True)):
        pairs.update({(a, e): w for e, w in zip(experts, weights, strict=True) if e != E})
        assert all(w == 0.0 for e, w in zip(experts, weights, strict=True) if e == E)
    assert pairs.keys() == slow["pairs"].keys()
    assert pairs == pytest.approx({pair: weight.item() for pair, weight in slow["pairs"].items()}, abs=1e-12)
    torch.testing.assert_close(fast.balance, slow["balance"], **TOLERANCE)
    torch.testing.assert_close(fast.z, slow["z"], rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(fast.prob_E, slow["prob_E"], **TOLERANCE)
    assert fast.chosen_E.tolist() == slow["chosen"]
    assert fast.dropped.item() == slow["dropped"]
    assert fast.dropped.item() > 0 or config.capacity_factor == 0 or config.kind == "expert_choice"
    if config.capacity_factor == 0 and config.kind != "expert_choice":
        assert [row for a, row in enumerate(fast.expert_TK.tolist()) if tokens.valid_A[a]] == list(slow["order"].values())

    if config.kind != "hash":
        loss_of(fast, slice(0, A)).backward()
        factor = torch.cos(torch.arange(A, dtype=torch.float64))
        loss = sum(weight * factor[a] * (e + 1) for (a, e), weight in slow["pairs"].items())
        loss = loss + 0.3 * slow["balance"] + 0.2 * slow["z"] + (slow["prob_E"] * torch.arange(E).sin()).sum()
        loss.backward()
        torch.testing.assert_close(fast_logits.grad, slow_logits.grad, **TOLERANCE)


@pytest.mark.parametrize("name", ["topk", "sigmoid", "expert_choice"])
def test_losses_without_weight_are_reported_and_have_no_backward(name: str) -> None:
    weighted = replace(CONFIGS[name], z_loss=0.1)
    tokens, logits = make_tokens(some_padding()), make_logits().requires_grad_()
    with_weight, without = (
        route(made_router(config, d_model=D, num_experts=E, layer=2, seed=7), logits, tokens)
        for config in (weighted, replace(weighted, z_loss=0.0, balance_loss=0.0))
    )
    assert torch.equal(with_weight.z, without.z) and torch.equal(with_weight.balance, without.balance)
    assert with_weight.z.requires_grad and without.weight_TK.requires_grad
    assert not (without.z.requires_grad or without.balance.requires_grad or without.prob_E.requires_grad)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_slices_of_the_tokens_give_what_the_whole_gives(name: str, tp: int) -> None:
    router, tokens = make_router(CONFIGS[name]).double(), make_tokens(some_padding())
    hidden_AD = torch.randn(A, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    whole_logits = router.logits(hidden_AD)
    whole = route(router, whole_logits, tokens)
    parts = []
    for rank in range(tp):
        own = slice(rank * A // tp, (rank + 1) * A // tp)
        part = router(router.logits(hidden_AD[own]), tokens, whole_logits.detach(), own)
        if router.weight is not None:
            loss_of(part, own).backward()  # gradients of the slices add up in weight.grad
        parts.append(part)
    assert torch.equal(torch.cat([p.expert_TK for p in parts]), whole.expert_TK)
    torch.testing.assert_close(torch.cat([p.weight_TK for p in parts]), whole.weight_TK, **TOLERANCE)
    assert torch.equal(sum(p.chosen_E for p in parts), whole.chosen_E)
    assert sum(p.dropped for p in parts) == whole.dropped
    for field in ("balance", "z", "prob_E"):
        torch.testing.assert_close(sum(getattr(p, field) for p in parts), getattr(whole, field), rtol=0.0, atol=1e-11)
    if router.weight is not None:
        summed = router.weight.grad.clone()
        router.weight.grad = None
        loss_of(whole, slice(0, A)).backward()
        torch.testing.assert_close(summed, router.weight.grad, rtol=1e-13, atol=1e-12)


BY_POSITION = [n for n, c in CONFIGS.items() if c.kind != "expert_choice" and c.drop == "position"]


def sequences_of(tokens: RouterTokens, first: int, stop: int) -> RouterTokens:
    of = slice(first * S, stop * S)
    return RouterTokens(tokens.token_A[of], tokens.sample_A[of], tokens.position_A[of], tokens.valid_A[of], stop - first)


@given(name=st.sampled_from(BY_POSITION), ends=st.sets(st.integers(1, B - 1)), tp=st.sampled_from([1, 2]), seed=st.integers(0, 9))
def test_parts_of_a_group_are_routed_as_the_whole(name: str, ends: set[int], tp: int, seed: int) -> None:
    router, tokens = make_router(replace(CONFIGS[name], group="micro_batch")), make_tokens(some_padding())
    whole_logits, part_logits = make_logits(seed).requires_grad_(), make_logits(seed).requires_grad_()
    whole = route(router, whole_logits, tokens)
    so_far = GroupSoFar(tokens.valid_A.sum(), torch.zeros(E, dtype=torch.int64))
    parts: list[Routing] = []
    for first, stop in zip([0, *sorted(ends)], [*sorted(ends), B], strict=True):
        logits = part_logits[first * S : stop * S]
        widths = [slice(len(logits) * rank // tp, len(logits) * (rank + 1) // tp) for rank in range(tp)]
        ranks = [router(logits[own], sequences_of(tokens, first, stop), logits, own, so_far) for own in widths]
        parts += ranks
        assert all(torch.equal(r.so_far.chosen_E, ranks[0].so_far.chosen_E) for r in ranks)  # alike on each rank
        so_far = ranks[0].so_far
    assert torch.equal(torch.cat([p.expert_TK for p in parts]), whole.expert_TK)
    torch.testing.assert_close(torch.cat([p.weight_TK for p in parts]), whole.weight_TK, **TOLERANCE)
    assert torch.equal(sum(p.chosen_E for p in parts), whole.chosen_E) and torch.equal(so_far.chosen_E, whole.chosen_E)
    assert sum(p.dropped for p in parts) == whole.dropped
    assert all(p.balance == 0 for p in parts)  # a product of two means is no sum over parts
    prob_E = sum(p.prob_E for p in parts)
    balance = global_balance(prob_E[None], so_far.chosen_E[None], so_far.tokens, router.top_k)
    torch.testing.assert_close(balance, whole.balance, **TOLERANCE)
    if router.weight is not None:
        (balance + sum(p.z for p in parts) + torch.cat([p.weight_TK for p in parts]).square().sum()).backward()
        (whole.balance + whole.z + whole.weight_TK.square().sum()).backward()
        torch.testing.assert_close(part_logits.grad, whole_logits.grad, **TOLERANCE)


@pytest.mark.parametrize("name", ["capacity_micro_batch", "hash_capacity"])
def test_a_part_that_knows_nothing_of_the_others_drops_other_tokens(name: str) -> None:
    router, tokens = make_router(replace(CONFIGS[name], group="micro_batch")), make_tokens()
    logits, half = make_logits(), B // 2
    early = route(router, logits[: half * S], sequences_of(tokens, 0, half))
    late = route(router, logits[half * S :], sequences_of(tokens, half, B))
    assert not torch.equal(torch.cat([early.expert_TK, late.expert_TK]), route(router, logits, tokens).expert_TK)


@pytest.mark.parametrize("name", ["topk", "global", "expert_choice_micro_batch", "capacity_micro_batch_probability"])
def test_part_of_a_group_is_refused_where_a_routing_needs_other_tokens(name: str) -> None:
    router, logits = make_router(CONFIGS[name]), make_logits()
    so_far = GroupSoFar(torch.tensor(2 * A), torch.zeros(E, dtype=torch.int64))
    with pytest.raises(AssertionError, match="its whole group"):
        router(logits, make_tokens(), logits, slice(0, A), so_far)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_padding_holds_changes_nothing(name: str) -> None:
    router, valid_A = make_router(CONFIGS[name]), some_padding()
    tokens = make_tokens(valid_A)
    plain_logits = make_logits().requires_grad_()
    wild_logits = make_logits().masked_fill(~valid_A[:, None], float("nan")).requires_grad_()
    wild_tokens = replace(tokens, token_A=tokens.token_A.where(valid_A, 17))
    plain, wild = route(router, plain_logits, tokens), route(router, wild_logits, wild_tokens)
    for field in ("expert_TK", "weight_TK", "balance", "z", "chosen_E", "dropped", "prob_E"):
        assert torch.equal(getattr(plain, field), getattr(wild, field)), field
    assert (wild.expert_TK[~valid_A] == E).all()
    if router.weight is not None:
        loss_of(plain, slice(0, A)).backward()
        loss_of(wild, slice(0, A)).backward()
        assert torch.equal(plain_logits.grad, wild_logits.grad)
        assert (wild_logits.grad[~valid_A] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_at_the_end_is_as_if_it_were_not_there(name: str) -> None:
    router, length = make_router(CONFIGS[name]), S - 2
    short = make_tokens(sequences=B, length=length)
    kept_A = (torch.arange(S) < length).repeat(B)
    padded = make_tokens(kept_A)
    padded = replace(padded, token_A=torch.zeros(A, dtype=torch.int64).masked_scatter(kept_A, short.token_A))
    logits = make_logits()
    ours, theirs = route(router, logits, padded), route(router, logits[kept_A], short)
    assert torch.equal(ours.expert_TK[kept_A], theirs.expert_TK)
    torch.testing.assert_close(ours.weight_TK[kept_A], theirs.weight_TK, **TOLERANCE)
    for field in ("balance", "z", "chosen_E", "dropped", "prob_E"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.group == "sequence"])
def test_sequences_in_another_order_are_routed_the_same(name: str) -> None:
    router, tokens, logits = make_router(CONFIGS[name]), make_tokens(some_padding()), make_logits()
    order_A = torch.tensor([2, 0, 3, 1])[:, None].mul(S).add(torch.arange(S)).view(-1)
    moved = RouterTokens(
        tokens.token_A[order_A], tokens.sample_A[order_A], tokens.position_A[order_A], tokens.valid_A[order_A], B
    )
    first, second = route(router, logits, tokens), route(router, logits[order_A], moved)
    assert torch.equal(first.expert_TK[order_A], second.expert_TK)
    torch.testing.assert_close(first.weight_TK[order_A], second.weight_TK, **TOLERANCE)
    torch.testing.assert_close(first.balance, second.balance, **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_earlier_tokens_never_depend_on_later_ones_unless_the_router_says_so(name: str) -> None:
    config = replace(CONFIGS[name], group="sequence")
    router, tokens = make_router(config), make_tokens()
    changed = False
    for seed in range(1, 6):
        logits, other = make_logits(), make_logits(seed)
        early_A = tokens.position_A < S - 2
        other[early_A] = logits[early_A]
        first, second = route(router, logits, tokens), route(router, other, tokens)
        pairs = [
            {(a, e) for a, row in enumerate(r.expert_TK.tolist()) for e in row if early_A[a] and e != E} for r in (first, second)
        ]
        changed = changed or pairs[0] != pairs[1]
    assert changed == (router.looks_ahead and config.kind != "hash")


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.kind not in ("hash", "expert_choice") and c.top_k < E])
def test_an_idle_expert_is_never_named_and_everything_stays_finite(name: str) -> None:
    router, tokens = make_router(CONFIGS[name]), make_tokens()
    logits = make_logits()
    logits[:, 3] = -1000.0
    logits.requires_grad_()
    routing = route(router, logits, tokens)
    assert routing.chosen_E[3] == 0 and not (routing.expert_TK == 3).any()
    loss_of(routing, slice(0, A)).backward()
    assert torch.isfinite(logits.grad).all()


def test_expert_choice_leaves_no_expert_idle_but_some_tokens_without() -> None:
    router, logits = make_router(RouterConfig(kind="expert_choice", top_k=1)), make_logits()
    logits[:, 3] = -1000.0
    routing = route(router, logits, make_tokens())
    assert routing.chosen_E.tolist() == [B * math.ceil(S / E)] * E
    assert (routing.expert_TK == E).all(dim=1).any()


def test_all_tokens_on_one_expert_fill_it_up_to_its_capacity_in_order() -> None:
    config = RouterConfig(top_k=1, capacity_factor=1.5)
    logits = make_logits()
    logits[:, 4] += 50
    routing = route(make_router(config), logits, make_tokens())
    taken = math.ceil(1.5 * S / E)
    assert routing.expert_TK.view(B, S).tolist() == [[4] * taken + [E] * (S - taken)] * B
    assert routing.chosen_E[4] == A and routing.dropped == A - B * taken
    torch.testing.assert_close(routing.balance, torch.tensor(float(A * E), dtype=torch.float64))  # worst case: E times even


def test_even_routing_has_a_balance_loss_of_one_a_token() -> None:
    logits = torch.zeros(A, E, dtype=torch.float64)
    logits[torch.arange(A), torch.arange(A) % E] = 1e-9
    routing = route(make_router(RouterConfig(top_k=1)), logits, make_tokens())
    assert routing.balance.item() == pytest.approx(A, abs=1e-6)


def test_equal_scores_go_to_the_lower_expert() -> None:
    for name in ("topk", "sigmoid_raw", "group_limited_capacity"):
        for dtype in (torch.float32, torch.float64):
            routing = route(make_router(CONFIGS[name]), torch.zeros(A, E, dtype=dtype), make_tokens())
            assert routing.expert_TK[0].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["expert_choice", "capacity_probability"])
def test_equal_tokens_are_taken_in_order(name: str) -> None:
    routing = route(make_router(CONFIGS[name]), torch.zeros(B * 100, E), make_tokens(sequences=B, length=100))
    taken = (routing.expert_TK == 0).any(dim=1).view(B, 100)
    limit = math.ceil(Fraction(str(CONFIGS[name].capacity_factor or 1.0)) * 100 * 2 / E)
    assert torch.equal(taken, (torch.arange(100) < limit).expand(B, 100))


def test_noise_acts_in_training_only() -> None:
    router, tokens, logits = make_router(CONFIGS["noisy_topk"]), make_tokens(), make_logits()
    plain = route(make_router(CONFIGS["topk"]), logits, tokens)
    noisy, quiet = route(router, logits, tokens), route(router.eval(), logits, tokens)
    assert torch.equal(quiet.expert_TK, plain.expert_TK) and torch.equal(quiet.weight_TK, plain.weight_TK)
    assert not torch.equal(noisy.expert_TK, plain.expert_TK)
    assert torch.equal(noisy.z, plain.z)


def test_hash_depends_on_token_and_layer_alone_and_spreads_evenly() -> None:
    tokens = replace(make_tokens(sequences=1, length=8000), token_A=torch.arange(8000))
    config = RouterConfig(kind="hash", top_k=2)
    routers = [made_router(config, d_model=D, num_experts=8, layer=layer, seed=seed) for layer, seed in ((0, 1), (0, 2), (1, 1))]
    first, same, other = (route(r, r.logits(torch.zeros(8000, D)), tokens) for r in routers)
    assert torch.equal(first.expert_TK, same.expert_TK)
    agree = (first.expert_TK[:, 0] == other.expert_TK[:, 0]).double().mean().item()
    assert agree == pytest.approx(1 / 8, abs=0.02)
    assert first.chosen_E.double().div(2000).sub(1).abs().max() < 0.08  # 4.2 standard deviations are 0.08
    assert list(routers[0].parameters()) == []


def test_the_selection_bias_moves_towards_even_load() -> None:
    router = made_router(CONFIGS["sigmoid"], d_model=D, num_experts=3, layer=0, seed=0)
    router.update_bias(torch.tensor([5, 4, 3]))
    router.update_bias(torch.tensor([9, 1, 2]))
    assert router.bias_E.tolist() == pytest.approx([-0.2, 0.1, 0.2])
    assert "bias_E" in router.state_dict()
    assert make_router(CONFIGS["sigmoid_raw"]).bias_E is None


def test_the_selection_bias_moves_in_proportion_or_about_its_mean() -> None:
    by_share = replace(CONFIGS["sigmoid"], bias_update="proportional", bias_update_rate=0.5)
    router = made_router(by_share, d_model=D, num_experts=3, layer=0, seed=0)
    router.update_bias(torch.tensor([6, 4, 2]))
    router.update_bias(torch.tensor([0, 0, 0]))  # a step of nothing but padding
    assert router.bias_E.tolist() == pytest.approx([0.5 * (1 / 3 - share) for share in (1 / 2, 1 / 3, 1 / 6)])
    centered = replace(CONFIGS["sigmoid"], bias_centered=True)
    router = made_router(centered, d_model=D, num_experts=4, layer=0, seed=0)
    router.update_bias(torch.tensor([9, 1, 1, 1]))  # signs -1, 1, 1, 1: their mean is a half
    assert router.bias_E.tolist() == pytest.approx([-0.15, 0.05, 0.05, 0.05])
    assert router.bias_E.sum().item() == pytest.approx(0.0, abs=1e-7)


def test_a_group_is_worth_its_two_best_or_its_best() -> None:
    score_AE = torch.tensor([[0.5, 0.1, 0.4, 0.3]])  # by the best the first group, by the two best the second
    assert groups_of_best(score_AE, 2, 1).tolist() == [pytest.approx([0.5, 0.1, 0.0, 0.0])]
    assert best_groups(score_AE, 2, 1).tolist() == [pytest.approx([-math.inf, -math.inf, 0.4, 0.3])]


@pytest.mark.parametrize("main", [False, True])
def test_a_learned_bias_is_on_the_logits(main: bool) -> None:
    router = made_router(RouterConfig(bias=True), d_model=D, num_experts=E, layer=0, seed=0).double()
    router.bias = torch.nn.Parameter(torch.linspace(-1, 1, E, dtype=torch.float64))
    hidden_AD = torch.randn(A, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = router.logits(hidden_AD)
    torch.testing.assert_close(logits, hidden_AD @ router.weight.T + router.bias)
    for p in router.parameters():
        p.main_grad = torch.zeros_like(p) if main else None
    router.logits(hidden_AD).pow(2).sum().backward()
    want = torch.autograd.grad((hidden_AD @ router.weight.T + router.bias).pow(2).sum(), list(router.parameters()))
    for p, grad in zip(router.parameters(), want, strict=True):
        torch.testing.assert_close(p.main_grad if main else p.grad, grad)


def test_the_selection_bias_evens_out_a_skewed_router() -> None:
    config = RouterConfig(kind="sigmoid", bias_update_rate=0.01)
    router, tokens = made_router(config, d_model=D, num_experts=E, layer=0, seed=0), make_tokens(sequences=4, length=250)
    logits = make_logits(count=1000) + torch.linspace(-2, 2, E)
    before = route(router, logits, tokens).chosen_E
    for _ in range(100):
        router.update_bias(route(router, logits, tokens).chosen_E)
    after = route(router, logits, tokens).chosen_E
    mean = 1000 * 2 / E
    assert before.max() > 1.8 * mean and after.max() < 1.1 * mean and after.min() > 0.9 * mean


def test_logits_are_cast_up_and_never_down() -> None:
    router = made_router(RouterConfig(), d_model=D, num_experts=E, layer=0, seed=0)
    hidden = torch.randn(A, D, dtype=torch.bfloat16)
    assert router.logits(hidden).dtype == torch.float32
    assert router.to(torch.bfloat16).logits(hidden).dtype == torch.float32
    assert router.logits(hidden.double()).dtype == torch.float64
    exact = hidden.double() @ router.weight.double().T
    torch.testing.assert_close(router.logits(hidden).double(), exact, rtol=0, atol=1e-6)  # bfloat16 would be off by 1e-3
    routing = route(router, router.logits(hidden.double()), make_tokens())
    assert routing.weight_TK.dtype == torch.float64


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.kind != "expert_choice"])
def test_token_choice_never_waits_for_a_device(name: str) -> None:
    router, tokens = make_router(CONFIGS[name]).to("meta"), make_tokens()
    fields = (tokens.token_A, tokens.sample_A, tokens.position_A, tokens.valid_A)
    routing = route(router, make_logits().to("meta"), RouterTokens(*(f.to("meta") for f in fields), B))
    assert routing.expert_TK.shape == (A, CONFIGS[name].top_k)  # a read of a value would have raised: there is none


@st.composite
def cases(draw: st.DrawFn) -> tuple[RouterConfig, int, RouterTokens, Tensor]:
    num_experts = draw(st.sampled_from([1, 2, 4, 6, 9]))
    kind = draw(
        st.sampled_from(["topk", "sigmoid", "group_limited", "group_limited_softmax", "noisy_topk", "hash", "expert_choice"])
    )
    config = RouterConfig(
        kind=kind,
        top_k=draw(st.integers(1, num_experts)),
        group=draw(st.sampled_from(["sequence", "micro_batch"])),
        capacity_factor=draw(st.sampled_from([0.0, 0.3, 1.0, 1.1, 4.0])),
        drop=draw(st.sampled_from(["position", "probability"])),
        renormalize=draw(st.booleans()),
        noise_std=0.5 if kind == "noisy_topk" else 0.0,
    )
    sequences, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    count = sequences * length
    valid_A = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    # A few values only: many ties, and steps of 40 that saturate float32.
    step = draw(st.sampled_from([0.5, 40.0]))
    values = draw(st.lists(st.integers(-3, 3), min_size=count * num_experts, max_size=count * num_experts))
    logits = torch.tensor(values, dtype=torch.float32).view(count, num_experts) * step
    return config, num_experts, make_tokens(valid_A, sequences, length), logits


@given(cases())
def test_routings_keep_their_promises(case: tuple[RouterConfig, int, RouterTokens, Tensor]) -> None:
    config, num_experts, tokens, logits = case
    router = make_router(config, num_experts)
    logits.requires_grad_()
    routing = route(router, logits, tokens)
    groups = tokens.num_sequences if config.group == "sequence" else 1
    tokens_G = tokens.valid_A.view(groups, -1).sum(dim=1).tolist()
    rows = routing.expert_TK.tolist()
    named = [[e for e in row if e != num_experts] for row in rows]
    assert all(len(set(row)) == len(row) for row in named)
    assert all(not row for row, valid in zip(named, tokens.valid_A.tolist(), strict=True) if not valid)
    for g, count in enumerate(tokens_G):
        members = named[g * len(rows) // groups : (g + 1) * len(rows) // groups]
        load = [sum(e in row for row in members) for e in range(num_experts)]
        if config.kind == "expert_choice":
            each = math.ceil(Fraction(str(config.capacity_factor or 1.0)) * count * config.top_k / num_experts)
            assert load == [min(each, count)] * num_experts
        elif config.capacity_factor:
            assert max(load) <= math.ceil(Fraction(str(config.capacity_factor)) * count * config.top_k / num_experts)
        else:
            assert sum(load) == count * config.top_k
    assert routing.chosen_E.sum() - routing.dropped == sum(map(len, named))
    weights = routing.weight_TK.detach()
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    assert (weights[routing.expert_TK == num_experts] == 0).all()
    if config.renormalize and config.kind != "hash" and (not config.capacity_factor or config.kind == "expert_choice"):
        some = torch.tensor([bool(row) for row in named])
        torch.testing.assert_close(weights.sum(dim=1)[some], torch.ones(int(some.sum())))
    if router.weight is not None:
        (routing.weight_TK.sum() + routing.balance + routing.z + routing.prob_E.sum()).backward()
        assert torch.isfinite(logits.grad).all()
