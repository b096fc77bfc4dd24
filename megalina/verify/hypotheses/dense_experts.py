"""Hypotheses about experts that all compute every token, what they read being right."""

from collections.abc import Iterator

import torch

from megalina.blocks.routers import kind_of
from megalina.model.dense_moe import DenseMoE
from megalina.verify.evidence import Cause, Evidence, close


def left_out(evidence: Evidence) -> Iterator[Cause]:
    """The first layer whose output differs has what it would without one of its experts."""
    first = evidence.first
    if first is None or first.got.kind != "activation" or not kind_of(evidence.config.router).is_dense:
        return
    _, _, index = first.name.partition("layers.")
    if not index.isdigit() or not evidence.model.layers[int(index)].is_moe:
        return
    layer = evidence.model.layers[int(index)]
    moe, batch = layer.moe, evidence.batch
    assert isinstance(moe, DenseMoE)
    h_TD = evidence.pair("activation", f"layers.{index}.attention").want.value.flatten(0, 1)
    weight_TE = evidence.pair("activation", f"layers.{index}.weight").want.value.flatten(0, 1)
    with torch.no_grad():
        n_TD = layer.mlp_norm(h_TD)
        shared = [] if layer.shared is None else [moe.shared(n_TD)]
        for expert in range(layer.num_experts):
            others_E = torch.arange(layer.num_experts) != expert
            out_TD = moe.mix(h_TD, moe.experts(n_TD, weight_TE * others_E), *shared, batch)
            if close(out_TD, first.got.value.flatten(0, 1)):
                yield Cause(
                    "expert_left_out",
                    f"{first.name}: expert {expert} of {layer.num_experts} is in no token's sum; with router=dense every expert "
                    "computes every token",
                )
                return
