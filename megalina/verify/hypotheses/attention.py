"""Hypotheses about attention, what it reads being right: what it gives would be that of another function of the same weights.

T tokens of the global batch, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megalina.model.attend import attend
from megalina.model.attention import Heads
from megalina.model.gpt import Layer
from megalina.model.mla import LatentHeads
from megalina.verify.evidence import Cause, Evidence, close
from megalina.zigzag import places


def other_pairs(evidence: Evidence) -> Iterator[Cause]:
    """Rotation of neighbours in place of halves, in queries or in the key."""
    if (site := _site(evidence)) is None or not isinstance(site[0].attention, LatentHeads):
        return
    layer, before, got, name = site
    heads, batch = layer.attention, evidence.batch
    with torch.no_grad():
        n_TD = layer.attention_norm(before)
        angle = _angles(heads, evidence)
        for what in ("queries", "the key"):
            q_BSHx, c_BSc, turned_BSr = heads.read(n_TD, batch, None)
            still, of_query = q_BSHx.split((heads.still, heads.turned), -1)
            if what == "queries":
                q_BSHx = torch.cat([still, _of_neighbours(of_query, angle.unsqueeze(2))], -1)
            else:
                turned_BSr = _of_neighbours(turned_BSr, angle)
            mixed = heads.attended(q_BSHx, c_BSc, turned_BSr, batch.document_BS, None)
            if close(_after(evidence, layer, before, mixed.flatten(0, 1) @ heads.proj.T), got):
                yield Cause(
                    "rope_interleaved",
                    f"{name}: positions turn {what} in pairs of neighbours, (0, 1), (2, 3), and the other in pairs of halves: "
                    "rows of weights that were made for the one are read as the other, or one of the two turns wrongly",
                )
                return


def _angles(heads: LatentHeads, evidence: Evidence) -> Tensor:
    """As complex numbers, [B, S, i], factor and all."""
    rotary, position_BS = heads.rotary[0], evidence.batch.position_BS
    return torch.complex(rotary.cos_Pi[position_BS], rotary.sin_Pi[position_BS])


def _of_neighbours(halves: Tensor, angle: Tensor) -> Tensor:
    """What was turned as halves, turned as neighbours."""
    numbers = torch.complex(*halves.chunk(2, -1)) / angle  # as it was before
    before = torch.cat([numbers.real, numbers.imag], -1)
    return torch.view_as_real(torch.view_as_complex(before.unflatten(-1, (-1, 2))) * angle).flatten(-2)


def norm_of_own_heads(evidence: Evidence) -> Iterator[Cause]:
    """The norm over all heads together is that of each tp rank's heads."""
    site, tp = _site(evidence), evidence.layout.tp
    if site is None or tp == 1 or not isinstance(site[0].attention, Heads) or site[0].attention.normed != "projection":
        return
    layer, before, got, name = site
    heads: Heads = layer.attention
    assert heads.q_norm is not None and heads.k_norm is not None
    with torch.no_grad():
        q_TX, k_TY, v_TY = heads.projected(layer.attention_norm(before))
        normed = []
        for x, norm in ((q_TX, heads.q_norm), (k_TY, heads.k_norm)):
            of_ranks = x.view(len(x), tp, -1)
            rms = (of_ranks.square().mean(-1, keepdim=True) + norm.eps).sqrt()
            normed.append((of_ranks / rms).flatten(1) * norm.weight)
        mixed = heads.mixed(normed[0], normed[1], v_TY, evidence.batch, None)
        if close(_after(evidence, layer, before, mixed @ heads.proj.T), got):
            yield Cause(
                "norm_of_own_heads",
                f"{name}: queries and keys are normed by the squares of each tp rank's own heads, a {tp}th of them: the sum of "
                "squares over tp is missing, or isn't read",
            )


def another_window(evidence: Evidence) -> Iterator[Cause]:
    """Attention sees other earlier tokens than its window says: one more, one less, or all of them."""
    site = _site(evidence)
    if site is None or not site[0].attention.window:
        return
    layer, before, got, name = site
    heads = layer.attention
    right = heads.window
    try:
        for window, cause in ((right + 1, "window_too_wide"), (right - 1, "window_too_narrow"), (0, "window_not_applied")):
            heads.window = window
            with torch.no_grad():
                if not (window or cause == "window_not_applied"):
                    continue
                if close(layer.attend(before, evidence.batch), got):
                    seen = f"{window} tokens" if window else "all earlier tokens"
                    yield Cause(cause, f"{name}: a token sees {seen}, and not {right}, itself among them (model.window)")
                    return
    finally:
        heads.window = right


def out_of_order(evidence: Evidence) -> Iterator[Cause]:
    """Context parallelism: keys, or all that is exchanged, lie rank after rank in place of the order of the sequence."""
    site, layout = _site(evidence), evidence.layout
    if site is None or layout.cp == 1:
        return
    layer, before, got, name = site
    heads, batch, length = layer.attention, evidence.batch, evidence.batch.tokens_BS.shape[1]
    order = torch.cat([places(length, layout.cp, rank) for rank in range(layout.cp)])  # of tokens, where they lie
    with torch.no_grad():
        n_TD = layer.attention_norm(before)
        k, v = heads.keys_and_values(heads.compact_keys(n_TD, batch, None), None)
        q = heads.queries(n_TD, batch, None)
        q = q[:, order] if layout.cp_kind == "all_to_all" else q
        how = {"scale": heads.scale, "window": heads.window, "sink_H": heads.sinks}
        mixed = attend(q, k[:, order], v[:, order], batch.document_BS, **how).flatten(0, 1)
        if close(_after(evidence, layer, before, _out(heads, mixed, n_TD)), got):
            yield Cause(
                "zigzag_undone_wrongly",
                f"{name}: tokens of {layout.cp} = cp ranks are attended to in the order of ranks, and each rank has two pieces "
                "from far apart: they must be put in the order of the sequence first",
            )


def another_piece(evidence: Evidence) -> Iterator[Cause]:
    """Context parallelism: a piece of each sequence is masked as if it lay where another one does."""
    site, layout = _site(evidence), evidence.layout
    if site is None or layout.cp == 1:
        return
    layer, before, got, name = site
    heads, batch, pieces = layer.attention, evidence.batch, 2 * layout.cp
    length = batch.tokens_BS.shape[1] // pieces
    masked = []
    with torch.no_grad():
        n_TD = layer.attention_norm(before)
        k, v = heads.keys_and_values(heads.compact_keys(n_TD, batch, None), None)
        q, how = heads.queries(n_TD, batch, None), {"scale": heads.scale, "window": heads.window, "sink_H": heads.sinks}
        recorded = got.view(*batch.tokens_BS.shape, -1)
        for piece, q_piece in enumerate(q.chunk(pieces, 1)):
            for place in (piece, *range(pieces)):  # the right one first
                end = (place + 1) * length
                document = None if batch.document_BS is None else batch.document_BS[:, :end]
                own = attend(q_piece, k[:, :end], v[:, :end], document, **how)
                mixed = torch.zeros(*batch.tokens_BS.shape, own.shape[-1], dtype=own.dtype)
                here = slice(piece * length, (piece + 1) * length)
                mixed[:, here] = own
                after = _after(evidence, layer, before, _out(heads, mixed.flatten(0, 1), n_TD)).view_as(recorded)
                if close(after[:, here], recorded[:, here]):
                    masked.append(place)
                    break
    wrong = {piece: place for piece, place in enumerate(masked) if piece != place}
    if len(masked) == pieces and wrong:
        piece, place = next(iter(wrong.items()))
        yield Cause(
            "mask_of_another_piece",
            f"{name}: piece {piece} of the {pieces} of a sequence sees keys as if it were piece {place} ({len(wrong)} pieces are "
            "masked wrongly): a piece sees the keys up to its own",
        )


def _out(heads: Any, mixed_TX: Tensor, n_TD: Tensor) -> Tensor:
    """What heads add, from what they give."""
    out: Tensor = heads.out(mixed_TX, n_TD if getattr(heads, "router", None) is not None else None, None)
    return out


def no_sinks(evidence: Evidence) -> Iterator[Cause]:
    """Sinks are left out of the softmax."""
    site = _site(evidence)
    if site is None or site[0].attention.sinks is None:
        return
    layer, before, got, name = site
    right = layer.attention.sinks
    try:
        layer.attention.register_parameter("sinks", None)
        with torch.no_grad():
            if close(layer.attend(before, evidence.batch), got):
                yield Cause("sinks_left_out", f"{name}: its weights sum to one: the heads' sinks are not among their scores")
    finally:
        layer.attention.register_parameter("sinks", right)


def _site(evidence: Evidence) -> tuple[Layer, Tensor, Tensor, str] | None:
    """Where the first difference is what attention gives: its layer, the stream before, [T, D], what was recorded, a name."""
    first = evidence.first
    if first is None or first.got.kind != "activation":
        return None
    _, _, place = first.name.partition("layers.")
    index, _, what = place.partition(".")
    if what != "attention":
        return None
    before = f"layers.{int(index) - 1}" if int(index) else "embedded"
    stream = evidence.pair("activation", before).want.value.flatten(0, 1)
    return evidence.model.layers[int(index)], stream, first.got.value.flatten(0, 1), first.name


def _after(evidence: Evidence, layer: Layer, before: Tensor, added_TD: Tensor) -> Tensor:
    """The stream behind attention, if its heads add this."""
    functions = layer.functions["attention"]
    out: Tensor = functions.attention_residual(before, added_TD, evidence.batch)  # type: ignore[attr-defined]
    return out
