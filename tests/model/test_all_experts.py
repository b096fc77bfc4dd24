"""All experts on every row, against a plain loop over experts; and sparse selection, by hand."""

import pytest
import torch
from torch import Tensor

from megalina.blocks.activation import Activation
from megalina.blocks.routers import check_router
from megalina.blocks.selection import Selection
from megalina.config import RouterConfig
from megalina.model.all_experts import all_experts_mlp
from megalina.model.linear import Later
from megalina.model.sparse_selection import selected
from tests.model.test_experts import EVERY, SWIGLU, D, draw, parameters, plain_mlp

N, E = 5, 3


def plain_sum(x: Tensor, weight: Tensor, *params: Tensor, activation: Activation) -> Tensor:
    """Equation 1 with all experts, one after another."""
    out = torch.zeros_like(x)
    for e in range(weight.shape[1]):
        w1, w2, b1, b2 = ([p[e] for p in params] + [None, None])[:4]
        out = out + weight[:, e : e + 1] * plain_mlp(x, w1, w2, b1, b2, activation)
    return out


@pytest.mark.parametrize("activation", EVERY, ids=lambda a: a.name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [N, 0])
def test_they_equal_a_plain_loop(activation: Activation, bias: bool, rows: int) -> None:
    params, x = parameters(E, activation, bias), draw(rows, D)
    weight = draw(rows, E, seed=6).softmax(1).detach().requires_grad_()
    ours = all_experts_mlp(x, weight, *params, activation=activation)
    theirs = plain_sum(x, weight, *params, activation=activation)
    torch.testing.assert_close(ours, theirs)
    dy, of = draw(*ours.shape, seed=5).detach(), [x, weight, *params]
    for a, b in zip(torch.autograd.grad(ours, of, dy), torch.autograd.grad(theirs, of, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_they_pass_gradcheck() -> None:
    weight = draw(N, E, seed=6).softmax(1).detach().requires_grad_()
    params = parameters(E, SWIGLU, bias=True)
    assert torch.autograd.gradcheck(lambda x, s, *p: all_experts_mlp(x, s, *p, activation=SWIGLU), (draw(N, D), weight, *params))


@pytest.mark.parametrize("dtype, main_dtype", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_gradients_of_weights_are_the_same_later(dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    found = []
    for later in (None, Later()):
        params = parameters(E, SWIGLU, bias=True, dtype=dtype)
        for p in params:
            p.main_grad = torch.zeros(p.shape, dtype=main_dtype)
        weight = torch.full((N, E), 1 / E, dtype=main_dtype).requires_grad_()
        x = draw(N, D, dtype=dtype)
        all_experts_mlp(x, weight, *params, activation=SWIGLU, later=later).backward(torch.ones(N, D, dtype=dtype))
        if later is not None:
            assert all(p.main_grad.eq(0).all() for p in params)
            for add in later:
                add()
        assert weight.grad.dtype == main_dtype and x.grad.dtype == dtype
        assert all(p.grad is None and p.main_grad.ne(0).any() for p in params)
        found.append([x.grad, weight.grad, *(p.main_grad for p in params)])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


PROB = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.85, 0.05, 0.05], [0.1, 0.2, 0.3, 0.4]])
VALID = torch.tensor([True, True, True, False])  # 4 x probabilities are 2, 1, .6, .4 | 1, 1, 1, 1 | .2, 3.4, .2, .2


@pytest.mark.parametrize(
    ("selection", "experts"),
    [
        (Selection("top_k", k=2), [[0, 1], [0, 1], [1, 0], [4, 4]]),
        (Selection("threshold", threshold=0.5), [[0, 1, 2, 4], [0, 1, 2, 3], [1, 4, 4, 4], [4, 4, 4, 4]]),
        (Selection("threshold", threshold=1.0), [[0], [0], [1], [4]]),  # none is above: one all the same
        (Selection("threshold", threshold=0.0), [[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 2, 3], [4, 4, 4, 4]]),
        (Selection("threshold_top_k", threshold=0.5), [[0, 1, 2], [0, 1, 2], [1, 0, 2], [4, 4, 4]]),  # (3 + 4 + 1) / 3
        (Selection("threshold_top_k", threshold=1.5), [[0], [0], [1], [4]]),  # (1 + 0 + 1) / 3
        (Selection("threshold_top_k", threshold=0.9), [[0, 1], [0, 1], [1, 0], [4, 4]]),  # (2 + 4 + 1) / 3
    ],
)
def test_selected_experts_are_those_by_hand_and_keep_their_weights(selection: Selection, experts: list[list[int]]) -> None:
    expert_TK, weight_TK = selected(selection, PROB, VALID)
    assert expert_TK.tolist() == experts
    padded = torch.cat([PROB, torch.zeros(4, 1)], dim=1)
    assert weight_TK.equal(padded.gather(1, expert_TK))


def test_a_threshold_below_one_keeps_one_by_itself() -> None:
    prob_TE = draw(200, 6, seed=3).detach().softmax(1)
    assert int((6 * prob_TE > 0.999).sum(1).min()) >= 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"balance_loss": 0.01}, "router=dense with router.balance_loss=0.01: .*; set router.balance_loss=0$"),
        ({"capacity_factor": 1.0}, "router.capacity_factor=1.0: .* set router.capacity_factor=0$"),
        ({"renormalize": True}, "router.renormalize=true: .* set router.renormalize=false$"),
        ({"locality_loss": 0.1, "locality_nodes": 2}, "set router.locality_loss=0$"),
        ({"group": "global"}, "set router.group=sequence or micro_batch"),
        ({"noise_std": 0.1}, "works with router=noisy_topk alone, not with dense"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, object], said: str) -> None:
    base = {"kind": "dense", "balance_loss": 0.0, "renormalize": False}
    check_router(RouterConfig(**base), 4, 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        check_router(RouterConfig(**(base | settings)), 4, 64)  # type: ignore[arg-type]
