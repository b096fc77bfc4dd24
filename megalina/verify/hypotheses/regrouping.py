"""Hypotheses about rows that are in the wrong order around the experts, routing being right.

What arrives at a rank is sorted by (source rank, expert) and must be regrouped by expert, and back.  Here the exchange is
played on one process, without the one or the other.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.routers import kind_of
from megalina.model.experts import expert_mlp
from megalina.model.gpt import Layer
from megalina.model.permute import RowOrder, permute, regroup_index, row_order
from megalina.verify.evidence import Cause, Evidence, close

VARIANTS = {  # (rows are regrouped on arrival, and on the way back) -> what that does
    (False, False): "experts compute other experts' rows",
    (False, True): "experts compute other experts' rows, which then go back to other tokens",
    (True, False): "results go back to other tokens",
}


def rows_in_arrival_order(evidence: Evidence) -> Iterator[Cause]:
    """The first layer whose output differs gives what it would without regrouping."""
    first = evidence.first
    if (
        first is None
        or first.got.kind != "activation"
        or evidence.layout.ep == 1
        or evidence.layout.cp > 1
        or kind_of(evidence.config.router).is_dense
    ):
        return
    _, _, index = first.name.partition("layers.")
    if not index.isdigit() or not evidence.model.layers[int(index)].is_moe:
        return
    for (arriving, leaving), what in VARIANTS.items():
        if close(_output(evidence, int(index), arriving, leaving), first.got.value.flatten(0, 1)):
            yield Cause(
                "rows_not_regrouped",
                f"{first.name}: rows that arrive from {evidence.layout.ep} ranks are "
                f"{'not regrouped by expert' if not arriving else 'not put back by source rank'}: {what}",
            )
            return


@torch.no_grad()
def _output(evidence: Evidence, index: int, arriving: bool, leaving: bool) -> Tensor:
    """[T, D] of the global batch: a MoE layer's output."""
    layer, layout = evidence.model.layers[index], evidence.layout
    h_TD = evidence.pair("activation", f"layers.{index}.attention").want.value.flatten(0, 1)
    expert_TK = evidence.pair("routing", f"layers.{index}.expert").want.value.flatten(0, 1)
    weight_TK = evidence.pair("activation", f"layers.{index}.weight").want.value.flatten(0, 1)
    parts = evidence.batch.split(layout.micro_batch)
    out = torch.full_like(h_TD, float("nan"))
    length = evidence.batch.tokens_BS.shape[1]
    for ranks in evidence.rows["ep"]:
        for m in range(layout.micro_batches):
            own: list[tuple[Tensor, slice, Batch, RowOrder]] = []
            for rank in ranks:
                sequences = layout.sequences(rank)[m]
                width = len(sequences) * length // layout.tp
                cut = slice(rank % layout.tp * width, (rank % layout.tp + 1) * width)
                token_T = torch.arange(sequences.start * length, sequences.stop * length)[cut]
                order = row_order(expert_TK[token_T], layer.num_experts)
                own.append((token_T, cut, parts[sequences.start // layout.micro_batch], order))
            normed = [layer.mlp_norm(h_TD[token_T]) for token_T, *_ in own]
            sent = [permute(n, order) for n, (*_, order) in zip(normed, own)]
            backs = _exchanged(layer, sent, [order.count_E for *_, order in own], arriving, leaving)
            for n, back, (token_T, cut, part, order) in zip(normed, backs, own):
                shared = layer.moe.shared(n) if layer.shared is not None else None
                out[token_T] = layer.moe.mixed(h_TD[token_T], back, weight_TK[token_T], shared, order, part, cut)
    return out


def _exchanged(layer: Layer, sent: list[Tensor], counts: list[Tensor], arriving: bool, leaving: bool) -> list[Tensor]:
    """Rows of each rank, sorted by expert, after their way to the experts and back."""
    ranks = len(sent)
    here = layer.num_experts // ranks
    blocks = [s.split(c.view(ranks, -1).sum(1).tolist()) for s, c in zip(sent, counts)]  # [source][destination]
    back: list[list[Tensor]] = [[] for _ in sent]
    for destination in range(ranks):
        arrived = torch.cat([b[destination] for b in blocks])
        count_RE = torch.stack([c.view(ranks, -1)[destination] for c in counts])
        index, inverse = regroup_index(count_RE.tolist())
        held = slice(destination * here, (destination + 1) * here)
        e = layer.experts
        b1, b2 = (b if b is None else b[held] for b in (e.b1, e.b2))
        rows = arrived[index] if arriving else arrived
        rows = expert_mlp(rows, count_RE.sum(0).tolist(), e.w1[held], e.w2[held], b1, b2, activation=e.activation)
        rows = rows[inverse] if leaving else rows
        for source, part in enumerate(rows.split([len(b[destination]) for b in blocks])):
            back[source].append(part)
    return [torch.cat(parts) for parts in back]
