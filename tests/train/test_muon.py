"""Muon: orthogonal directions against a singular value decomposition, scales, and updates against a loop over matrices."""

import pytest
import torch
from torch import Tensor

from megalina.blocks.parameter import Parameter
from megalina.config import OptimConfig
from megalina.mesh import Axis
from megalina.model.init import spec_of
from megalina.step.program import Matrices
from megalina.train.muon import Muon, orthogonal, scale_of
from megalina.train.optim import FlatOptimizer, FlatTensor
from megalina.verify.muon_by_hand import MuonByHand, matrices_of

EXACT = (2.0, -1.5, 0.5)  # coefficients whose polynomial stays at 1: many steps reach U V'
QUINTIC = (3.4445, -4.7750, 2.0315)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 9, 5), (1, 6, 6)])
def test_many_steps_of_a_polynomial_that_stays_at_one_give_the_orthogonal_factor(shape: tuple[int, int, int]) -> None:
    x = random(*shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonal(x, 40, EXACT), u @ vh, rtol=0, atol=1e-10)


def test_five_quintic_steps_bring_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonal(random(4, 16, 40), 5, QUINTIC))
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_direction_depends_neither_on_length_nor_on_neighbours_and_nothing_stays_nothing() -> None:
    x = random(3, 4, 6)
    whole = orthogonal(x, 5, QUINTIC)
    for i in range(3):
        torch.testing.assert_close(orthogonal(1e3 * x[i : i + 1], 5, QUINTIC), whole[i : i + 1], rtol=1e-12, atol=1e-14)
    assert not orthogonal(torch.zeros(2, 4, 6), 5, QUINTIC).any()


def test_scales_are_the_papers() -> None:
    assert scale_of("match_rms_adamw", 4, 25) == scale_of("match_rms_adamw", 25, 4) == 1.0
    assert scale_of("original", 8, 2) == 2.0 and scale_of("original", 2, 8) == 1.0
    assert scale_of("spectral", 9, 4) == 3.0 and scale_of("none", 9, 4) == 1.0
    with pytest.raises(ValueError, match="muon_scale is 'wide'"):
        scale_of("wide", 1, 1)
    moved = orthogonal(random(1, 64, 32), 5, QUINTIC) * scale_of("match_rms_adamw", 64, 32)
    assert 0.15 < moved.square().mean().sqrt() < 0.25


def flat_of(weight: Tensor, matrices: Matrices | None) -> FlatTensor:
    return FlatTensor(weight.clone().view(-1), torch.zeros(weight.numel(), dtype=weight.dtype), True, matrices)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original", "spectral", "none"])
def test_steps_equal_those_of_a_loop_over_matrices(scale: str, nesterov: bool) -> None:
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.3, muon_scale=scale, muon_nesterov=nesterov)
    weight = random(3, 4, 6)
    tensor = flat_of(weight, Matrices(0, 3, 4, 6))
    optimizer = FlatOptimizer(config, [tensor])
    p = torch.nn.Parameter(weight.clone())
    p.spec = Parameter("experts.w2", (3, 4, 6), 1.0)  # type: ignore[attr-defined]
    assert spec_of(p).decay and len(matrices_of(p)) == 3
    by_hand = MuonByHand(config, [p], torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    for step in range(4):
        gradient = random(3, 4, 6, seed=step + 1)
        clipping = 0.25 if step % 2 else 1.0
        p.grad = gradient * clipping
        tensor.grad.copy_(gradient.view(-1))
        optimizer.step(lr=config.lr, grad_scale=clipping)
        by_hand.step()
        torch.testing.assert_close(tensor.param.view(3, 4, 6), p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [0, 1])
def test_directions_of_cut_matrices_are_those_of_the_whole(cut: int) -> None:
    config = OptimConfig(name="muon")
    whole, gradient = random(2, 6, 8), random(2, 6, 8, seed=1)
    alone = flat_of(whole, Matrices(0, 2, 6, 8))
    optimizer = FlatOptimizer(config, [alone])
    parts = [flat_of(part, Matrices(0, 2, *part.shape[1:], cut)) for part in whole.chunk(2, 1 + cut)]
    ranks = [FlatOptimizer(config, [part], tp=Axis("tp", (0, 1), rank)) for rank, part in enumerate(parts)]
    for step, (told, scale) in enumerate([(None, 1.0), (None, 0.5), (0.5, 0.5)]):
        alone.grad.copy_((gradient + step).view(-1))
        optimizer.step(lr=0.1, grad_scale=scale)
        for part, own in zip(parts, (gradient + step).chunk(2, 1 + cut), strict=True):
            part.grad.copy_(own.reshape(-1))
        gathered = torch.cat([rank.matrices.send(told) for rank in ranks if rank.matrices is not None])
        for rank in ranks:
            assert rank.matrices is not None
            rank.matrices.direct(told, gathered)
            rank.step(lr=0.1, grad_scale=scale)
        got = torch.cat([part.param.view(own.shape) for part, own in zip(parts, whole.chunk(2, 1 + cut), strict=True)], 1 + cut)
        torch.testing.assert_close(got, alone.param.view(whole.shape), rtol=1e-13, atol=1e-13)


def test_directions_made_before_clipping_is_known_give_the_same_bits() -> None:
    config, weight, gradient = OptimConfig(name="muon"), random(2, 4, 6), random(2, 4, 6, seed=1)
    found = []
    for early in (False, True):
        tensor = flat_of(weight, Matrices(0, 2, 4, 6))
        optimizer = FlatOptimizer(config, [tensor])
        for scale in (1.0, 0.125):
            tensor.grad.copy_(gradient.view(-1))
            assert optimizer.matrices is not None
            optimizer.matrices.direct(None if early else scale, None)
            optimizer.step(lr=0.1, grad_scale=scale)
        found.append((tensor.param, optimizer.state(0)["momentum"]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bfloat16_is_of_newton_schulz_alone() -> None:
    rule = Muon(OptimConfig(name="muon", muon_dtype="bfloat16"))
    exact = Muon(OptimConfig(name="muon"))
    x = random(1, 8, 12, dtype=torch.float32)
    assert rule.direction(x).dtype == torch.float32
    assert 0 < (rule.direction(x) - exact.direction(x)).abs().max() < 0.05
