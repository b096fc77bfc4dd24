"""Attention of a piece of a sequence: what `attend` gives the same queries, forward and backward."""

import itertools

import pytest
import torch
from torch import Tensor

from megalina.model import attend_part as module
from megalina.model.attend import attend
from megalina.model.attend_part import attend_part
from megalina.model.largest_logits import largest_logits

B, S, L, H, G, D = 2, 7, 19, 4, 2, 6


def inputs(width: int = D) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((B, L, H, D), (B, L, G, D), (B, L, G, width), (H,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("window", "documents", "sinks"), list(itertools.product((0, 3), (False, True), (False, True))))
@pytest.mark.parametrize("turn", [256, 3])
def test_a_piece_gives_what_the_whole_gives(
    window: int, documents: bool, sinks: bool, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERIES_A_TURN", turn)
    q, k, v, sink = inputs()
    document = (torch.arange(L) // 5 + torch.zeros(B, 1)).long() if documents else None
    sink_H = sink if sinks else None
    whole = attend(q, k, v, document, window=window, sink_H=sink_H)
    part = attend_part(q[:, L - S :], k, v, document, window=window, sink_H=sink_H)
    torch.testing.assert_close(part, whole[:, L - S :], rtol=0, atol=1e-14)
    wanted = [q, k, v, *([sink] if sinks else [])]
    gradient = torch.randn_like(part)
    padded = torch.cat([torch.zeros_like(whole[:, : L - S]), gradient], 1)
    for got, want in zip(torch.autograd.grad(part, wanted, gradient), torch.autograd.grad(whole, wanted, padded), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("width", [4, 9])
def test_values_may_be_narrower_or_wider_than_keys(width: int) -> None:
    q, k, v, _ = inputs(width)
    whole = attend(q, k, v, scale=0.3)
    torch.testing.assert_close(attend_part(q[:, L - S :], k, v, scale=0.3), whole[:, L - S :], rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [0, 3])
def test_the_largest_logits_of_all_pieces_are_those_of_the_whole(window: int) -> None:
    q, k, _, _ = inputs()
    document = (torch.arange(L) // 5 + torch.zeros(B, 1)).long()
    whole = largest_logits(q, k, document, window=window)
    pieces = [largest_logits(q[:, a:b], k[:, :b], document[:, :b], window=window) for a, b in ((0, 5), (5, 12), (12, L))]
    assert torch.equal(torch.stack(pieces).amax(0), whole)
