"""Hypotheses about tokens that travel once to each rank, or node, that has experts of theirs, routing being right.

What goes wrong on the way changes how much each of a token's experts counts, so each is played with other weights."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalina.blocks.dispatch import ONCE_PER_NODE, ROWS
from megalina.model.permute import permute, row_order
from megalina.verify.evidence import Cause, Evidence, close
from megalina.verify.recording import NODES


@torch.no_grad()
def counted_otherwise(evidence: Evidence) -> Iterator[Cause]:
    """The first layer whose output differs gives what it would if some of a token's experts counted twice, or not at all."""
    first, layout = evidence.first, evidence.layout
    if first is None or first.got.kind != "activation" or layout.dispatch == ROWS:
        return
    _, _, index = first.name.partition("layers.")
    if not index.isdigit() or not evidence.model.layers[int(index)].is_moe:
        return
    layer, batch = evidence.model.layers[int(index)], evidence.batch
    h_TD = evidence.pair("activation", f"layers.{index}.attention").want.value.flatten(0, 1)
    expert_TK = evidence.pair("routing", f"layers.{index}.expert").want.value.flatten(0, 1)
    weight_TK = evidence.pair("activation", f"layers.{index}.weight").want.value.flatten(0, 1)
    n_TD = layer.mlp_norm(h_TD)
    order = row_order(expert_TK, layer.num_experts)
    back_ND = layer.experts(permute(n_TD, order), order.count_E.tolist())
    shared = layer.moe.shared(n_TD) if layer.shared is not None else None
    for name, says, factor_TK in _factors(evidence, expert_TK, weight_TK):
        out_TD = layer.moe.mixed(h_TD, back_ND, weight_TK * factor_TK, shared, order, batch)
        if close(out_TD, first.got.value.flatten(0, 1)):
            yield Cause(name, f"{first.name}: {says}")
            return


def _factors(evidence: Evidence, expert_TK: Tensor, weight_TK: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Causes, what they do, and what weights are multiplied by."""
    layout, experts = evidence.layout, evidence.config.model.num_experts
    per_node = layout.dispatch == ONCE_PER_NODE
    place_TK = expert_TK // (experts // (NODES if per_node else layout.ep))
    where = "node" if per_node else "rank"
    twice = f"what comes back from the {where} of a token's first expert is in its sum twice"
    yield "row_summed_twice", twice, 1.0 + (place_TK == place_TK[:, :1]).to(weight_TK.dtype)
    squared = "experts' weights are applied before the wire and after it"
    yield "weight_applied_twice", squared, weight_TK
    if per_node:
        ranks = layout.ep // NODES
        heard_TK = expert_TK // (experts // layout.ep) % ranks < ranks - 1
        forgotten = f"rank {ranks - 1} of each node's {ranks} is in no sum that the node's ranks send back"
        yield "rank_forgotten", forgotten, heard_TK.to(weight_TK.dtype)
