"""The one-device GPT: documents don't see each other, padding changes nothing, lower precision stays near float64.

Shapes: B sequences, S tokens a sequence, T = B x S, V words.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.config import ModelConfig, RouterConfig
from megalina.model.gpt import GPT
from megalina.model.init import initialize

WORDS, SEQUENCES, LENGTH = 90, 3, 12
MODELS: dict[str, dict[str, Any]] = {
    "RMSNorm, RoPE": {},
    "LayerNorm, learned positions, biases": {"norm": "layernorm", "positions": "learned", "bias": True, "activation": "gelu"},
    "grouped queries, QK-norm, shared experts": {
        "num_kv_heads": 2,
        "qk_norm": "head",
        "shared_d_ff": 24,
        "tie_embeddings": False,
    },
    "dense first, ReLU, biases": {"dense_layers_first": 1, "activation": "relu", "bias": True},
}


def model(
    name: str, *, dtype: torch.dtype = torch.float64, padded: int = 0, router: RouterConfig | None = None, std: float = 0.1
) -> GPT:
    config = ModelConfig(d_model=32, d_ff=24, dense_d_ff=40, init_std=std, **MODELS[name])
    gpt = GPT(config, router or RouterConfig(), vocab_size=WORDS, max_positions=LENGTH, seed=1, padded_vocab=padded)
    initialize(gpt, seed=1, dtype=dtype)
    return gpt


def batch_of(*, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(0, WORDS, (SEQUENCES, LENGTH + 1), generator=generator)
    position_BS = torch.arange(LENGTH).repeat(SEQUENCES, 1)
    every_BS = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], every_BS, every_BS, position_BS, None, torch.arange(SEQUENCES))


def in_documents(batch: Batch, begins: list[int]) -> Batch:
    """Each sequence is cut into documents at `begins`; positions start anew."""
    begin_S = torch.zeros(LENGTH, dtype=torch.long)
    begin_S[begins] = 1
    position_S = torch.arange(LENGTH) - torch.cummax(torch.arange(LENGTH) * begin_S, 0).values
    document_S = begin_S.cumsum(0)
    return replace(batch, position_BS=position_S.repeat(SEQUENCES, 1), document_BS=document_S.repeat(SEQUENCES, 1))


def logits_of(gpt: GPT, batch: Batch) -> Tensor:
    with torch.no_grad():
        return gpt.logits(gpt.hidden(batch)[0])[:, :WORDS].view(*batch.tokens_BS.shape, WORDS)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_sees_only_tokens_before_it(name: str) -> None:
    gpt, batch = model(name), batch_of()
    changed = replace(batch, tokens_BS=torch.cat([batch.tokens_BS[:, :7], batch_of(seed=9).tokens_BS[:, 7:]], 1))
    before, after = logits_of(gpt, batch), logits_of(gpt, changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-13)
    assert (before[:, 7:] - after[:, 7:]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_token_does_not_see_an_earlier_document(name: str) -> None:
    gpt, batch = model(name), in_documents(batch_of(), [4, 9])
    changed = replace(batch, tokens_BS=torch.cat([batch_of(seed=9).tokens_BS[:, :4], batch.tokens_BS[:, 4:]], 1))
    torch.testing.assert_close(logits_of(gpt, batch)[:, 4:], logits_of(gpt, changed)[:, 4:], rtol=0, atol=1e-13)
    joined = replace(batch, document_BS=None), replace(changed, document_BS=None)
    assert (logits_of(gpt, joined[0])[:, 4:] - logits_of(gpt, joined[1])[:, 4:]).abs().max() > 1e-3  # without the mask it does


@pytest.mark.parametrize("name", MODELS)
def test_a_document_reads_as_if_it_were_alone(name: str) -> None:
    gpt, batch = model(name), in_documents(batch_of(), [4, 9])
    alone = Batch(
        *(getattr(batch, f)[:, 4:9] for f in ("tokens_BS", "labels_BS", "loss_mask_BS", "valid_BS", "position_BS")),
        None,
        batch.sample_B,
    )
    torch.testing.assert_close(logits_of(gpt, batch)[:, 4:9], logits_of(gpt, alone), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_vocabulary_changes_no_loss_and_no_gradient(name: str) -> None:
    found = []
    for padded in (0, 128):
        gpt = model(name, padded=padded)
        losses = gpt(batch_of())
        (losses.loss + losses.auxiliary["balance_loss"]).backward()
        found.append((losses.loss.detach(), {n: p.grad for n, p in gpt.named_parameters()}))
    (loss, plain), (padded_loss, with_padding) = found
    assert torch.equal(loss, padded_loss)
    for n, grad in plain.items():
        other = with_padding[n]
        assert grad is not None and other is not None
        if n in ("embedding", "head"):
            assert other.shape[0] == 128 and not other[WORDS:].any()
            other = other[:WORDS]
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-12)


def test_masked_labels_and_padding_count_nothing() -> None:
    gpt, batch = model("RMSNorm, RoPE"), batch_of()
    mask_BS = torch.rand(SEQUENCES, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.6
    logits = logits_of(gpt, batch)
    each_BS = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="none").view(
        SEQUENCES, LENGTH
    )
    masked = gpt(replace(batch, loss_mask_BS=mask_BS)).loss
    torch.testing.assert_close(masked.detach(), each_BS[mask_BS].sum(), rtol=1e-13, atol=0)
    valid_BS = (torch.arange(LENGTH) < 8).repeat(SEQUENCES, 1)
    short = Batch(
        *(getattr(batch, f)[:, :8] for f in ("tokens_BS", "labels_BS", "loss_mask_BS", "valid_BS", "position_BS")),
        None,
        batch.sample_B,
    )
    padded, want = gpt(replace(batch, loss_mask_BS=valid_BS, valid_BS=valid_BS)), gpt(short)
    torch.testing.assert_close(padded.loss, want.loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(padded.auxiliary, want.auxiliary, rtol=1e-13, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(padded.loads, want.loads, strict=True))
    assert sum(int(load[:-1].sum()) for load in padded.loads) == 2 * SEQUENCES * 8 * 2  # layers, tokens, experts a token


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision_stays_near_the_float64_loss_and_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The router's choices are kept out of it: every token visits every expert."""
    router = RouterConfig(top_k=4)
    exact, rounded = model(name, router=router), model(name, router=router, dtype=dtype)
    with torch.no_grad():  # the same weights, those that bfloat16 can hold
        for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
            p.copy_(q)
    want, got = exact(batch_of()).loss, rounded(batch_of()).loss
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=tolerance)
    want.backward()
    got.backward()
    for (n, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        if n.endswith("k_bias") or p.grad is None or q.grad is None:
            assert p.grad is not None or q.grad is None, n
            continue  # softmax does not see a key's bias: its gradient is rounding
        error = (p.grad - q.grad).norm() / p.grad.norm().clamp(min=1e-3)
        assert error < 10 * tolerance, (n, error)


def test_a_fresh_model_knows_nothing() -> None:
    """Tiny weights: every word is as likely as any other."""
    losses = model("RMSNorm, RoPE", std=1e-4)(batch_of())
    assert losses.loss.item() / (SEQUENCES * LENGTH) == pytest.approx(torch.tensor(float(WORDS)).log().item(), abs=1e-3)
