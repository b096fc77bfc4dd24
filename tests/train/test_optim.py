"""The optimizer over flat slices, against torch's optimizers on ordinary parameters."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.config import OptimConfig
from megalina.train import optim
from megalina.train.optim import FlatOptimizer, FlatTensor

SHAPES = [(5, 3), (7,), (2, 4, 2)]
DECAYS = [True, False, True]


def flat_tensors(values: list[Tensor]) -> list[FlatTensor]:
    """All values in one buffer and all gradients in another, as the gradient buckets hold them."""
    buffer = torch.cat([v.flatten() for v in values])
    grads = torch.zeros_like(buffer)
    sizes = [v.numel() for v in values]
    return [FlatTensor(p, g, d) for p, g, d in zip(buffer.split(sizes), grads.split(sizes), DECAYS)]


def torch_optimizer(config: OptimConfig, params: list[Tensor]) -> torch.optim.Optimizer:
    groups = [{"params": [p], "weight_decay": config.weight_decay if d else 0.0} for p, d in zip(params, DECAYS)]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, foreach=False)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_clipped_steps_equal_torchs_on_ordinary_parameters(name: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, dtype=dtype, generator=generator) for s in SHAPES]
    config = OptimConfig(name=name, weight_decay=0.3)
    params = [v.clone().requires_grad_() for v in values]
    reference = torch_optimizer(config, params)
    tensors = flat_tensors(values)
    optimizer = FlatOptimizer(config, tensors)
    for i in range(6):
        grads = [torch.randn(s, dtype=dtype, generator=generator) * 10 ** (i - 3) for s in SHAPES]
        for p, g, t in zip(params, grads, tensors):
            p.grad = g.clone()
            t.grad.copy_(g.flatten())
        norm = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
        lr = 1e-2 / (i + 1)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        optimizer.step(lr=lr, grad_scale=min(1.0, 1.0 / (norm + 1e-6)))
        for p, t in zip(params, tensors):
            torch.testing.assert_close(t.param, p.detach().flatten(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_are_those_of_torchs_fused_classes_to_the_bit(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, dtype=dtype, generator=generator) for s in SHAPES]
    config = OptimConfig(name=name, weight_decay=0.3)
    tensors, params = flat_tensors(values), [t.param.clone() for t in flat_tensors(values)]
    groups = [
        {"params": [p for p, d in zip(params, DECAYS) if d == decay], "weight_decay": config.weight_decay if decay else 0.0}
        for decay in (True, False)
    ]
    reference: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, fused=True)
    if name == "adamw":
        reference = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    optimizer = FlatOptimizer(config, tensors)
    for i in range(4):
        for p, t in zip(params, tensors):
            t.grad.copy_(torch.randn(t.grad.shape, dtype=dtype, generator=generator))
            p.grad = t.grad.clone()
        for group in reference.param_groups:
            group["lr"] = 0.01 * (i + 1)
        scale = 0.3 if i % 2 and dtype == torch.float32 else 1.0
        reference.grad_scale = torch.tensor(1.0 / scale) if scale != 1.0 else None  # type: ignore[attr-defined]
        reference.step()
        optimizer.step(lr=0.01 * (i + 1), grad_scale=scale)
        assert all(torch.equal(p, t.param) for p, t in zip(params, tensors))


def test_a_scale_of_zero_gives_zero_gradients() -> None:
    tensors = flat_tensors([torch.ones(s) for s in SHAPES])
    tensors[0].grad.fill_(3.0)
    FlatOptimizer(OptimConfig(name="sgd", weight_decay=0.0), tensors).step(lr=1.0, grad_scale=0.0)
    assert torch.equal(tensors[0].param, torch.ones_like(tensors[0].param))


def test_one_clipped_step_leaves_no_scale_for_the_next() -> None:
    tensors = flat_tensors([torch.zeros(s) for s in SHAPES])
    optimizer = FlatOptimizer(OptimConfig(name="sgd", weight_decay=0.0), tensors)
    for scale, expected in ((0.5, -0.5), (1.0, -1.5)):
        tensors[0].grad.fill_(1.0)
        optimizer.step(lr=1.0, grad_scale=scale)
        torch.testing.assert_close(tensors[0].param, torch.full_like(tensors[0].param, expected))


def test_a_resumed_optimizer_continues_like_the_first() -> None:
    generator = torch.Generator().manual_seed(1)
    grads = [[torch.randn(s, dtype=torch.float64, generator=generator).flatten() for s in SHAPES] for _ in range(5)]

    def run(tensors: list[FlatTensor], optimizer: FlatOptimizer, steps: range) -> None:
        for i in steps:
            for t, g in zip(tensors, grads[i]):
                t.grad.copy_(g)
            optimizer.step(lr=1e-2)

    values = [torch.ones(s, dtype=torch.float64) for s in SHAPES]
    tensors = flat_tensors(values)
    first = FlatOptimizer(OptimConfig(), tensors)
    run(tensors, first, range(3))
    resumed_tensors = flat_tensors([t.param.clone() for t in tensors])
    resumed = FlatOptimizer(OptimConfig(), resumed_tensors)
    assert set(resumed.state(0)) == {"exp_avg", "exp_avg_sq"}  # there before any step
    for i in range(len(tensors)):
        for key, value in resumed.state(i).items():
            value.copy_(first.state(i)[key])
    resumed.step_count = first.step_count
    assert first.step_count == 3
    run(tensors, first, range(3, 5))
    run(resumed_tensors, resumed, range(3, 5))
    for a, b in zip(tensors, resumed_tensors):
        assert torch.equal(a.param, b.param)
    assert resumed.step_count == 5


def test_a_rank_without_a_shard_counts_steps_all_the_same() -> None:
    optimizer = FlatOptimizer(OptimConfig(), [])
    optimizer.step(lr=1e-3, grad_scale=0.5)
    assert optimizer.step_count == 1
    optimizer.step_count = 7
    assert optimizer.step_count == 7


def test_an_empty_slice_is_a_slice() -> None:
    tensors = [FlatTensor(torch.zeros(0), torch.zeros(0), True), FlatTensor(torch.ones(2), torch.ones(2), True)]
    FlatOptimizer(OptimConfig(weight_decay=0.0), tensors).step(lr=0.5)
    torch.testing.assert_close(tensors[1].param, torch.full((2,), 0.5))


class _FusedAdam(torch.optim.AdamW):
    """What Apex's takes, by torch: the state is there before the first step, the count belongs to the group."""

    def __init__(self, groups: list[dict[str, Any]], *, adam_w_mode: bool, **settings: Any):
        assert adam_w_mode
        super().__init__(groups, foreach=False, **settings)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = torch.tensor(float(group.get("step", 0)))
            group["step"] = group.get("step", 0) + 1
        super().step(closure)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_apex_gets_gradients_state_rate_and_count(monkeypatch: pytest.MonkeyPatch, steps_before: int) -> None:
    """By a stand-in, since NVIDIA's package needs a GPU."""
    monkeypatch.setattr(optim, "_use_apex", lambda config, has_apex, params: has_apex and config.implementation == "apex")
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=_FusedAdam))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES]
    both = []
    for implementation in ("torch", "apex"):
        tensors = flat_tensors(values)
        optimizer = FlatOptimizer(OptimConfig(implementation=implementation, weight_decay=0.3), tensors)
        optimizer.step_count = steps_before
        for i in range(3):
            for t in tensors:
                t.grad.copy_(torch.linspace(-1, 1 + i, t.grad.numel(), dtype=torch.float64))
            optimizer.step(lr=1e-2 / (i + 1), grad_scale=0.5)
        both.append((tensors, optimizer))
    (plain, by_torch), (fused, by_apex) = both
    assert by_apex.description == "AdamW: NVIDIA Apex FusedAdam" and by_apex.step_count == by_torch.step_count == steps_before + 3
    for i, (a, b) in enumerate(zip(plain, fused, strict=True)):
        torch.testing.assert_close(a.param, b.param, rtol=1e-12, atol=1e-14)
        for name, moment in by_torch.state(i).items():
            torch.testing.assert_close(by_apex.state(i)[name], moment, rtol=1e-12, atol=1e-14)


def test_the_description_names_what_runs_and_apex_is_not_pretended() -> None:
    tensors = flat_tensors([torch.ones(s) for s in SHAPES])
    assert FlatOptimizer(OptimConfig(), tensors).description == "AdamW: torch, fused kernel"
    with pytest.raises(ValueError, match="apex can't be used: it needs CUDA"):
        FlatOptimizer(OptimConfig(implementation="apex"), tensors)
    with pytest.raises(ValueError, match="only adamw"):
        FlatOptimizer(OptimConfig(name="sgd", implementation="apex"), tensors)
    with pytest.raises(ValueError, match="'adam'"):
        FlatOptimizer(OptimConfig(name="adam"), tensors)
    with pytest.raises(ValueError, match="'cuda'"):
        FlatOptimizer(OptimConfig(implementation="cuda"), tensors)
