"""Buckets: gradients are views of flat memory and stay so; the slices of all ranks cover each element once."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megalina.blocks.parameter import Parameter
from megalina.config import OptimConfig
from megalina.mesh import Axis, build_mesh
from megalina.model.init import initialize, parameter
from megalina.model.linear import linear
from megalina.parallel import buckets
from megalina.parallel.buckets import ALIGNMENT, Bucket, FlatSlice
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer
from tests.train.small_run import VOCABULARY, config_of, random_batch

ALONE: dict[str, Any] = {"sharded": False, "piece": None, "optim": OptimConfig(), "tp": Axis("tp")}
CUTS = [(1, None), (1, 40), (2, None), (2, 64), (4, None), (4, 100), (3, 1)]  # ranks, elements of a piece


class Small(nn.Module):
    """Sizes that are multiples of nothing; weight decay applies to matrices alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a_bias, self.a = (parameter(Parameter(*of)) for of in (("a_bias", (7,), 0.0), ("a", (7, 11), 1.0)))
        self.b, self.scale = (parameter(Parameter(*of)) for of in (("b", (5, 7), 1.0), ("scale", (3,), None)))


def bucket_of(ranks: int, rank: int, piece: int | None, *, sharded: bool = True, dtype: torch.dtype = torch.float64) -> Bucket:
    model = Small()
    initialize(model, seed=1, dtype=dtype)
    axis = Axis("dp", tuple(range(ranks)), rank)
    return Bucket("small", list(model.named_parameters()), axis, sharded=sharded, piece=piece, optim=OptimConfig(), tp=Axis("tp"))


@pytest.mark.parametrize(("ranks", "piece"), CUTS)
def test_pieces_tile_the_bucket_and_own_slices_tile_each_piece(ranks: int, piece: int | None) -> None:
    buckets = [bucket_of(ranks, rank, piece) for rank in range(ranks)]
    first = buckets[0]
    assert [start for start, _ in first.pieces] == [0, *(stop for _, stop in first.pieces)][:-1]
    assert first.pieces[-1][1] == first.numel and first.numel % (ALIGNMENT * ranks) == 0
    for cut in first.pieces:
        owned = [b.own(cut) for b in buckets]
        assert len({s.stop - s.start for s in owned}) == 1  # as reduce-scatter and all-gather want it
        assert [i for s in owned for i in range(s.start, s.stop)] == list(range(*cut))
    updated = sorted(i for b in buckets for s in b.slices for i in range(s.start, s.stop))
    assert updated == list(range(first.numel))


@pytest.mark.parametrize(("ranks", "piece"), CUTS)
def test_weight_decay_applies_to_the_elements_of_matrices_alone(ranks: int, piece: int | None) -> None:
    buckets = [bucket_of(ranks, rank, piece) for rank in range(ranks)]
    decayed = {i for b in buckets for s in b.slices if s.decay for i in range(s.start, s.stop)}
    for m in buckets[0].members:
        assert {i in decayed for i in range(m.start, m.stop)} == {m.name in ("a", "b")}, m.name


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("ranks", "piece"), CUTS)
def test_the_square_sum_over_ranks_counts_each_element_once(ranks: int, piece: int | None, sharded: bool) -> None:
    total = 0.0
    for rank in range(ranks):
        bucket = bucket_of(ranks, rank, piece, sharded=sharded)
        for m in bucket.members:
            bucket.grad[m.start : m.stop] = torch.arange(m.start, m.stop) + 1.0
        total += bucket.square_sum().item()
    want = sum((i + 1.0) ** 2 for m in bucket.members for i in range(m.start, m.stop))
    assert math.isclose(total, want, rel_tol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_keep_their_values_and_lie_in_the_bucket(dtype: torch.dtype) -> None:
    model, plain = Small(), Small()
    for m in (model, plain):
        initialize(m, seed=1, dtype=dtype)
    bucket = Bucket("small", list(model.named_parameters()), Axis("dp"), **ALONE)
    assert bucket.grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and bucket.param.dtype == dtype
    for (name, p), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, want) and p.data_ptr() % 16 == 0, name
        assert p.untyped_storage().data_ptr() == bucket.param.untyped_storage().data_ptr()
        assert p.grad is not None and p.grad.untyped_storage().data_ptr() == bucket.grad.untyped_storage().data_ptr()
        assert p.grad.data_ptr() == p.main_grad.data_ptr() and p.grad.shape == p.shape


def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    bucket = bucket_of(1, 0, None, dtype=torch.bfloat16)
    weight = next(m.parameter for m in bucket.members if m.name == "a")
    x = torch.ones(1, 11, dtype=torch.bfloat16)
    for scale in (256.0, *[1.0] * 9):
        (linear(x, weight) * scale).sum().backward()
    assert torch.equal(weight.main_grad, torch.full((7, 11), 265.0))


def in_the_bucket(trainable: Trainable) -> list[bool]:
    views = []
    for bucket in trainable.buckets.values():
        for m in bucket.members:
            for held, flat in (
                (m.parameter.grad, bucket.grad),
                (m.parameter.main_grad, bucket.grad),
                (m.parameter, bucket.param),
            ):
                assert held is not None
                views.append(held.data_ptr() == flat[m.start :].data_ptr())
    return views


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_views_stay_views_over_training_steps(dtype: str, recompute: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", dtype=dtype, recompute=recompute, bias=True, norm="layernorm", positions="learned")
    trainable = Trainable(config, build_mesh(), vocab_size=VOCABULARY, device=torch.device("cpu"), wish_to_stop=lambda: False)
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    seen: list[float] = []

    def update(name: str, verdict: Any) -> None:
        seen.append(trainable.buckets[name].grad.abs().max().item())
        optimizer.update(name, verdict)

    for _ in range(3):
        before = {name: b.param.clone() for name, b in trainable.buckets.items()}
        trainable.step(random_batch(), update)
        assert all(in_the_bucket(trainable))
        assert all(not b.grad.any() for b in trainable.buckets.values())  # zeroed for the next step, in place
        assert all(not torch.equal(b.param, before[name]) for name, b in trainable.buckets.items())
    assert len(seen) == 3 * len(trainable.buckets) and min(seen) > 0


# the sum of squares
def flat_bucket(grad: torch.Tensor) -> Bucket:
    """One with these gradients, of which this rank has all."""
    out = Bucket("small", list(Small().named_parameters()), Axis("dp"), **ALONE)
    out.grad, out.slices = grad, [FlatSlice(0, len(grad), True)]
    return out


def test_rows_are_added_up_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^24 + 1 ones: float32 can't count them."""
    found = flat_bucket(torch.ones(1).expand(2**24 + 1)).square_sum()
    assert found.dtype == torch.float64 and found.item() == 2**24 + 1
    monkeypatch.setattr(buckets, "ROW", 7)
    grad = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert flat_bucket(grad).square_sum().item() == pytest.approx((grad**2).sum().item(), rel=1e-15)


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 30_011])
def test_no_element_is_left_out_or_counted_twice(length: int) -> None:
    for dtype, rel in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        grad = torch.randn(length, dtype=dtype, generator=torch.Generator().manual_seed(0))
        assert flat_bucket(grad).square_sum().item() == pytest.approx((grad.double() ** 2).sum().item(), rel=rel)


def test_a_sum_over_many_rows_is_as_exact_as_one_row() -> None:
    """In one dot product these are off by some 1e-3."""
    grad = torch.full((2**23,), 0.3)
    exact = (grad[:1].double() ** 2).item() * len(grad)
    assert flat_bucket(grad).square_sum().item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.full
def test_more_elements_than_blas_can_count_are_summed() -> None:
    grad = torch.ones(1).expand(2**31 + 5)
    assert flat_bucket(grad).square_sum().item() == 2**31 + 5
