"""Blends: the order of corpora, against a plain loop and against Megatron's."""

from pathlib import Path

import numpy as np
import pytest

from megalina.data import blend as blend_module
from megalina.data.blend import Blend


def plain_order(weights: list[float], count: int) -> list[tuple[int, int]]:
    shares = [weight / sum(weights) for weight in weights]
    counts = [0] * len(weights)
    order = []
    for n in range(count):
        lag = [share * max(n, 1) - c for share, c in zip(shares, counts, strict=True)]
        chosen = lag.index(max(lag))
        order.append((chosen, counts[chosen]))
        counts[chosen] += 1
    return order


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [3, 1, 1], [1e-3, 1.0], [0.2, 0.3, 0.1, 0.4]])
def test_the_order_is_that_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[float]) -> None:
    monkeypatch.setattr(blend_module, "_BLOCK", 64)
    blend = Blend(weights, cache_dir=tmp_path)
    assert [blend.pick(n) for n in range(1000)] == plain_order(weights, 1000)


def test_any_sample_can_be_picked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_module, "_BLOCK", 64)
    expected = plain_order([0.7, 0.3], 1000)
    for n in (999, 3, 640, 639, 0):
        assert Blend([0.7, 0.3], cache_dir=tmp_path / str(n)).pick(n) == expected[n]  # nothing cached
        assert Blend([0.7, 0.3], cache_dir=tmp_path / "shared").pick(n) == expected[n]


def test_every_prefix_has_the_weights_to_within_a_sample(tmp_path: Path) -> None:
    blend = Blend([0.7, 0.2, 0.1], cache_dir=tmp_path)
    counts = np.zeros(3)
    for n in range(3000):
        counts[blend.pick(n)[0]] += 1
        assert np.abs(counts - np.array([0.7, 0.2, 0.1]) * (n + 1)).max() < 1.5


@pytest.mark.full
def test_the_order_is_megatrons(tmp_path: Path) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    for weights in ([0.7, 0.3], [0.5, 0.25, 0.125, 0.125], [0.9, 0.06, 0.04]):
        corpus, within = np.zeros(5000, np.int16), np.zeros(5000, np.int64)
        helpers.build_blending_indices(corpus, within, np.array(weights) / sum(weights), len(weights), 5000, False)
        blend = Blend(weights, cache_dir=tmp_path)
        assert [blend.pick(n) for n in range(5000)] == list(zip(corpus.tolist(), within.tolist(), strict=True))
