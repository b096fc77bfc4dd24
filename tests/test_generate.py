"""Generation with a KV cache equals the whole forward pass, token by token."""

from pathlib import Path

import pytest
import torch

from megalina.batch import Batch
from megalina.config import ModelConfig, RouterConfig
from megalina.generate import Sampling, choose, generate
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.reference import load

VOCABULARY, POSITIONS = 150, 32
GATE = f"{Path(__file__).resolve().parents[1]}/docs/examples/own_layer.py:Gate"


def small(router: RouterConfig | None = None, **model: object) -> GPT:
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "num_experts": 4, "d_ff": 16, "init_std": 0.3}
    config = ModelConfig(**(sizes | model))  # type: ignore[arg-type]
    gpt = GPT(config, router or RouterConfig(), vocab_size=VOCABULARY, max_positions=POSITIONS, seed=1)
    initialize(gpt, seed=1, dtype=torch.float64)
    return gpt


def whole_forward(gpt: GPT, tokens: list[int]) -> torch.Tensor:
    """Logits of the last token, without a cache."""
    token_BS = torch.tensor([tokens])
    everything = torch.ones_like(token_BS, dtype=torch.bool)
    batch = Batch(
        token_BS, token_BS, everything, everything, torch.arange(len(tokens))[None], None, torch.zeros(1, dtype=torch.int64)
    )
    gpt.eval()
    with torch.no_grad():
        return gpt.logits(gpt.hidden(batch)[0][-1:])[0]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"positions": "learned", "norm": "layernorm", "bias": True},
        {"shared_d_ff": 8, "qk_norm": "head"},
        {"attention_sinks": True, "window": 5, "full_attention_every": 2},
        {"window": 2},
        {"attention": "mla", "num_kv_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
        {"layer": ["attention", GATE, "ffn"]},
        {"mtp_layers": 1, "shared_d_ff": 8, "shared_gate": True, "activation": "swiglu_clamped"},
    ],
)
def test_the_likeliest_tokens_are_those_of_the_whole_forward_pass(model: dict[str, object]) -> None:
    gpt = small(**model)
    tokens = [3, 5, 7]
    for chosen in generate(gpt, [3, 5, 7], Sampling(max_tokens=12, max_positions=POSITIONS, temperature=0.0)):
        assert chosen == int(whole_forward(gpt, tokens).argmax())
        tokens.append(chosen)
    assert len(tokens) == 15


def test_the_same_seed_writes_the_same_text() -> None:
    gpt = small()

    def write(seed: int) -> list[int]:
        return list(generate(gpt, [1], Sampling(max_tokens=20, max_positions=POSITIONS, temperature=1.0, top_p=0.9, seed=seed)))

    assert write(1) == write(1) != write(2)


def test_a_tiny_top_p_is_the_likeliest_token() -> None:
    gpt = small()
    greedy = list(generate(gpt, [1], Sampling(max_tokens=10, max_positions=POSITIONS, temperature=0.0)))
    assert list(generate(gpt, [1], Sampling(max_tokens=10, max_positions=POSITIONS, top_p=1e-9))) == greedy


def test_it_ends_at_the_stop_token_and_at_the_last_position() -> None:
    gpt = small()
    greedy = list(generate(gpt, [1], Sampling(max_tokens=10, max_positions=POSITIONS, temperature=0.0)))
    stop = greedy[3]
    stopped = list(generate(gpt, [1], Sampling(max_tokens=10, max_positions=POSITIONS, temperature=0.0, stop_token=stop)))
    assert stopped == greedy[: greedy.index(stop) + 1]
    assert len(list(generate(gpt, [1] * 30, Sampling(max_tokens=10, max_positions=POSITIONS)))) == 2


def test_a_router_that_looks_ahead_is_refused() -> None:
    gpt = small(RouterConfig(kind="expert_choice"))
    with pytest.raises(ValueError, match="looks at later tokens"):
        next(generate(gpt, [1], Sampling(max_tokens=1, max_positions=POSITIONS)))


def test_a_block_that_mixes_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = small(layer=["attention", GATE, "ffn"])
    monkeypatch.setattr(load(GATE), "mixes_tokens", True)
    with pytest.raises(ValueError, match="layer 0 has the block gate, which mixes tokens"):
        next(generate(gpt, [1], Sampling(max_tokens=1, max_positions=POSITIONS)))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_senseless_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        next(generate(small(), [1], Sampling(max_tokens=1, max_positions=POSITIONS, **wrong)))  # type: ignore[arg-type]


def test_a_prompt_that_fills_all_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="32 tokens, but the model reads at most 32"):
        next(generate(small(), [1] * 32, Sampling(max_tokens=1, max_positions=POSITIONS)))


def test_an_id_that_the_tokenizer_lacks_is_never_written() -> None:
    gpt, few = small(), 20
    tokens = list(generate(gpt, [1], Sampling(max_tokens=25, max_positions=POSITIONS, temperature=2.0, num_ids=few)))
    assert max(tokens) < few <= max(generate(gpt, [1], Sampling(max_tokens=25, max_positions=POSITIONS, temperature=2.0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38, 1e-6])
def test_a_tiny_temperature_is_the_likeliest_token_however_large_the_logits(dtype: torch.dtype, temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e4, 1e30):
        logits_V = torch.tensor([-3.0, 2.0, 1.0, 0.0], dtype=dtype) * scale
        assert choose(logits_V, temperature, 1.0, random) == choose(-logits_V, temperature, 0.9, random) + 1 == 1


def test_probabilities_are_those_of_the_logits_over_the_temperature() -> None:
    logits_V, random = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([choose(logits_V, 2.0, 1.0, random) for _ in range(4000)]), minlength=3)
    assert (counts / 4000).tolist() == pytest.approx((logits_V / 2.0).softmax(0).tolist(), abs=0.03)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_named(value: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="logits are not finite: it has diverged"):
        choose(torch.tensor([0.0, value]), temperature, 1.0, torch.Generator())


@pytest.mark.parametrize("seed", [99999999999999999999, 2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"^seed is {seed}: choose a number from -9223372036854775808 to 18446744073709551615"):
        Sampling(max_tokens=1, max_positions=POSITIONS, seed=seed)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_every_seed_of_64_bits_is_taken(seed: int) -> None:
    assert len(list(generate(small(), [1], Sampling(max_tokens=1, max_positions=POSITIONS, seed=seed)))) == 1
