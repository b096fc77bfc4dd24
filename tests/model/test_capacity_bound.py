"""LocMoE's capacity: the bound by its definition, the statistic that it is of, and who is dropped by it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.routers import check_router, kind_of
from megalina.blocks.sizes import NEARNESS_BINS
from megalina.config import RouterConfig
from megalina.model.capacity_bound import LARGEST, bounded, delta_of, least_tokens, log_belonging, nearness
from megalina.model.locmoe import grap
from megalina.model.routers import Router, Routing, router_class
from megalina.model.tokens import ALL, router_tokens

D, E, T = 48, 8, 320


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("delta", [0.02, 0.05, 0.1])
def test_the_probability_to_belong_is_what_random_tokens_do(width: int, delta: float) -> None:
    """Two-sided, as equation 8 is: tokens of random direction against one row."""
    count = 200_000
    random = torch.Generator().manual_seed(0)
    # the first coordinate of a random direction, without drawing the others: their squares sum to a chi-square
    first = torch.randn(count, dtype=torch.float64, generator=random)
    others = torch._standard_gamma(torch.full((count,), (width - 1) / 2, dtype=torch.float64), generator=random) * 2
    found = ((first / (first.square() + others).sqrt()).abs() >= delta).double().mean().item()
    expected = log_belonging(number(delta), width).exp().item()
    assert (
        abs(found - expected) < 4 * (expected / count) ** 0.5 + 0.01 * expected
    )  # the form for large widths is an approximation


def test_the_bound_grows_with_delta_and_width_and_has_no_overflow() -> None:
    deltas = torch.linspace(0, 1, 101, dtype=torch.float64)
    for width in (32, 256, 5120, 16384):
        tokens = least_tokens(deltas, width=width, num_experts=E)
        assert (tokens[1:] >= tokens[:-1]).all() and tokens[0] == 1 and tokens[-1] <= LARGEST
        assert (least_tokens(deltas, width=2 * width, num_experts=E) >= tokens).all()
        assert (least_tokens(deltas, width=width, num_experts=2 * E) <= tokens).all()
    # tiny or astronomically large, as the exponent of delta^2 D is
    assert least_tokens(number(0.03), width=5120, num_experts=16) == 2
    assert least_tokens(number(0.15), width=256, num_experts=8) == 8
    assert least_tokens(number(0.2), width=1024, num_experts=8) == pytest.approx(1.234e9, rel=1e-3)
    assert log_belonging(number(1.0), 16384).isfinite()


def test_capacity_is_clamped_and_unknown_until_there_is_a_delta() -> None:
    most_G = torch.tensor([0, 3, 50])
    for delta, expected in ((-1.0, [0, 3, 50]), (0.0, [0, 2, 2]), (0.15, [0, 3, 8]), (0.9, [0, 3, 50])):
        assert bounded(most_G, number(delta), width=256, num_experts=8, least=2).tolist() == expected, delta


def test_a_delta_is_the_statistic_of_the_cosines() -> None:
    cosines = torch.tensor([[-0.5, 0.25], [0.5, 0.999], [0.75, 0.125]], dtype=torch.float64)
    there = torch.tensor([[True, True], [True, True], [True, False]])
    count_B = nearness(cosines, there)
    assert count_B.sum() == 5 and count_B[0] == 1 and count_B[NEARNESS_BINS - 1] == 1
    of = lambda which, q=0.05: delta_of(count_B, RouterConfig(capacity_delta=which, capacity_quantile=q))  # noqa: E731
    assert of("min") == 0.0
    assert [of("quantile", q) for q in (0.01, 0.2, 0.4, 0.5, 0.8)] == [0.0, 0.0, 0.25, 0.5, 0.75]
    assert of("mean") == pytest.approx((0 + 0.25 + 0.5 + 0.75 + 0.999) / 5, abs=1.5 / NEARNESS_BINS)
    assert delta_of(torch.zeros_like(count_B), RouterConfig()) is None


def test_what_is_not_finite_is_counted_somewhere() -> None:
    cosines = torch.tensor([[float("nan")], [float("inf")], [float("-inf")]])
    assert nearness(cosines, torch.ones_like(cosines, dtype=torch.bool)).sum() == 3


# routers


def router(kind: str, **settings: Any) -> Router:
    config = RouterConfig(**({"kind": kind, "top_k": 1, "group": "micro_batch", "capacity_bound": "locmoe"} | settings))
    made = router_class(config)(config, num_experts=E, layer=0, seed=0, width=D)
    if kind in ("topk", "locmoe_plus_learned"):
        shape = kind_of(config).gate_shape(E, D)
        made.weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    return made


def batch() -> Batch:
    valid = torch.ones(2, T // 2, dtype=torch.bool)
    valid[1, -30:] = False
    numbers = torch.arange(T).view(2, -1)
    return Batch(numbers, numbers, valid, valid, numbers, None, torch.arange(2))


def hidden() -> Tensor:
    x_TD = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_TD[-30:] = float("nan")  # padding may hold anything
    return x_TD


def routed(of: Router) -> tuple[Routing, Tensor]:
    x_TD = hidden()
    logits_TE = of.logits(x_TD).detach()
    found: Routing = of(logits_TE, router_tokens(batch()), logits_TE, ALL)
    return found, of.nearness(x_TD, logits_TE, found)


@pytest.mark.parametrize("kind", ["locmoe", "locmoe_plus", "locmoe_plus_learned", "topk"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_cosines_are_those_between_tokens_and_rows(kind: str, top_k: int) -> None:
    of = router(kind, top_k=top_k, capacity_bound="locmoe")
    found, count_B = routed(of)
    rows_ED = grap(E, hidden()) if of.weight is None else of.weight
    if kind == "locmoe_plus_learned":
        rows_ED = torch.block_diag(*rows_ED[:, None])
    assert found.wanted_TK is not None
    expected = [0] * NEARNESS_BINS
    for x_D, experts in zip(hidden()[:-30], found.wanted_TK[:-30].tolist(), strict=True):
        for e in experts:
            cosine = torch.cosine_similarity(x_D, rows_ED[e], dim=0).item()
            expected[max(0, int(cosine * NEARNESS_BINS))] += 1
    assert count_B.tolist() == expected and count_B.sum() == (T - 30) * top_k


@pytest.mark.parametrize("factor", [0.0, 1.25])
def test_the_first_step_falls_back_and_the_bound_drops_the_rest(factor: float) -> None:
    of = router("locmoe", capacity_factor=factor, capacity_delta="mean", capacity_min=3)
    found, count_B = routed(of)
    plain, _ = routed(router("locmoe", capacity_factor=factor, capacity_bound="none"))
    assert torch.equal(found.expert_TK, plain.expert_TK)
    of.update_delta(count_B)
    assert of.delta is not None and 0.15 < of.delta.item() < 0.25
    of.delta.fill_(0.35)
    most = -(-int(1.25 * 1000) * (T - 30) // (1000 * E)) if factor else T - 30
    bound = int(least_tokens(of.delta, width=D, num_experts=E))
    assert 3 < bound < 30
    kept_E = torch.bincount(routed(of)[0].expert_TK.flatten(), minlength=E + 1)[:E]
    assert kept_E.tolist() == [min(bound, most, n) for n in found.chosen_E.tolist()]
    of.delta.fill_(0.0)
    assert torch.bincount(routed(of)[0].expert_TK.flatten(), minlength=E + 1)[:E].max() == 3  # capacity_min
    of.delta.fill_(0.99)  # more than the fullest expert has: as if there were no bound
    again, _ = routed(of)
    assert torch.equal(again.expert_TK, plain.expert_TK) and torch.equal(again.weight_TK, plain.weight_TK)


def test_delta_is_frozen_or_follows() -> None:
    low, high = torch.zeros(NEARNESS_BINS, dtype=torch.int64), torch.zeros(NEARNESS_BINS, dtype=torch.int64)
    low[NEARNESS_BINS // 4], high[NEARNESS_BINS // 2] = 7, 9
    for ema, expected in ((0.0, [0.25, 0.25, 0.25]), (0.75, [0.25, 0.3125, 0.359375])):
        of = router("locmoe", capacity_ema=ema)
        assert of.delta is not None and of.delta.item() < 0
        of.update_delta(torch.zeros_like(low))  # no token at all: not known yet
        assert of.delta.item() < 0
        for count_B, delta in zip((low, high, high), expected, strict=True):
            of.update_delta(count_B)
            assert of.delta.item() == delta


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hash"}, "by which router=hash does not choose: set it to none, or take one of topk, locmoe, locmoe_plus"),
        ({"kind": "expert_choice"}, "by which router=expert_choice does not choose"),
        ({"kind": "sigmoid"}, "by which router=sigmoid does not choose"),
        ({"group": "global"}, "router.group=global is of all ranks: set router.group=sequence or micro_batch"),
        ({"capacity_quantile": 0.5}, "router.capacity_quantile=0.5 does nothing with router.capacity_delta=min"),
        ({"capacity_bound": "none", "capacity_ema": 0.5}, "router.capacity_ema=0.5 does nothing with router.capacity_bound=none"),
        ({"capacity_bound": "none", "capacity_min": 4}, "router.capacity_min=4 does nothing with router.capacity_bound=none"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_router(RouterConfig(**({"capacity_bound": "locmoe"} | settings)), E, D)
