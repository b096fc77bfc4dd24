"""Hypotheses about replayed routing, the router's scores being right.

Shapes: A tokens of the global batch, E experts, K experts a token.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megalina.model.tokens import ALL, router_tokens
from megalina.placement.expert_order import read_orders
from megalina.verify.evidence import Cause, Evidence, Pair, close
from megalina.verify.recording import widened


def of_places(evidence: Evidence) -> Iterator[Cause]:
    """Replayed numbers are those of places, where experts lie in another order."""
    if (found := _experts(evidence)) is None:
        return
    first, layer, given_AK = found
    expert_E = torch.tensor(_lying(evidence, layer))
    if _is(first, _sent(evidence, first, expert_E[given_AK.clamp(min=0)].where(given_AK >= 0, given_AK))):
        where = evidence.config.parallel.placement or f"dealt out to {evidence.layout.ep} ranks in turns"
        yield Cause(
            "replay_of_places",
            f"{first.name}: {_tokens(first)} tokens go to other experts than are replayed: the numbers of the file are taken for "
            f"places on the ranks, where experts lie in another order ({where})",
        )


def shifted(evidence: Evidence) -> Iterator[Cause]:
    """Each token has the experts of the one before it in its sequence, the first those of the last."""
    if (found := _experts(evidence)) is None:
        return
    first, _, given_AK = found
    of_sequences = given_AK.view(*evidence.batch.tokens_BS.shape, -1)
    before = torch.cat([of_sequences[:, -1:], of_sequences[:, :-1]], 1)
    if _is(first, _sent(evidence, first, before.flatten(0, 1))):
        yield Cause(
            "replay_shifted",
            f"{first.name}: {_tokens(first)} tokens go to other experts than are replayed: to those of the token before",
        )


def scores_zeroed(evidence: Evidence) -> Iterator[Cause]:
    """Weights are zero where a replayed expert is none of the router's own choices."""
    first = evidence.first
    if first is None or not first.name.endswith(".weight") or (given := _given(evidence, first)) is None:
        return
    layer, given_AK = given
    own_AK = _own(evidence, layer)
    sent_AK = given_AK.where(given_AK >= 0, own_AK)
    is_own_AK = (sent_AK[:, :, None] == own_AK[:, None, :]).any(2)
    want = first.want.value.flatten(0, 1)
    if close(want * is_own_AK, first.got.value.flatten(0, 1), first.floor):
        lost = int((~is_own_AK & evidence.batch.valid_BS.flatten()[:, None]).sum())
        yield Cause(
            "replay_scores_zeroed",
            f"{first.name}: {lost} replayed choices that the router would not have made weigh nothing, so neither their experts "
            "nor their scores learn: weights must be looked up among the scores of all experts",
        )


def _experts(evidence: Evidence) -> tuple[Pair, int, Tensor] | None:
    """The first difference, its layer and what is replayed there, if it is one of experts."""
    first = evidence.first
    if first is None or not first.name.endswith(".expert") or (given := _given(evidence, first)) is None:
        return None
    return first, *given


def _given(evidence: Evidence, first: Pair) -> tuple[int, Tensor] | None:
    """The layer, and the experts [A, K] that its tokens are given."""
    layer, replay_BSLK = int(first.name.split(".")[1]), evidence.batch.replay_BSLK
    if replay_BSLK is None or layer >= replay_BSLK.shape[2]:
        return None
    return layer, replay_BSLK[:, :, layer].flatten(0, 1).long()


def _sent(evidence: Evidence, first: Pair, given_AK: Tensor) -> Tensor:
    """[A, K]: the right choices, but what is given where something is."""
    own_AK = _own(evidence, int(first.name.split(".")[1]))
    sent_AK = given_AK.where(given_AK >= 0, own_AK)
    nobody = evidence.config.model.num_experts
    return widened(sent_AK.masked_fill(~evidence.batch.valid_BS.flatten()[:, None], nobody), first.got.value.shape[2], nobody)


def _own(evidence: Evidence, layer: int) -> Tensor:
    """[A, K]: what the router chooses by itself."""
    router = evidence.model.layers[layer].router
    logits_AE = evidence.pair("activation", f"layers.{layer}.logits").want.value.flatten(0, 1)
    tokens = replace(router_tokens(evidence.batch), valid_A=torch.ones_like(evidence.batch.valid_BS.flatten()), replay_ALK=None)
    with torch.no_grad():
        own: Tensor = router(logits_AE, tokens, logits_AE, ALL).expert_TK
    return own


def _lying(evidence: Evidence, layer: int) -> list[int]:
    """The expert in each place."""
    experts, ranks = evidence.config.model.num_experts, evidence.layout.ep
    if placement := evidence.config.parallel.placement:
        return list(read_orders(Path(placement)).layers[layer])
    return sorted(range(experts), key=lambda e: (e % ranks, e))


def _is(first: Pair, predicted_AK: Tensor) -> bool:
    return torch.equal(predicted_AK, first.got.value.flatten(0, 1))


def _tokens(first: Pair) -> int:
    """Of the batch, with other experts."""
    return int((first.want.value != first.got.value).any(2).sum())
