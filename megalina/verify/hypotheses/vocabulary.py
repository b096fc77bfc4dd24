"""Hypotheses about the vocabulary that tensor parallelism cuts: ranks that take their words for the first ones.

V words with padding, v = V / tp on each rank.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.config import padded_vocab_size
from megalina.verify.evidence import Cause, Evidence, close


def embedding_of_first_words(evidence: Evidence) -> Iterator[Cause]:
    """A word below v is found on every rank, another word on none."""
    first, layout = evidence.first, evidence.layout
    if first is None or first.name != "embedded" or layout.tp == 1:
        return
    word_T = evidence.batch.tokens_BS.flatten()
    rank_tvD = _cut(evidence, evidence.model.embedding.detach())
    width = rank_tvD.shape[1]
    found_TD = rank_tvD.sum(0)[word_T.clamp(max=width - 1)] * (word_T < width)[:, None]
    with torch.no_grad():
        predicted = evidence.model.embedder.placed(found_TD, evidence.batch)
    if close(predicted.view_as(first.got.value), first.got.value):
        missing = int((word_T >= width).sum())
        yield Cause(
            "vocabulary_first_words",
            f"each of {layout.tp} tp ranks looks up the first {width} words, whatever words it holds: {len(word_T) - missing} "
            f"tokens are found {layout.tp} times, {missing} nowhere",
        )


def head_of_first_words(evidence: Evidence) -> Tensor:
    """Scalar: the loss if each rank looks for a label among its words as if they were the first v."""
    model, batch = evidence.model, evidence.batch
    last = evidence.pair("activation", f"layers.{len(model.layers) - 1}").want.value.flatten(0, 1)
    head = model.embedding if model.head is None else model.head
    rank_tvD = _cut(evidence, head.detach())
    words = min(model.vocab_size, rank_tvD.shape[1])
    with torch.no_grad():
        logits_tTv = model.final_norm(last) @ rank_tvD.transpose(1, 2)
        label_T = batch.labels_BS.flatten()
        here_T = label_T < words
        target_T = logits_tTv.gather(2, label_T.clamp(max=words - 1).expand(len(rank_tvD), -1)[..., None]).squeeze(2).sum(0)
        lse_T = logits_tTv[:, :, :words].flatten().view(len(rank_tvD), len(label_T), words).logsumexp(2).logsumexp(0)
        loss_T = (lse_T - target_T.where(here_T, 0.0)).where(batch.loss_mask_BS.flatten(), 0.0)
    return loss_T.sum() / batch.loss_mask_BS.sum()


def _cut(evidence: Evidence, weight: Tensor) -> Tensor:
    """[tp, v, D]: each rank's words, padding zero."""
    padded = padded_vocab_size(evidence.model.vocab_size, evidence.layout.tp)
    return F.pad(weight, (0, 0, 0, padded - len(weight))).view(evidence.layout.tp, -1, weight.shape[1])
