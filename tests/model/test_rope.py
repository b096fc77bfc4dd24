"""The rotary embedding against a complex product, and longer contexts against their formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.config import ModelConfig
from megalina.model.rope import attention_factor, frequencies, rope_table, rotate, score_factor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def table(positions: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    return rope_table(positions, frequencies(ModelConfig(rope_theta=theta), width))


def turned(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + d/2) as complex numbers, times exp(i * angle)."""
    half = x.shape[-1] // 2
    angle = position.double()[..., None, None] * theta ** (-torch.arange(half).double() / half)
    product = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([product.real, product.imag], -1)


def test_rotation_equals_a_complex_product_at_any_positions() -> None:
    x, position = draw(2, 5, 3, 8), torch.randint(0, 20, (2, 5))
    cos, sin = table(20, 8, 100.0)
    ours, theirs = rotate(x, cos[position], sin[position]), turned(x, position, 100.0)
    torch.testing.assert_close(ours, theirs)
    dy = draw(*x.shape, seed=1).detach()
    torch.testing.assert_close(torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy))


@pytest.mark.parametrize("first", [0, 3, 6])
def test_a_part_of_a_head_turns_and_the_rest_stays(first: int) -> None:
    x, position = draw(2, 5, 3, 10), torch.randint(0, 20, (2, 5))
    cos, sin = table(20, 4, 100.0)
    part = x[..., first : first + 4]
    theirs = torch.cat([x[..., :first], turned(part, position, 100.0), x[..., first + 4 :]], -1)
    ours = rotate(x, cos[position], sin[position], first)
    torch.testing.assert_close(ours, theirs)
    dy = draw(*x.shape, seed=1).detach()
    torch.testing.assert_close(torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy))


def test_rotation_passes_gradcheck_on_a_view() -> None:
    cos, sin = table(4, 4, 10.0)
    x = draw(1, 4, 5, 4)
    assert torch.autograd.gradcheck(lambda x: rotate(x[:, :, 1:4], cos[None], sin[None]), (x,))


def test_scores_depend_on_the_distance_alone() -> None:
    cos, sin = table(30, 8, 10000.0)
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def score(query_at: int, key_at: int) -> Tensor:
        turned_q, turned_k = (rotate(x, cos[None, p : p + 1], sin[None, p : p + 1]) for x, p in ((q, query_at), (k, key_at)))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 3), score(25, 21))
    assert not torch.isclose(score(7, 3), score(7, 4))


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(ValueError, match="must be even, got 7"):
        table(4, 7, 10000.0)


# longer contexts
KIMI: dict[str, Any] = {
    "rope_theta": 50000.0, "rope_scaling": "yarn", "rope_factor": 32.0, "rope_original_positions": 4096, "rope_beta_fast": 1.0,
    "rope_beta_slow": 1.0, "rope_mscale": 1.0, "rope_mscale_all_dim": 1.0,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "rope_theta": 150000.0, "rope_scaling": "yarn", "rope_factor": 32.0, "rope_original_positions": 4096, "rope_truncate": False,
}  # fmt: skip
DEEPSEEK_V2: dict[str, Any] = {
    "rope_scaling": "yarn", "rope_factor": 40.0, "rope_original_positions": 4096, "rope_mscale": 0.707,
    "rope_mscale_all_dim": 0.707,
}  # fmt: skip
V3_OWN: dict[str, Any] = {**DEEPSEEK_V2, "rope_mscale": 1.0, "rope_mscale_all_dim": 0.5}


def yarn(model: ModelConfig, width: int) -> list[float]:
    """Of each pair, by how often it turns in the original context: the formula of the paper, pair by pair."""
    bound = [
        width * math.log(model.rope_original_positions / (turns * 2 * math.pi)) / (2 * math.log(model.rope_theta))
        for turns in (model.rope_beta_fast, model.rope_beta_slow)
    ]
    if model.rope_truncate:
        bound = [float(math.floor(bound[0])), float(math.ceil(bound[1]))]
    low, high = max(bound[0], 0.0), min(bound[1], width - 1.0)
    out = []
    for pair in range(width // 2):
        plain = model.rope_theta ** (-2 * pair / width)
        share = min(1.0, max(0.0, (pair - low) / (high - low if high != low else 0.001)))
        out.append((1 - share) * plain + share * plain / model.rope_factor)
    return out


@pytest.mark.parametrize("given", [KIMI, GPT_OSS, DEEPSEEK_V2], ids=["Kimi-K2", "gpt-oss", "DeepSeek-V2"])
def test_yarn_slows_pairs_that_turn_seldom(given: dict[str, Any]) -> None:
    model = ModelConfig(**given)
    found = frequencies(model, 64)
    torch.testing.assert_close(found, torch.tensor(yarn(model, 64), dtype=torch.float64), rtol=1e-14, atol=0)
    plain = frequencies(ModelConfig(rope_theta=model.rope_theta), 64)
    assert found[0] == plain[0] and found[-1] == plain[-1] / model.rope_factor


def test_linear_scaling_divides_positions() -> None:
    model = ModelConfig(rope_scaling="linear", rope_factor=4.0)
    torch.testing.assert_close(frequencies(model, 8), frequencies(ModelConfig(), 8) / 4, rtol=0, atol=0)
    assert attention_factor(model) == score_factor(model) == 1.0


@pytest.mark.parametrize(
    "given, factor, scores",
    [
        ({}, 1.0, 1.0),
        (GPT_OSS, 0.1 * math.log(32) + 1, 1.0),
        (KIMI, 1.0, (0.1 * math.log(32) + 1) ** 2),
        (DEEPSEEK_V2, 1.0, (0.0707 * math.log(40) + 1) ** 2),
        (V3_OWN, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1), (0.05 * math.log(40) + 1) ** 2),
        ({**GPT_OSS, "rope_attention_factor": 1.5}, 1.5, 1.0),
        ({**KIMI, "rope_factor": 1.0}, 1.0, 1.0),
    ],
)
def test_cosines_and_scores_are_multiplied_as_the_configuration_says(given: dict[str, Any], factor: float, scores: float) -> None:
    model = ModelConfig(**given)
    assert attention_factor(model) == pytest.approx(factor, rel=1e-15)
    assert score_factor(model) == pytest.approx(scores, rel=1e-15)
    cos, sin = rope_table(5, frequencies(model, 8), attention_factor(model))
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2))
