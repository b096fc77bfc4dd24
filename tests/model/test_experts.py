"""The expert MLPs against a plain loop over rows' experts, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.blocks.activation import ACTIVATIONS, Activation, check_activation
from megalina.config import ModelConfig
from megalina.model import experts
from megalina.model.experts import expert_mlp, mlp
from megalina.model.late_gradients import Later

D, HIDDEN = 8, 16
LIMIT = 0.5  # of the clamped unit: some numbers are beyond it, some are not
SWIGLU = Activation("swiglu")
EVERY = [Activation(name, LIMIT) for name in ACTIVATIONS]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def parameters(num_experts: int, activation: Activation, bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    width = activation.inputs * HIDDEN
    weights = [draw(num_experts, width, D, dtype=dtype, seed=1), draw(num_experts, D, HIDDEN, dtype=dtype, seed=2)]
    return weights + [draw(num_experts, width, dtype=dtype, seed=3), draw(num_experts, D, dtype=dtype, seed=4)] * bias


def plain_mlp(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, activation: Activation) -> Tensor:
    return F.linear(plain_activation(F.linear(x, w1, b1), activation), w2, b2)


def plain_activation(h: Tensor, activation: Activation) -> Tensor:
    if activation.inputs == 1:
        return F.gelu(h) if activation.name == "gelu" else F.relu(h)
    gate, up = h.chunk(2, dim=-1)
    if activation.name == "swiglu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def plain_experts(x: Tensor, counts: list[int], *params: Tensor, activation: Activation) -> Tensor:
    parts = []
    for e, part in enumerate(x.split(counts)):
        w1, w2, b1, b2 = ([p[e] for p in params] + [None, None])[:4]
        parts.append(plain_mlp(part, w1, w2, b1, b2, activation))
    return torch.cat(parts)


@pytest.mark.parametrize("activation", EVERY, ids=lambda a: a.name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 7], [0, 0, 0], [5]])
def test_experts_equal_a_plain_loop(activation: Activation, bias: bool, counts: list[int]) -> None:
    params = parameters(len(counts), activation, bias)
    x = draw(sum(counts), D)
    ours = expert_mlp(x, counts, *params, activation=activation)
    theirs = plain_experts(x, counts, *params, activation=activation)
    torch.testing.assert_close(ours, theirs)
    dy = draw(*ours.shape, seed=5).detach()
    for a, b in zip(torch.autograd.grad(ours, [x, *params], dy), torch.autograd.grad(theirs, [x, *params], dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("activation", EVERY, ids=lambda a: a.name)
def test_experts_pass_gradcheck(activation: Activation) -> None:
    params = parameters(3, activation, bias=True)
    assert torch.autograd.gradcheck(lambda x, *p: expert_mlp(x, [2, 0, 1], *p, activation=activation), (draw(3, D), *params))


def test_an_expert_without_a_row_gets_a_zero_gradient() -> None:
    params = parameters(3, SWIGLU, bias=True)
    grads = torch.autograd.grad(expert_mlp(draw(4, D), [2, 0, 2], *params, activation=SWIGLU).sum(), params)
    for grad in grads:
        assert grad[1].eq(0).all() and grad[0].ne(0).any() and grad[2].ne(0).any()


@pytest.mark.parametrize("dtype, main_dtype", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_main_gradients_add_up_over_micro_batches(dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    params = parameters(2, SWIGLU, bias=True, dtype=dtype)
    for p in params:
        p.main_grad = torch.zeros(p.shape, dtype=main_dtype)
    plain = [p.detach().clone().requires_grad_() for p in params]
    expected = [torch.zeros(p.shape, dtype=main_dtype) for p in params]
    for counts in ([3, 2], [0, 4], [1, 0]):
        x = draw(sum(counts), D, dtype=dtype, seed=len(counts))
        expert_mlp(x, counts, *params, activation=SWIGLU).backward(torch.ones(x.shape, dtype=dtype))
        outputs = plain_experts(x, counts, *plain, activation=SWIGLU)
        for total, grad in zip(expected, torch.autograd.grad(outputs.sum(), plain), strict=True):
            total += grad
    for p, total in zip(params, expected, strict=True):
        assert p.grad is None
        rtol, atol = (3e-2, 0.1) if dtype == torch.bfloat16 else (1e-10, 1e-10)  # bfloat16 keeps 8 bits of each gradient
        torch.testing.assert_close(p.main_grad, total, rtol=rtol, atol=atol)


@pytest.mark.parametrize("late", [False, True])
def test_rows_of_zeros_that_round_up_a_product_change_nothing(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [70, 0, 5, 1]
    x, dy = (draw(76, D, dtype=torch.bfloat16, seed=seed).detach() for seed in (1, 2))
    x.requires_grad_()

    def run(round_rows: int) -> list[Tensor]:
        monkeypatch.setattr(experts, "ROUND_ROWS", round_rows)
        params = parameters(4, SWIGLU, bias=True, dtype=torch.bfloat16)
        for p in params:
            p.main_grad = torch.zeros(p.shape)
        later: Later = []
        y = expert_mlp(x, counts, *params, activation=SWIGLU, later=later if late else None)
        (dx,) = torch.autograd.grad(y, [x], dy)
        assert len(later) == late
        for gradient in later:
            gradient()
        return [y, dx, *(p.main_grad for p in params)]

    for rounded, exact in zip(run(64), run(1), strict=True):
        torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)
        assert rounded.ne(0).any()


@pytest.mark.parametrize("activation", [SWIGLU, EVERY[1]], ids=lambda a: a.name)
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_gemm_equals_the_loop(activation: Activation, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [3, 0, 6, 1]
    params = parameters(4, activation, bias, dtype=torch.float32)
    x, dy = draw(10, D, dtype=torch.float32), draw(10, D, dtype=torch.float32, seed=5).detach()

    def run() -> list[Tensor]:
        y = expert_mlp(x, counts, *params, activation=activation)
        return [y, *torch.autograd.grad(y, [x, *params], dy)]

    loop = run()
    calls = []
    grouped = experts._forward_grouped
    monkeypatch.setattr(experts, "use_grouped_gemm", lambda *_: True)
    monkeypatch.setattr(experts, "_forward_grouped", lambda *args: calls.append(1) or grouped(*args))
    for a, b in zip(run(), loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_a_dense_mlp_is_one_expert_without_the_expert_dimension() -> None:
    params = [p[0].detach().requires_grad_() for p in parameters(1, SWIGLU, bias=True)]
    params[0].main_grad = torch.zeros_like(params[0])
    x = draw(2, 3, D)
    theirs = plain_mlp(x, *params, SWIGLU)
    expected = torch.autograd.grad(theirs.sum(), [x, *params], retain_graph=True)
    ours = mlp(x, *params, activation=SWIGLU)
    torch.testing.assert_close(ours, theirs)
    ours.backward(torch.ones_like(ours))
    for grad, right in zip([x.grad, params[0].main_grad, *(p.grad for p in params[1:])], expected, strict=True):
        torch.testing.assert_close(grad, right)


def test_frozen_weights_get_no_gradient() -> None:
    params = [p.detach() for p in parameters(2, Activation("gelu"), bias=True)]
    x = draw(4, D)
    (dx,) = torch.autograd.grad(expert_mlp(x, [1, 3], *params, activation=Activation("gelu")).sum(), [x])
    (right,) = torch.autograd.grad(plain_experts(x, [1, 3], *params, activation=Activation("gelu")).sum(), [x])
    torch.testing.assert_close(dx, right)


def test_counts_that_miss_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="counts of 2 experts sum to 3, got 4 rows"):
        expert_mlp(draw(4, D), [1, 2], *parameters(2, Activation("relu"), bias=False), activation=Activation("relu"))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="swiglu, swiglu_clamped, gelu, relu, got 'tanh'"):
        Activation("tanh")


def test_a_limit_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="activation_limit=3 does nothing with model.activation=swiglu"):
        check_activation(ModelConfig(activation_limit=3.0))
    check_activation(ModelConfig(activation="swiglu_clamped", activation_limit=3.0))
