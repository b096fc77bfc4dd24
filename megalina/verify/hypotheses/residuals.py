"""Hypotheses about the residual stream: what was added to it is wrong, its inputs being right.

T tokens of the global batch, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalina.model.gpt import Layer
from megalina.verify.evidence import MATCH, Cause, Evidence, close


def bias_on_each_rank(evidence: Evidence) -> Iterator[Cause]:
    """The bias of a matrix whose columns tp cuts is added before the sum over tp."""
    site, tp = _site(evidence), evidence.layout.tp
    if site is None or tp == 1:
        return
    layer, kind, before, want, got = site
    bias = layer.attention.proj_bias if kind == "attention" else layer.mlp.b2 if not layer.is_moe else None
    if bias is None:
        return
    residual = getattr(layer.functions[kind], f"{kind}_residual")
    with torch.no_grad():  # it adds the bias once itself
        more = residual(torch.zeros_like(want), bias * (tp - 2) + torch.zeros_like(want), evidence.batch)
    if close(more, got - want):
        name = f"layers.{layer.index}." + ("attention.proj_bias" if kind == "attention" else "mlp.b2")
        yield Cause("bias_added_tp_times", f"{name} is added {tp} = tp times: by every tp rank, before their outputs are summed")


def noise_of_each_rank(evidence: Evidence) -> Iterator[Cause]:
    """Everything is either dropped or right, but not the same elements are dropped."""
    rate = evidence.config.model.dropout
    first = evidence.first
    if not rate or first is None or first.got.kind != "activation":
        return
    found = _before_dropout(evidence)
    if found is None:
        return
    before, added = found
    kept = added / (1 - rate)
    most = kept.abs().max()
    dropped = total = 0
    for value in first.on_ranks:
        change = value.flatten(0, 1) - before
        here = ~change.isnan() & (added != 0)
        is_zero, is_kept = change.abs() <= MATCH * most, (change - kept).abs() <= MATCH * most
        if not (is_zero | is_kept)[here].all():
            return
        dropped += int((is_zero & ~is_kept)[here].sum())
        total += int(here.sum())
    if total and abs(dropped / total - rate) < 0.1:
        yield Cause(
            "dropout_per_rank",
            f"{first.name}: every element is dropped or right, {dropped / total:.0%} are dropped, but not those that one process "
            "drops: the noise depends on the rank",
        )


Site = tuple[Layer, str, Tensor, Tensor, Tensor]  # layer, attention or mlp, the stream before; after it: right, recorded


def _site(evidence: Evidence) -> Site | None:
    """Where a layer adds to the residual stream."""
    first = evidence.first
    if first is None or first.got.kind != "activation" or not first.name.startswith("layers."):
        return None
    _, index, *kind = first.name.split(".")
    if kind not in ([], ["attention"]):
        return None
    layer = evidence.model.layers[int(index)]
    before = f"layers.{index}.attention" if not kind else f"layers.{int(index) - 1}" if int(index) else "embedded"
    want, got = first.want.value.flatten(0, 1), first.got.value.flatten(0, 1)
    return layer, "attention" if kind else "mlp", evidence.pair("activation", before).want.value.flatten(0, 1), want, got


@torch.no_grad()
def _before_dropout(evidence: Evidence) -> tuple[Tensor, Tensor] | None:
    """[T, D] each: the stream before, and what is added to it if nothing is dropped."""
    model, batch = evidence.model, evidence.batch
    assert evidence.first is not None
    if evidence.first.name == "embedded":
        model.eval()
        added = model.embedder.embed(batch)
        model.train()
        return torch.zeros_like(added), added
    if (site := _site(evidence)) is None:
        return None
    layer, kind, before, _, _ = site
    rate, layer.rate = layer.rate, 0.0
    try:
        if kind == "attention":
            after = layer.attend(before, batch)
        elif layer.is_moe:
            after = _mixed(evidence, layer, before)
        else:
            after = layer.feed(before, batch)
    finally:
        layer.rate = rate
    return before, after - before


def _mixed(evidence: Evidence, layer: Layer, h_TD: Tensor) -> Tensor:
    """A MoE layer's output, micro-batch by micro-batch."""
    size = evidence.layout.micro_batch if evidence.config.router.group == "micro_batch" else len(evidence.batch.tokens_BS)
    out = []
    parts = evidence.batch.split(size)
    for part, h in zip(parts, h_TD.chunk(len(parts))):
        n, logits = layer.moe.scores(h)
        got, weight, *_, order, _, _ = layer.moe.selected(n, logits, logits, part)
        back = layer.experts(got, order.count_E.tolist())
        out.append(layer.moe.mixed(h, back, weight, layer.moe.shared(n) if layer.shared is not None else None, order, part))
    return torch.cat(out)
