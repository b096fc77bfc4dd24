"""Attention of a piece of a sequence: what `attend` gives the same queries, forward and backward, whichever kernels are asked."""

import itertools

import pytest
import torch
from torch import Tensor

from megalina.model import attend_part as module
from megalina.model.attend import attend, of_one_width
from megalina.model.attend_part import Seen, part_backward, part_forward
from megalina.model.context_attention import _again, _by_torch, _piece_by_piece
from megalina.model.largest_logits import largest_logits

B, S, L, H, G, D = 2, 7, 19, 4, 2, 6
EXACT = {"rtol": 0, "atol": 1e-14}


def inputs(width: int = D) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((B, L, H, D), (B, L, G, D), (B, L, G, width), (H,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def documents() -> Tensor:
    return (torch.arange(L) // 5 + torch.zeros(B, 1)).long()


@pytest.mark.parametrize(("window", "several", "sinks"), list(itertools.product((0, 3), (False, True), (False, True))))
@pytest.mark.parametrize("turn", [256, 3])
def test_a_piece_gives_what_the_whole_gives(
    window: int, several: bool, sinks: bool, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERIES_A_TURN", turn)
    q, k, v, sink = inputs()
    document = documents() if several else None
    whole = attend(q, k, v, document, window=window, sink_H=sink if sinks else None).unflatten(2, (H, D))
    seen = Seen(D**-0.5, window, sink.detach() if sinks else None)
    own, keys = q.detach()[:, L - S :], (k.detach(), v.detach())
    given = part_forward(own, *keys, document, seen)
    torch.testing.assert_close(given[0], whole[:, L - S :].detach(), **EXACT)
    gradient = torch.randn_like(own)
    wanted = torch.autograd.grad(whole, (q, k, v), torch.cat([torch.zeros_like(whole[:, : L - S]), gradient], 1))
    dkeys = torch.zeros_like(k), torch.zeros_like(v)
    dq = part_backward(gradient, own, keys, document, given, seen, dkeys)
    for got, want in zip((dq, *dkeys), (wanted[0][:, L - S :], *wanted[1:]), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("width", [4, D, 9])
@pytest.mark.parametrize(("window", "several"), [(0, False), (3, True)])
def test_other_kernels_give_the_same(width: int, window: int, several: bool) -> None:
    """Those that a GPU would be asked for, here on CPU: forward, and once more in backward."""
    q, k, v, sink = (x.detach() for x in inputs(width))
    document, own = documents() if several else None, q[:, L - 6 :]
    seen = Seen(0.3, window, sink if window else None)
    pieces = [(slice(0, 3), 10), (slice(3, 6), L)]
    out, sums, by_torch = [], [], []
    for half, end in pieces:
        values = own[:, half], k[:, :end], v[:, :end]
        until = None if document is None else document[:, :end]
        out_piece, sum_piece = part_forward(*of_one_width(*values), until, seen)
        out.append(out_piece[..., :width])
        sums.append(sum_piece)
        by_torch.append(_by_torch(*values, until, seen))
    torch.testing.assert_close(torch.cat(out, 1), torch.cat(by_torch, 1), **EXACT)
    gradient = torch.randn_like(torch.cat(out, 1))
    dq, dmade = _piece_by_piece(pieces, (k, v), document, seen, own, gradient, torch.cat(out, 1), sums)
    dq_again, dmade_again, dsink = _again(pieces, (k, v), document, seen, own, gradient)
    for got, want in zip((dq, *dmade), (dq_again, *dmade_again), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    assert (dsink is None) == (not window)


@pytest.mark.parametrize("window", [0, 3])
def test_the_largest_logits_of_all_pieces_are_those_of_the_whole(window: int) -> None:
    q, k, _, _ = inputs()
    document = documents()
    whole = largest_logits(q, k, document, window=window)
    pieces = [largest_logits(q[:, a:b], k[:, :b], document[:, :b], window=window) for a, b in ((0, 5), (5, 12), (12, L))]
    assert torch.equal(torch.stack(pieces).amax(0), whole)
