"""Multi-token prediction against its formula, and what may count: words of the own row and document, nothing that is lost.

Shapes: B sequences, S tokens a sequence, T = B x S, V words.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.counts import count_parameters, training_flops_per_token
from megalina.blocks.model import plain_shape
from megalina.config import ModelConfig, RouterConfig
from megalina.model.block_functions import Seen
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.model.mtp import ahead
from megalina.step.forward import plain
from megalina.step.inference import inference_step
from megalina.step.program import BucketSpec
from megalina.step.strategy import evaluation
from tests.model.test_gpt import LENGTH, SEQUENCES, WORDS, batch_of, in_documents


def model(**more: object) -> GPT:
    config = ModelConfig(num_layers=1, d_model=32, d_ff=24, mtp_layers=2, init_std=0.1, **more)  # type: ignore[arg-type]
    gpt = GPT(config, RouterConfig(), vocab_size=WORDS, max_positions=LENGTH, seed=1)
    initialize(gpt, seed=1, dtype=torch.float64)
    return gpt


def with_holes() -> Batch:
    batch = in_documents(batch_of(), [4, 9])
    valid_BS = batch.valid_BS.clone()
    valid_BS[1, 7:] = False
    mask_BS = valid_BS & (torch.rand(SEQUENCES, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.2)
    return replace(batch, valid_BS=valid_BS, loss_mask_BS=mask_BS)


def by_hand(gpt: GPT, batch: Batch, depth: int, n_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of cross entropies at a depth, and its stream behind its norm: the report's equations 21 to 23, place by place."""
    layer, weight_VD = gpt.mtp_layers[depth - 1], gpt.embedding if gpt.head is None else gpt.head
    word_BS = torch.stack([torch.cat([row[depth:], row[:depth]]) for row in batch.tokens_BS])
    embedded_TD = F.embedding(word_BS.flatten(), gpt.embedding)
    both_TX = torch.cat([layer.mtp.embedding_norm(embedded_TD), layer.mtp.hidden_norm(n_TD)], dim=1)
    x_TD = both_TX @ layer.mtp.projection.T
    for name in ("attention", "moe"):
        x_TD = layer.functions[name].forward(x_TD, batch, Seen())
    n_TD = layer.mtp.norm(x_TD)
    logits_BSV = (n_TD @ weight_VD.T).view(SEQUENCES, LENGTH, -1)
    loss = logits_BSV.new_zeros(())
    for b in range(SEQUENCES):
        for t in range(LENGTH - depth):
            same = batch.document_BS is None or batch.document_BS[b, t] == batch.document_BS[b, t + depth]
            if same and batch.valid_BS[b, t] and batch.loss_mask_BS[b, t + depth]:
                loss = loss + F.cross_entropy(logits_BSV[b, t], batch.labels_BS[b, t + depth])
    return loss, n_TD


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [batch_of(), with_holes()], ids=["plain", "documents, padding"])
def test_its_loss_is_the_formula(batch: Batch, tied: bool) -> None:
    gpt = model(tie_embeddings=tied)
    n_TD, _ = gpt.hidden(batch)
    total = torch.zeros((), dtype=torch.float64)
    for depth in (1, 2):
        loss, n_TD = by_hand(gpt, batch, depth, n_TD)
        total = total + loss
    ours = gpt(batch)
    torch.testing.assert_close(ours.auxiliary["mtp_loss"], total)
    parameters = dict(gpt.named_parameters())
    want, got = (
        torch.autograd.grad(v, list(parameters.values()), allow_unused=True) for v in (total, ours.auxiliary["mtp_loss"])
    )
    for name, a, b in zip(parameters, want, got, strict=True):
        torch.testing.assert_close(b, a, msg=lambda text, name=name: f"{name}: {text}")
        assert name == "final_norm.weight" or a is not None  # every weight serves it


def test_it_changes_nothing_of_what_the_model_predicts() -> None:
    gpt, batch = model(), with_holes()
    plain_gpt = GPT(replace(gpt.config, mtp_layers=0), RouterConfig(), vocab_size=WORDS, max_positions=LENGTH, seed=1)
    initialize(plain_gpt, seed=1, dtype=torch.float64)
    assert torch.equal(gpt(batch).loss, plain_gpt(batch).loss)
    assert [n for n, _ in gpt.named_parameters() if not n.startswith(("layers.1", "layers.2"))] == [
        n for n, _ in plain_gpt.named_parameters()
    ]


@pytest.mark.parametrize("depth", [1, 2, LENGTH - 1])
def test_no_row_and_no_document_hears_of_another(depth: int) -> None:
    batch = with_holes()
    counts_BS = ahead(batch, depth).loss_mask_BS
    assert not counts_BS[:, LENGTH - depth :].any()
    assert not counts_BS[1, max(7 - depth, 0) :].any()  # padding
    for b, t in counts_BS.nonzero().tolist():
        assert batch.document_BS[b, t] == batch.document_BS[b, t + depth]
        assert ahead(batch, depth).labels_BS[b, t] == batch.labels_BS[b, t + depth]
        assert ahead(batch, depth).tokens_BS[b, t] == batch.tokens_BS[b, t + depth] == batch.labels_BS[b, t + depth - 1]
    assert ahead(batch, depth) is ahead(batch, depth)  # made once for all that ask


def test_evaluation_and_inference_leave_it_out() -> None:
    shape = plain_shape(moe=(True, False), mtp_layers=2)
    assert [f"{s.name}.{s.layer}" for s in plain(shape) if s.name.startswith("mtp")] == [
        "mtp.2", "mtp_loss.2", "mtp.3", "mtp_loss.3",
    ]  # fmt: skip
    groups = dict.fromkeys(u for s in plain(shape) for u in s.uses)
    left = evaluation(shape, {name: BucketSpec(64, "dp") for name in groups})
    assert {s.layer for s in left} == {-1, 0, 1} and not any(s.name.startswith("mtp") for s in left)
    assert inference_step(shape, learns=False) == inference_step(plain_shape(moe=(True, False)), learns=False)


def test_what_it_costs_is_declared() -> None:
    """A layer more, a matrix of 2 x width x width, three norms; and the output matrix once more in FLOPs."""
    one, two = (ModelConfig(num_layers=layers, d_model=32, vocab_size=512) for layers in (1, 2))
    more = replace(one, mtp_layers=1)
    counted = [count_parameters(c, RouterConfig(), vocab_size=512, seq_len=8).total for c in (one, two, more)]
    assert counted[2] == counted[1] + 2 * 32 * 32 + 3 * 32
    assert counted[2] == sum(p.numel() for p in GPT(more, RouterConfig(), vocab_size=512, max_positions=8, seed=0).parameters())
    flops = [training_flops_per_token(c, RouterConfig(), vocab_size=512, seq_len=8) for c in (one, two, more)]
    assert flops[2] == pytest.approx(flops[1] + 6 * (2 * 32 * 32 + 32 * 512))
