"""Hypotheses about reported losses and numbers of tokens, all activations being right."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from megalina.model.locality import locality_loss
from megalina.model.mtp import ahead
from megalina.model.tokens import ALL, router_tokens
from megalina.verify.evidence import Cause, Evidence, close
from megalina.verify.hypotheses.routing import routings
from megalina.verify.hypotheses.vocabulary import head_of_first_words
from megalina.verify.recording import SEQUENCES


def padding(evidence: Evidence) -> Iterator[Cause]:
    """The number of tokens that losses are divided by counts padding."""
    batch = evidence.batch
    tokens, valid, padded = int(batch.loss_mask_BS.sum()), int(batch.valid_BS.sum()), int((~batch.valid_BS).sum())
    if not padded:
        return
    counts = []
    for name, count, wrong in (
        ("loss", tokens, (tokens + padded, batch.valid_BS.numel())),
        ("balance_loss", valid, (valid + padded,)),
        ("z_loss", valid, (valid + padded,)),
    ):
        pair = evidence.pair("loss", name)
        if pair.equal:
            continue
        divided = next((w for w in wrong if close(pair.want.value * count / w, pair.got.value)), None)
        if divided is None:
            return
        counts.append(f"{name} by {divided} tokens instead of {count}")
    for name, count, wrong in (
        ("loss_tokens", tokens, (tokens + padded, batch.valid_BS.numel())),
        ("valid_tokens", valid, (valid + padded,)),
    ):
        pair = evidence.pair("loss", name)
        if pair.equal:
            continue
        if pair.got.value.item() not in wrong:
            return
        counts.append(f"{name} is {pair.got.value:.0f} instead of {count}")
    if counts:
        yield Cause("padding_counted", f"{', '.join(counts)}: {padded} positions of padding are counted")


def balance_of_pieces(evidence: Evidence) -> Iterator[Cause]:
    """The balance loss is a mean of what ranks compute of their own tokens' counts."""
    pair, layers = evidence.pair("loss", "balance_loss"), evidence.model.moe_layers
    if pair.equal or evidence.layout.world == 1 or evidence.pair("loss", "loss").equal is False:
        return
    by_tokens = by_rank = torch.zeros((), dtype=torch.float64)
    most = 1
    for layer in layers:
        for group in routings(evidence, layer):
            most = max(most, len(group))
            counts = torch.stack([evidence.batch.valid_BS.flatten()[piece].sum() for piece, _ in group]).double()
            sums = torch.stack([routing.balance.double() for _, routing in group])
            by_tokens = by_tokens + sums.sum()
            by_rank = by_rank + (sums / counts.clamp(min=1)).mean() * counts.sum()
    if most == 1:
        return
    scale = int(evidence.batch.valid_BS.sum()) * len(layers)
    for value, how in ((by_tokens / scale, "weighted by their tokens"), (by_rank / scale, "all ranks alike")):
        if close(value, pair.got.value):
            yield Cause(
                "balance_loss_per_rank",
                f"balance_loss is {pair.got.value:.6g} instead of {pair.want.value:.6g}: the mean of {most} ranks' losses of "
                f"their own tokens alone, {how}; the counts of a group's tokens are not summed over ranks",
            )
            return


def information_of_pieces(evidence: Evidence) -> Iterator[Cause]:
    """The mutual information loss is a mean of what ranks compute of their own tokens."""
    weight, layers = evidence.config.router.mutual_information_loss, evidence.model.moe_layers
    if not weight or not layers or evidence.layout.tp == 1:
        return
    pair, found = evidence.pair("loss", "mutual_information_loss"), torch.zeros((), dtype=torch.float64)
    if pair.equal:
        return
    for layer in layers:
        for group in routings(evidence, layer):
            parts = [routing.information for _, routing in group]
            found = found + sum(part for part in parts if part is not None)
    if close(found / (int(evidence.batch.valid_BS.sum()) * len(layers)), pair.got.value):
        yield Cause(
            "mutual_information_per_rank",
            f"mutual_information_loss is {pair.got.value:.6g} instead of {pair.want.value:.6g}: each of {evidence.layout.tp} tp "
            "ranks takes it of its own tokens; the mean over a group's tokens must be that of all ranks' tokens",
        )


def homes_of_ranks(evidence: Evidence) -> Iterator[Cause]:
    """The locality loss is that of sequences which are at home where the rank is that computes them."""
    router, layout = evidence.config.router, evidence.layout
    if not router.locality_loss or layout.cp > 1 or evidence.pair("loss", "locality_loss").equal:
        return
    pair, known = evidence.pair("loss", "locality_loss"), router_tokens(evidence.batch)
    length = evidence.batch.tokens_BS.shape[1]
    rank_A = torch.arange(len(known.token_A)) // (length * (SEQUENCES // layout.dp))  # along dp
    total = torch.zeros((), dtype=torch.float64)
    for layer in evidence.model.moe_layers:
        logits = evidence.pair("activation", f"layers.{layer}.logits").want.value.flatten(0, 1)
        prob = evidence.model.layers[layer].router.log_scores(logits).softmax(1).detach()
        prob = prob.masked_fill(~known.valid_A[:, None], 0.0)
        total = total + locality_loss(prob, prob, replace(known, sample_A=rank_A), ALL, router.locality_nodes)
    value = total / int(known.valid_A.sum()) / len(evidence.model.moe_layers)
    if close(value, pair.got.value):
        yield Cause(
            "home_of_rank",
            f"locality_loss is {pair.got.value:.6g} instead of {pair.want.value:.6g}: a sequence is taken to be at home on the "
            "node of the rank that computes it, so each layout has a loss of its own; a home follows from the sequence's number",
        )


def ahead_of_other_documents(evidence: Evidence) -> Iterator[Cause]:
    """The loss of multi-token prediction counts words of other documents."""
    layers, batch = evidence.model.mtp_layers, evidence.batch
    if not layers or evidence.pair("loss", "mtp_loss").equal or batch.document_BS is None:
        return
    pair, total = evidence.pair("loss", "mtp_loss"), torch.zeros((), dtype=torch.float64)
    for depth, layer in enumerate(layers, 1):
        x_TD = evidence.pair("activation", f"layers.{layer.index}").want.value.flatten(0, 1)
        anywhere = ahead(replace(batch, document_BS=None), depth)
        with torch.no_grad():
            total = total + evidence.model.output.loss_behind(layer.mtp.norm, x_TD, anywhere)
    if close(total / int(batch.loss_mask_BS.sum()) / len(layers), pair.got.value):
        yield Cause(
            "mtp_across_documents",
            f"mtp_loss is {pair.got.value:.6g} instead of {pair.want.value:.6g}: words of the next document count, which a token "
            "can't know",
        )


def first_words_in_head(evidence: Evidence) -> Iterator[Cause]:
    """The loss is that of a head in which each tp rank takes its words for the first ones."""
    pair = evidence.pair("loss", "loss")
    if pair.equal or evidence.layout.tp == 1:
        return
    loss = head_of_first_words(evidence)
    if close(loss, pair.got.value):
        yield Cause(
            "vocabulary_first_words",
            f"loss is {pair.got.value:.6g} instead of {pair.want.value:.6g}: each of {evidence.layout.tp} tp ranks looks for "
            "labels among the first words, whatever words it holds",
        )
