"""Hypotheses about a layer's routing, its scores being right.

Pieces are what tokens a rank of cp and tp has of a group that shares capacity and balance.  Each sequence of a micro-batch is cut
over cp, and what a rank has of them, sequence after sequence, evenly over tp; a sequence, or the micro-batch, is a group.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megalina.blocks.routers import kind_of
from megalina.model.routers import GroupSoFar, Routing
from megalina.model.tokens import ALL, RouterTokens, router_tokens
from megalina.plan_settings import plan_of
from megalina.step.partition import most_parts
from megalina.verify.evidence import Cause, Evidence
from megalina.verify.recording import widened
from megalina.zigzag import own_part

Group = list[Tensor]  # of indices into the tokens of the global batch, a piece each


def groups(evidence: Evidence) -> list[Group]:
    """The groups of one step, each cut into the pieces that ranks have."""
    layout, length = evidence.layout, evidence.batch.tokens_BS.shape[1]
    per_sequence = evidence.config.router.group == "sequence"
    out: list[Group] = []
    for place in range(layout.readers):
        for sequences in layout.sequences(place * layout.tp * layout.cp):
            token_BS = torch.arange(sequences.start * length, sequences.stop * length).view(-1, length)
            parts = (
                [own_part(token_BS, layout.cp, c).flatten() for c in range(layout.cp)] if layout.cp > 1 else [token_BS.flatten()]
            )
            slices = [own for part in parts for own in part.chunk(layout.tp)]
            for group in token_BS if per_sequence else [token_BS.flatten()]:
                cuts = [own[(own >= group[0]) & (own <= group[-1])] for own in slices]
                out.append([c for c in cuts if len(c)])
    if evidence.config.router.group == "global":
        return [[piece for group in out for piece in group]]
    return out


def routed(evidence: Evidence, layer: int, piece: Tensor, group_tokens: int = 0) -> Routing:
    """What a router decides about tokens if it sees no others.  `group_tokens`: but knows of how many their group is."""
    router = evidence.model.layers[layer].router
    logits = evidence.pair("activation", f"layers.{layer}.logits").want.value.flatten(0, 1)[piece]
    known = router_tokens(evidence.batch)
    tokens = RouterTokens(known.token_A[piece], known.sample_A[piece], known.position_A[piece], known.valid_A[piece], 1)
    config, router.config = router.config, replace(router.config, group="micro_batch")  # these tokens are all there are
    try:
        with torch.no_grad():
            nobody_E = torch.zeros(router.num_experts, dtype=torch.int64)
            before = GroupSoFar(torch.tensor(group_tokens), nobody_E) if group_tokens else None
            routing: Routing = router(logits, tokens, logits, ALL, before)
    finally:
        router.config = config
    return routing


def routings(evidence: Evidence, layer: int) -> Iterator[list[tuple[Tensor, Routing]]]:
    """Of each group, (tokens, routing) of its pieces."""
    for group in groups(evidence):
        yield [(piece, routed(evidence, layer, piece)) for piece in group]


def capacity_of_pieces(evidence: Evidence) -> Iterator[Cause]:
    """Capacity is that of each tp rank's piece of a group, and who comes first is decided within the piece."""
    first = evidence.first
    ways = evidence.layout.tp * evidence.layout.cp
    if first is None or not first.name.endswith(".expert") or ways == 1:
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
            f"1/{ways} of a micro-batch, not of the group of tokens that shares it",
        )


def groups_by_other_rule(evidence: Evidence) -> Iterator[Cause]:
    """Groups of experts are worth their best score where they should be worth their two best ones, or the other way round."""
    first, router = evidence.first, evidence.config.router
    if first is None or not first.name.endswith(".expert") or "num_groups" not in kind_of(router).settings:
        return
    best = router.kind == "group_limited"  # what is wrong then
    layer, nobody = int(first.name.split(".")[1]), evidence.config.model.num_experts
    own = evidence.model.layers[layer].router
    choose = own.choose

    def other(tokens: RouterTokens, score_AE: Tensor) -> Tensor:
        grouped = score_AE.view(len(score_AE), router.num_groups, -1)
        worth = grouped.sort(dim=2, descending=True).values[:, :, : 1 if best else 2].sum(2)
        chosen = worth.sort(dim=1, descending=True, stable=True).indices[:, : router.groups_per_token]
        there = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, chosen, True)[:, :, None].expand_as(grouped)
        return score_AE.where(there.flatten(1), -1.0).sort(dim=1, descending=True, stable=True).indices[:, : router.top_k]

    want, got = first.want.value.flatten(0, 1), first.got.value.flatten(0, 1)
    predicted = torch.full_like(got, nobody)
    own.choose = other  # type: ignore[method-assign]
    try:
        for group in groups(evidence):
            token_A = torch.cat(group)
            predicted[token_A] = widened(routed(evidence, layer, token_A).expert_TK, got.shape[1], nobody)
    finally:
        own.choose = choose  # type: ignore[method-assign]
    if bool((predicted == got).all()):
        rule, right = ("its best score", "its two best") if best else ("its two best scores", "its best")
        yield Cause(
            "group_rule_of_other_family",
            f"{first.name}: {int((want != got).any(1).sum())} tokens go to other experts: a group of experts is worth {rule}, "
            f"and with router={router.kind} it is worth {right}",
        )


def load_counted_again(evidence: Evidence) -> Iterator[Cause]:
    """Loads are twice what they should be, in all layers, and routers are computed again in backward."""
    first = evidence.first
    if first is None or not first.name.endswith(".load") or evidence.layout.recompute == "none":
        return
    loads = [pair for pair in evidence.all("routing") if pair.name.endswith(".load")]
    if all(bool((pair.got.value == 2 * pair.want.value).all()) for pair in loads):
        yield Cause(
            "load_counted_again",
            f"loads of {len(loads)} layers are twice what they should be: a router that backward computes again, for recompute="
            f"{evidence.layout.recompute}, counts its choices again, and selection biases follow such counts",
        )


def capacity_of_parts(evidence: Evidence) -> Iterator[Cause]:
    """Capacity is the micro-batch's, but each of the parts that it walks in has the experts' queues to itself."""
    first, config, plan = evidence.first, evidence.config, plan_of(evidence.config.strategy)
    parts = max(plan.parts, most_parts(plan.partition))
    in_order = config.router.group == "micro_batch" and config.router.drop == "position" and evidence.layout.tp == 1
    if first is None or not first.name.endswith(".expert") or parts == 1 or not in_order:
        return
    layer, nobody = int(first.name.split(".")[1]), config.model.num_experts
    want, got = first.want.value.flatten(0, 1), first.got.value.flatten(0, 1)
    valid_A = evidence.batch.valid_BS.flatten()
    predicted = torch.full_like(got, nobody)
    for group in groups(evidence):
        (token_A,) = group
        if len(token_A) % parts:
            return
        tokens = int(valid_A[token_A].sum())
        for piece in token_A.chunk(parts):
            predicted[piece] = widened(routed(evidence, layer, piece, tokens).expert_TK, got.shape[1], nobody)
    if bool((predicted == got).all()):
        lost, right = int((got == nobody).sum()), int((want == nobody).sum())
        yield Cause(
            "capacity_not_passed",
            f"{first.name}: {lost} choices go to nobody instead of {right}: each of {parts} parts of a micro-batch is routed as "
            "if no tokens were before its own, so queues begin anew",
        )
