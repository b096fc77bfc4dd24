"""The attention core of a piece of a sequence on CPU: S queries, the last of L tokens, over the keys of them all.

torch's fused kernel is asked twice, for the keys before the piece and for its own, and the two are put together by their sums of
exponentials; with documents or a window for a few queries at a time, so that no mask is larger than theirs.  What is needed for
backward is the result and a number for each query and head.  Neither function knows autograd; who calls them keeps what backward
needs.  All heads are of one width here; other letters as in `megalina/model/attend.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES_A_TURN = 64  # that go through the kernel at once where there are masks

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Seen:
    """What a query sees: keys at its own and earlier places, of its document and within its window."""

    scale: float  # of scores
    window: int = 0  # 0: none
    sink_H: Tensor | None = None  # scores of sinks


@dataclass(frozen=True, slots=True)
class _Span:
    """Of some queries, keys that the kernel is asked about."""

    queries: slice
    keys: slice
    causal: bool = False  # as many of both, each query with the keys up to its own
    added: Tensor | None = None  # to scores: [q, l], with documents [B, 1, q, l], -inf where a query does not see a key


def part_forward(q_BSHd: Tensor, k_BLGd: Tensor, v_BLGd: Tensor, document_BL: Tensor | None, seen: Seen) -> tuple[Tensor, Tensor]:
    """[B, S, H, d], and the logarithms of the sums of exponentials, those of sinks among them, [B, H, S]."""
    out_BSHd, all_BHS = torch.empty(q_BSHd.shape, dtype=q_BSHd.dtype), None
    for span in _spans(q_BSHd, k_BLGd, document_BL, seen.window):
        q, k, v = (x.transpose(1, 2) for x in (q_BSHd[:, span.queries], k_BLGd[:, span.keys], v_BLGd[:, span.keys]))
        out_BHqd, sum_BHq = _forward(q, k, v, dropout_p=0.0, is_causal=span.causal, attn_mask=span.added, scale=seen.scale)
        if all_BHS is None:
            all_BHS = sum_BHq.new_full((*sum_BHq.shape[:2], q_BSHd.shape[1]), float("-inf"))
        so_far_BHq, into_BqHd = all_BHS[:, :, span.queries], out_BSHd[:, span.queries]
        if span.keys.start == 0 or span.added is not None:  # the first keys of these queries
            into_BqHd.copy_(out_BHqd.transpose(1, 2))
            so_far_BHq.copy_(sum_BHq)
            continue
        both_BHq = torch.logaddexp(so_far_BHq, sum_BHq)
        into_BqHd.mul_(_share(so_far_BHq, both_BHq, out_BHqd.dtype))
        into_BqHd.addcmul_(out_BHqd.transpose(1, 2), _share(sum_BHq, both_BHq, out_BHqd.dtype))
        so_far_BHq.copy_(both_BHq)
    assert all_BHS is not None
    if seen.sink_H is not None:
        with_sinks_BHS = torch.logaddexp(all_BHS, seen.sink_H.to(all_BHS.dtype)[:, None])
        out_BSHd.mul_(_share(all_BHS, with_sinks_BHS, out_BSHd.dtype))
        all_BHS = with_sinks_BHS
    return out_BSHd, all_BHS


def _share(sum_BHq: Tensor, all_BHq: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, q, H, 1]: what some keys' weights are of all."""
    return (sum_BHq - all_BHq).exp_().to(dtype).transpose(1, 2).unsqueeze(3)


def part_backward(
    dout_BSHd: Tensor,
    q_BSHd: Tensor,
    keys: tuple[Tensor, Tensor],
    document_BL: Tensor | None,
    given: tuple[Tensor, Tensor],
    seen: Seen,
    dkeys: tuple[Tensor, Tensor],
) -> Tensor:
    """The gradient of queries; those of keys and values are added to `dkeys`.  `given`: what `part_forward` gave.

    The kernel's backward knows of the softmax nothing but its result and its sum, so of each span it gives that span's part."""
    out_BSHd, all_BHS = given
    dq_BSHd = torch.zeros(q_BSHd.shape, dtype=q_BSHd.dtype)
    for span in _spans(q_BSHd, keys[0], document_BL, seen.window):
        q, dout, out = (x[:, span.queries].transpose(1, 2) for x in (q_BSHd, dout_BSHd, out_BSHd))
        k, v = (x[:, span.keys].transpose(1, 2) for x in keys)
        how = {"dropout_p": 0.0, "is_causal": span.causal, "attn_mask": span.added, "scale": seen.scale}
        dq, *of_keys = _backward(dout, q, k, v, out, all_BHS[:, :, span.queries], **how)
        dq_BSHd[:, span.queries] += dq.transpose(1, 2)
        for so_far, more in zip(dkeys, of_keys, strict=True):
            so_far[:, span.keys] += more.transpose(1, 2)
    return dq_BSHd


def _spans(q_BSHd: Tensor, k_BLGd: Tensor, document_BL: Tensor | None, window: int) -> Iterator[_Span]:
    num_queries, num_keys = q_BSHd.shape[1], k_BLGd.shape[1]
    before = num_keys - num_queries
    if document_BL is None and not window:
        if before:
            yield _Span(slice(None), slice(0, before))
        yield _Span(slice(None), slice(before, None), causal=True)
        return
    for begin in range(0, num_queries, QUERIES_A_TURN):
        end = min(begin + QUERIES_A_TURN, num_queries)
        first_key, last_key = max(0, before + begin - window + 1) if window else 0, before + end
        own = before + begin - first_key  # of the first query, among these keys
        seen = torch.ones(end - begin, last_key - first_key, dtype=torch.bool).tril_(own)
        if window:
            seen.triu_(own - window + 1)
        if document_BL is not None:
            query_Bq, key_Bl = document_BL[:, before + begin : before + end], document_BL[:, first_key:last_key]
            seen = ((query_Bq[:, :, None] == key_Bl[:, None]) & seen).unsqueeze(1)
        added = torch.zeros(seen.shape, dtype=q_BSHd.dtype).masked_fill_(seen.logical_not_(), float("-inf"))
        yield _Span(slice(begin, end), slice(first_key, last_key), added=added)
