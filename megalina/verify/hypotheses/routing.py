"""Hypotheses about a layer's routing, its scores being right."""

from collections.abc import Iterator

import torch

from megalina.verify.evidence import Cause, Evidence
from megalina.verify.hypotheses.pieces import routings
from megalina.verify.recording import widened


def capacity_of_pieces(evidence: Evidence) -> Iterator[Cause]:
    """Capacity is that of each tp rank's piece of a group, and who comes first is decided within the piece."""
    first = evidence.first
    if first is None or not first.name.endswith(".expert") or evidence.layout.tp == 1:
        return
    layer = int(first.name.split(".")[1])
    want, got = first.want.value.flatten(0, 1), first.got.value.flatten(0, 1)
    nobody = evidence.config.model.num_experts
    predicted = torch.full_like(got, nobody)
    for group in routings(evidence, layer):
        for piece, routing in group:
            predicted[piece] = widened(routing.expert_TK, got.shape[1], nobody)
    if bool((predicted == got).all()):
        lost, right = int((got == nobody).sum()), int((want == nobody).sum())
        yield Cause(
            "capacity_per_chunk",
            f"{first.name}: {lost} choices go to nobody instead of {right}: capacity is that of each tp rank's "
            f"1/{evidence.layout.tp} of a micro-batch, not of the group of tokens that shares it",
        )
