"""The attention core against the definition, written out."""

import pytest
import torch
from torch import Tensor

from megalina.model import attend as attend_file
from megalina.model.attend import attend


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document: Tensor | None,
    *,
    scale: float | None = None,
    window: int = 0,
    sink: Tensor | None = None,
) -> Tensor:
    batch, num_queries, heads, head_dim = q.shape
    num_keys, repeat = k.shape[1], heads // k.shape[2]
    out = []
    for b in range(batch):
        for h in range(heads):
            score = q[b, :, h] @ k[b, :, h // repeat].T * (scale or head_dim**-0.5)
            for i in range(num_queries):
                at = num_keys - num_queries + i
                hidden = [
                    j > at or (window > 0 and j <= at - window) or (document is not None and document[b, j] != document[b, at])
                    for j in range(num_keys)
                ]
                score[i, torch.tensor(hidden)] = float("-inf")
            if sink is not None:
                score = torch.cat([score, sink[h].expand(num_queries, 1)], 1)
            out.append(score.softmax(-1)[:, :num_keys] @ v[b, :, h // repeat])
    return torch.stack(out).view(batch, heads, num_queries, v.shape[3]).transpose(1, 2).flatten(2)


DOCUMENTS = {
    "one document": None,
    "packed documents": torch.tensor([[0] * 5 + [1] * 6, [3] * 2 + [4] * 7 + [5] * 2]),
    "documents that return": torch.tensor([[0, 0, 1, 1, 1, 0, 0, 2, 2, 1, 1], [1] * 11]),
}


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("way", ["blocks", "fused"])
def test_attention_equals_its_definition(
    document: Tensor | None, heads: int, groups: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend_file, "QUERIES_A_BLOCK", 4)  # 11 tokens: two blocks and a rest
    monkeypatch.setattr(attend_file, "SHORTEST_BLOCKED", 1 if way == "blocks" else 1024)
    q, k, v = draw(2, 11, heads, 6), draw(2, 11, groups, 6, seed=1), draw(2, 11, groups, 6, seed=2)
    ours, theirs = attend(q, k, v, document), plain_attention(q, k, v, document)
    torch.testing.assert_close(ours, theirs)
    dy = draw(*ours.shape, seed=3).detach()
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(theirs, (q, k, v), dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("way", ["blocks", "fused"])
@pytest.mark.parametrize(
    "window, sinks, value, scale", [(3, False, 6, None), (0, True, 6, None), (5, True, 4, 0.3), (11, True, 8, None)]
)
def test_windows_sinks_and_narrow_values_equal_their_definition(
    document: Tensor | None, way: str, window: int, sinks: bool, value: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend_file, "QUERIES_A_BLOCK", 4)
    monkeypatch.setattr(attend_file, "SHORTEST_BLOCKED", 1 if way == "blocks" else 1024)
    inputs = [draw(2, 11, 4, 6), draw(2, 11, 2, 6, seed=1), draw(2, 11, 2, value, seed=2), *([draw(4, seed=4)] if sinks else [])]
    q, k, v, *sink = inputs
    ours = attend(q, k, v, document, scale=scale, window=window, sink_H=sink[0] if sinks else None)
    theirs = plain_attention(q, k, v, document, scale=scale, window=window, sink=sink[0] if sinks else None)
    torch.testing.assert_close(ours, theirs)
    dy = draw(*ours.shape, seed=3).detach()
    for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)
    by_definition = attend_file._by_definition  # as on CUDA
    if sinks:
        mask = attend_file.attention_mask(11, 11, document, q.device, window)
        torch.testing.assert_close(by_definition(q, k, v, mask, scale or 6**-0.5, sink[0], causal=False), theirs)


@pytest.mark.parametrize("document", [None, torch.tensor([[0] * 4 + [1] * 5])], ids=["one document", "packed documents"])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("window, sinks", [(2, False), (4, True), (9, True)])
def test_decoding_sees_a_window_and_sinks(document: Tensor | None, num_queries: int, window: int, sinks: bool) -> None:
    q, k, v, sink = draw(1, 9, 4, 6), draw(1, 9, 2, 6, seed=1), draw(1, 9, 2, 6, seed=2), draw(4, seed=4) if sinks else None
    whole = plain_attention(q, k, v, document, window=window, sink=sink)[:, -num_queries:]
    torch.testing.assert_close(attend(q[:, -num_queries:], k, v, document, window=window, sink_H=sink), whole)


def test_blocks_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_file, "SHORTEST_BLOCKED", 1)
    q, k, v = draw(1, 5, 2, 3), draw(1, 5, 1, 3, seed=1), draw(1, 5, 1, 3, seed=2)
    document = torch.tensor([[0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, document), (q, k, v))


@pytest.mark.parametrize("document", [None, torch.tensor([[0] * 4 + [1] * 5])], ids=["one document", "packed documents"])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_decoding_equals_the_last_positions_of_the_whole_sequence(document: Tensor | None, num_queries: int) -> None:
    q, k, v = draw(1, 9, 4, 6), draw(1, 9, 2, 6, seed=1), draw(1, 9, 2, 6, seed=2)
    whole = attend(q, k, v, document)
    torch.testing.assert_close(attend(q[:, -num_queries:], k, v, document), whole[:, -num_queries:])


def test_strided_views_of_one_projection_can_be_attended() -> None:
    qkv = draw(2, 7, 4 + 2 + 2, 6)
    parts = qkv.split([4, 2, 2], dim=2)
    torch.testing.assert_close(attend(*parts), attend(*(x.contiguous() for x in parts)))
    (grad,) = torch.autograd.grad(attend(*parts).sin().sum(), qkv)
    (right,) = torch.autograd.grad(plain_attention(*parts, None).sin().sum(), qkv)
    torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_stay_close(dtype: torch.dtype) -> None:
    q, k, v = draw(2, 70, 4, 16), draw(2, 70, 2, 16, seed=1), draw(2, 70, 2, 16, seed=2)
    low = attend(*(x.to(dtype) for x in (q, k, v)))
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), attend(q, k, v), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_no_queries_give_no_rows() -> None:
    assert attend(draw(0, 5, 4, 6), draw(0, 5, 2, 6), draw(0, 5, 2, 6)).shape == (0, 5, 24)
