"""Noise: random enough, and a pure function of what it is for."""

import math

import pytest
import torch
from torch import Tensor

from megalina.model.noise import dropout, normal, uniform

SAMPLES, LENGTH, COLUMNS = 64, 64, 64
SAMPLE_T = torch.arange(SAMPLES).repeat_interleave(LENGTH)
POSITION_T = torch.arange(LENGTH).repeat(SAMPLES)


def draw(seed: int = 1, layer: int = 0, site: str = "a") -> Tensor:
    return uniform(seed, layer, site, SAMPLE_T, POSITION_T, COLUMNS)


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack((x.reshape(-1), y.reshape(-1))))[0, 1].item()


def test_any_cut_of_the_tokens_and_any_order_give_the_same_numbers() -> None:
    whole = draw()
    assert torch.equal(
        torch.cat([uniform(1, 0, "a", s, p, COLUMNS) for s, p in zip(SAMPLE_T.split(100), POSITION_T.split(100))]), whole
    )
    order_T = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(1, 0, "a", SAMPLE_T[order_T], POSITION_T[order_T], COLUMNS), whole[order_T])
    assert torch.equal(uniform(1, 0, "a", SAMPLE_T, POSITION_T, 7), whole[:, :7])


def test_the_numbers_are_those_of_python_integers() -> None:
    """The same few lines with Python's unbounded integers: what wraps and shifts on a tensor, does so by design."""
    import hashlib

    def signed(x: int) -> int:
        return (x + (1 << 63)) % (1 << 64) - (1 << 63)

    def mix(x: int) -> int:
        x %= 1 << 64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor % (1 << 64)
        return x ^ (x >> 31)

    key = int.from_bytes(hashlib.blake2b(b"5/3/router", digest_size=8).digest(), "little")
    for sample, position, column in ((0, 0, 0), (123456789, 17, 3), (2**40, 4095, 511)):
        row = mix(mix(sample * 0x9E3779B97F4A7C15 + key) + position * 0xD1B54A32D192ED03)
        product = signed(row * (mix(column * 0x9E3779B97F4A7C15 + (key ^ 0xD1B54A32D192ED03)) | 1))
        expected = (signed((product ^ (product >> 32)) * 0xBF58476D1CE4E5B9) >> 32) / 2**32 + 0.5
        got = uniform(5, 3, "router", torch.tensor([sample]), torch.tensor([position]), column + 1)[0, column]
        assert got.item() == expected


def test_uniform_numbers_fill_the_interval_evenly() -> None:
    u = draw()
    assert u.min() >= 0.0 and u.max() < 1.0
    counts = torch.histc(u, bins=256, min=0.0, max=1.0)
    chi_square = ((counts - u.numel() / 256) ** 2 / (u.numel() / 256)).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    low = (u * 2**32).to(torch.int64)
    for bit in range(32):  # each bit is set half of the time, the lowest too
        assert abs(((low >> bit) & 1).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(u.numel())


def test_neighbours_do_not_correlate() -> None:
    u = draw().view(SAMPLES, LENGTH, COLUMNS)
    bound = 5 / math.sqrt(u.numel())
    for dim in range(3):
        for gap in (1, 2, 3, 8, 32):
            here, there = u.narrow(dim, 0, u.shape[dim] - gap), u.narrow(dim, gap, u.shape[dim] - gap)
            assert abs(correlation(here, there)) < 1.5 * bound, (dim, gap)
            # The number being a product of a row's and a column's key, look at rectangles of four numbers too.
            bits = u > 0.5
            parity = bits.narrow(dim, 0, u.shape[dim] - gap) ^ bits.narrow(dim, gap, u.shape[dim] - gap)
            other = (dim + 1) % 3
            square = parity.narrow(other, 0, u.shape[other] - 1) ^ parity.narrow(other, 1, u.shape[other] - 1)
            assert abs(square.double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(square.numel()), (dim, gap)


def test_seed_layer_and_site_each_give_other_numbers() -> None:
    base, bound = draw(), 5 / math.sqrt(SAMPLE_T.numel() * COLUMNS)
    for other in (draw(seed=2), draw(layer=1), draw(site="b"), draw(seed=1, layer=10)):
        assert abs(correlation(base, other)) < bound
    assert not torch.equal(draw(seed=1, layer=11), draw(seed=11, layer=1))


def test_no_two_rows_are_alike() -> None:
    assert len(torch.unique(draw()[:, :2], dim=0)) == len(SAMPLE_T)


def test_normal_numbers_have_the_moments_and_tails_of_a_bell_curve() -> None:
    x = normal(1, 0, "router", SAMPLE_T, POSITION_T, COLUMNS)
    count = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean().item() - moment) < 5 * math.sqrt(variance / count), power
    ordered = x.reshape(-1).sort().values
    exact = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    assert (exact - torch.arange(count) / count).abs().max().item() < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov
    assert abs(correlation(x[:, 1:], x[:, :-1])) < 5 / math.sqrt(count)
    assert torch.equal(x[:10], normal(1, 0, "router", SAMPLE_T[:10], POSITION_T[:10], COLUMNS))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    ones = torch.ones(len(SAMPLE_T), COLUMNS)
    y = dropout(ones, rate, 1, 0, "mlp", SAMPLE_T, POSITION_T)
    sigma = math.sqrt(rate * (1 - rate) / y.numel())
    assert abs((y == 0).double().mean().item() - rate) < 5 * sigma
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - rate)))


def test_dropout_is_cut_as_its_tokens_are_and_backward_uses_the_same_mask() -> None:
    x = torch.randn(256, 32, dtype=torch.float64, requires_grad=True)
    sample_T, position_T = SAMPLE_T[:256], POSITION_T[:256]
    y = dropout(x, 0.3, 1, 0, "mlp", sample_T, position_T)
    halves = [dropout(x[h], 0.3, 1, 0, "mlp", sample_T[h], position_T[h]) for h in (slice(0, 128), slice(128, 256))]
    assert torch.equal(torch.cat(halves), y)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0).double() / 0.7)
    assert dropout(x, 0.0, 1, 0, "mlp", sample_T, position_T) is x


def test_dropout_drops_the_same_elements_in_each_dtype() -> None:
    masks = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        y = dropout(torch.ones(128, 32, dtype=dtype), 0.3, 1, 0, "mlp", SAMPLE_T[:128], POSITION_T[:128])
        assert y.dtype == dtype
        masks.append(y == 0)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])


def test_a_rate_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 1"):
        dropout(torch.ones(1, 1), 1.0, 1, 0, "mlp", SAMPLE_T[:1], POSITION_T[:1])


def test_rows_and_columns_as_a_whole_are_as_even_as_chance_has_it() -> None:
    dropped = (dropout(torch.ones(len(SAMPLE_T), 512), 0.1, 1, 0, "mlp", SAMPLE_T, POSITION_T) == 0).double()
    for dim in (0, 1):
        count, means = dropped.shape[dim], dropped.mean(dim=dim)
        chi_square = ((means - 0.1) ** 2 * count / 0.09).sum().item()
        assert abs(chi_square - len(means)) < 5 * math.sqrt(2 * len(means)), dim
