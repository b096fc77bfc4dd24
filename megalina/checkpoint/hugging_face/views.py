"""Views of tensors, as links between formats name them, and copies from one to the other."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from megalina.families.links import Link, View


def viewed(tensor: Tensor, view: View) -> Tensor:
    """The view of a whole, contiguous tensor."""
    cut = tensor.view(view.split or view.shape)[view.at]
    return cut.permute(view.order) if view.order else cut


def theirs_from(links: Iterable[Link], dtype: torch.dtype, ours: Callable[[str], Tensor]) -> Tensor:
    """The Hugging Face tensor that all these links are of."""
    out: Tensor | None = None
    for link in links:
        out = torch.empty(link.theirs.shape, dtype=dtype) if out is None else out
        viewed(out, link.theirs).copy_(viewed(ours(link.ours.name), link.ours))
    assert out is not None, "no links"
    return out


def ours_from(links: Iterable[Link], dtype: torch.dtype, theirs: Callable[[str], Tensor], rows: range | None = None) -> Tensor:
    """Our tensor that all these links are of; `rows`: only these of its first dim, each link being of one of them."""
    out: Tensor | None = None
    for link in links:
        view = link.ours
        if rows is not None:
            assert view.first is not None
            view = replace(view, shape=(len(rows), *view.shape[1:]), at=(view.first - rows.start, *view.at[1:]))
        out = torch.empty(view.shape, dtype=dtype) if out is None else out
        viewed(out, view).copy_(viewed(theirs(link.theirs.name), link.theirs))
    assert out is not None, "no links"
    return out
