"""Routing traces: files come back as they were written or are refused by name; cut, joined and changed, no choice gets lost."""

import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megalina.placement.routing_trace import (
    RoutingTrace,
    alternate,
    batches,
    best_first,
    counts_LE,
    counts_of,
    halves,
    joined,
    merged_experts,
    probability_for_skew,
    read_trace,
    rerouted_evenly,
    skew,
    top1,
    traced,
    write_trace,
)
from tests.fuzz.bounded import spoiled
from tests.profiles import examples

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"


@st.composite
def traces(draw: st.DrawFn, num_layers: int | None = None, num_experts: int | None = None) -> RoutingTrace:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = num_experts or draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts)) if num_experts is None else 2
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    shape = (sum(lengths), num_layers or draw(st.integers(1, 4)))
    ids = np.argsort(random.random((*shape, experts)), axis=2)[..., :top_k]
    weighted, asked_ahead = draw(st.booleans()), draw(st.booleans())
    ahead = np.argsort(random.random((*shape, experts)), axis=2)[..., :top_k].astype(np.uint8)
    ahead[:, 0] = experts  # nobody
    return traced(
        ids.astype(draw(st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]))),
        experts,
        weights_TLK=random.random(ids.shape).astype(draw(st.sampled_from([np.float16, np.float32]))) if weighted else None,
        sample_lengths_S=np.array(lengths),
        layers=sorted(random.choice(50, shape[1], replace=False).tolist()),
        name=draw(st.sampled_from(["", "a", "größer"])),
        ahead_ids_TLK=ahead if asked_ahead else None,
    )


def same(a: RoutingTrace, b: RoutingTrace) -> bool:
    pairs = [(a.expert_ids_TLK, b.expert_ids_TLK), (a.sample_lengths_S, b.sample_lengths_S), (a.weights_TLK, b.weights_TLK),
             (a.ahead_ids_TLK, b.ahead_ids_TLK)]  # fmt: skip
    arrays = all((x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in pairs)  # type: ignore
    return arrays and (a.num_experts, a.layers, a.name) == (b.num_experts, b.layers, b.name)


def small(
    tokens: int = 6, num_experts: int = 4, top_k: int = 2, lengths: list[int] | None = None, name: str = "t"
) -> RoutingTrace:
    ids = (np.arange(tokens)[:, None, None] + np.arange(3)[:, None] + np.arange(top_k)) % num_experts
    return traced(ids.astype(np.uint8), num_experts, sample_lengths_S=None if lengths is None else np.array(lengths), name=name)


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


# files


@given(traces())
def test_a_file_gives_back_the_trace_and_equal_traces_equal_bytes(folder: Path, trace: RoutingTrace) -> None:
    write_trace(folder / "a.npz", trace)
    write_trace(folder / "b.npz", trace)
    assert same(read_trace(folder / "a.npz"), trace)
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()
    assert sorted(path.name for path in folder.iterdir() if path.name[0] in "ab") == ["a.npz", "b.npz"]


def test_what_is_optional_is_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "five.npz"
    path.write_bytes(npz(expert_ids=np.array([[[0, 4]], [[1, 2]]], np.uint8), other=np.zeros(3)))
    trace = read_trace(path)
    assert (trace.num_experts, trace.layers, trace.name, trace.weights_TLK) == (8, (0,), "five", None)
    assert trace.sample_lengths_S.tolist() == [2]
    assert read_trace(path, num_experts=5).num_experts == 5
    with pytest.raises(ValueError, match=r"five.npz: .*ids go from 0 to 4, but there are experts 0 to 3"):
        read_trace(path, num_experts=4)


IDS = np.array([[[0, 1]], [[1, 2]]], np.uint8)
BAD = [
    ({"counts": np.zeros(3)}, "has no array expert_ids"),
    ({"expert_ids": IDS[:0]}, r"empty: expert_ids is \[0, 1, 2\]"),
    ({"expert_ids": IDS[0]}, r"integers \[T, L, K\], not uint8 \[1, 2\]"),
    ({"expert_ids": IDS.astype(np.float32)}, "not float32"),
    ({"expert_ids": IDS.astype(bool)}, "not bool"),
    ({"expert_ids": np.array([[[None]]], object)}, "damaged: expert_ids is object"),
    ({"expert_ids": IDS - np.int64(1)}, "go from -1 to 1"),
    ({"expert_ids": IDS, "num_experts": np.array(2)}, "go from 0 to 2, but there are experts 0 to 1"),
    ({"expert_ids": IDS, "num_experts": np.array(1)}, "2 choices a token need as many experts"),
    ({"expert_ids": IDS, "num_experts": np.array(4.0)}, "num_experts is float64"),
    ({"expert_ids": IDS, "num_experts": np.array([4])}, r"num_experts is int64 \[1\]"),
    ({"expert_ids": IDS * 0}, r"token 0 chose an expert twice in layer 0: \[0, 0\]"),
    ({"expert_ids": IDS, "weights": np.zeros((2, 1, 1), np.float32)}, r"weights must be .* not float32 \[2, 1, 1\]"),
    ({"expert_ids": IDS, "weights": np.zeros((2, 1, 2))}, "not float64"),
    ({"expert_ids": IDS, "weights": np.full((2, 1, 2), np.nan, np.float32)}, "4 of 4 weights are not finite"),
    ({"expert_ids": IDS, "sample_lengths": np.array([1, 2])}, "sum to 2 tokens, but sum to 3"),
    ({"expert_ids": IDS, "sample_lengths": np.array([3, -1])}, "at least 1"),
    ({"expert_ids": IDS, "sample_lengths": np.array([2, 0])}, "at least 1"),
    ({"expert_ids": IDS, "sample_lengths": np.array([], np.int64)}, "sum to 0"),
    ({"expert_ids": IDS, "sample_lengths": np.array([2**62, 2**62, 2**62, 2**62, 2])}, "but sum to 18446744073709551618"),
    ({"expert_ids": IDS, "sample_lengths": np.array([2.0])}, "sample_lengths must be integers"),
    ({"expert_ids": IDS, "layers": np.array([1, 2])}, "layers must be 1 rising numbers"),
    ({"expert_ids": IDS, "layers": np.array([-1])}, r"not \[-1\]"),
    ({"expert_ids": IDS, "layers": np.array([0.5])}, "layers is float64"),
    ({"expert_ids": IDS, "name": np.array(3)}, "name is int64"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD, ids=[message for _, message in BAD])
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    (tmp_path / "bad.npz").write_bytes(npz(**arrays))
    with pytest.raises(ValueError, match=message) as raised:
        read_trace(tmp_path / "bad.npz")
    assert str(raised.value).startswith(str(tmp_path / "bad.npz")) and "\n" not in str(raised.value)


def test_layers_that_do_not_rise_are_refused() -> None:
    ids = np.zeros((1, 2, 1), np.uint8)
    for layers in ([1, 1], [2, 1], []):
        with pytest.raises(ValueError, match="2 rising numbers"):
            traced(ids, layers=layers)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.save(out, np.array([[[{}]]], object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("expert_ids.npy", out.getvalue())
    with pytest.raises(ValueError, match="p.npz is no routing trace"):
        read_trace(tmp_path / "p.npz")


def test_a_shape_that_the_file_cannot_hold_takes_no_memory(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 4, 4)})
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive:
        archive.writestr("expert_ids.npy", out.getvalue() + bytes(100))
    with pytest.raises(ValueError, match=r"big.npz is no routing trace, or damaged: .* 17592186044416 bytes, but has 100"):
        read_trace(tmp_path / "big.npz")


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.npz")


@examples(1.5)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), st.one_of(st.just(0), st.integers(0, 10**6)))
@example([], 1)
@example([], 700)
def test_damaged_bytes_give_the_same_trace_or_are_named(folder: Path, edits: list[tuple[int, int]], cut: int) -> None:
    trace = small(lengths=[2, 4])
    write_trace(folder / "whole.npz", trace)
    (folder / "damaged.npz").write_bytes(spoiled((folder / "whole.npz").read_bytes(), edits, cut))
    try:
        found = read_trace(folder / "damaged.npz")
    except ValueError as error:
        assert str(folder / "damaged.npz") in str(error) and "\n" not in str(error)
    else:  # each array has a checksum; only the archive's names of what is optional have none
        assert np.array_equal(found.expert_ids_TLK, trace.expert_ids_TLK)


def test_every_cut_file_is_refused(folder: Path) -> None:
    write_trace(folder / "long.npz", small())
    data = (folder / "long.npz").read_bytes()
    for size in range(0, len(data), 7):
        (folder / "short.npz").write_bytes(data[:size])
        with pytest.raises(ValueError, match="short.npz"):
            read_trace(folder / "short.npz")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, small(lengths=[2, 4]))
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_trace(path, small())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# parts and wholes


@given(traces(), st.integers(1, 40))
def test_batches_hold_every_token_once_in_order(trace: RoutingTrace, batch_tokens: int) -> None:
    parts = list(batches(trace, batch_tokens))
    assert np.array_equal(np.concatenate(parts), trace.expert_ids_TLK)
    assert [len(part) for part in parts[:-1]] == [batch_tokens] * (len(parts) - 1)
    whole = [part for part in parts if len(part) == batch_tokens]
    assert len(list(batches(trace, batch_tokens, drop_last=True))) == len(whole)


@given(traces())
def test_halves_joined_are_the_whole_cut_nearest_the_middle(trace: RoutingTrace) -> None:
    lengths = trace.sample_lengths_S.tolist()
    if len(lengths) == 1:
        with pytest.raises(ValueError, match="one sample"):
            halves(trace)
        return
    first, second = halves(trace)
    whole = joined([first, second])
    assert np.array_equal(whole.expert_ids_TLK, trace.expert_ids_TLK) and whole.sample_lengths_S.tolist() == lengths
    assert same(whole, replace(trace, name=whole.name, sample_lengths_S=whole.sample_lengths_S))
    distances = [abs(2 * sum(lengths[:n]) - trace.num_tokens) for n in range(1, len(lengths))]
    assert len(first.sample_lengths_S) == distances.index(min(distances)) + 1
    assert (counts_LE(first) + counts_LE(second) == counts_LE(trace)).all()


def test_halves_of_known_lengths() -> None:
    assert [len(half.sample_lengths_S) for half in halves(small(8, lengths=[1, 2, 2, 3]))] == [2, 2]  # 3 and 5 are as near
    assert [half.num_tokens for half in halves(small(9, lengths=[7, 1, 1]))] == [7, 2]


def test_traces_alternate_until_each_has_come_to_its_end() -> None:
    a, b = small(5), small(3)
    sizes = [(len(batch), int(batch[0, 0, 0])) for batch in alternate([a, b], 2)]
    assert sizes == [(2, 0), (2, 0), (2, 2), (1, 2), (1, 0)]
    assert [len(batch) for batch in alternate([a, b], 2, drop_last=True)] == [2, 2, 2]
    with pytest.raises(ValueError, match="traces t and u are not of one shape of model: 4 and 8 experts"):
        list(alternate([a, small(num_experts=8, name="u")], 2))
    with pytest.raises(ValueError, match="no trace"):
        joined([])
    with pytest.raises(ValueError, match="at least 1"):
        list(batches(a, 0))


def test_weights_are_joined_only_where_all_have_them() -> None:
    a = small()
    weighted = traced(a.expert_ids_TLK, 4, weights_TLK=np.ones(a.expert_ids_TLK.shape, np.float16))
    assert joined([a, weighted]).weights_TLK is None
    both = joined([weighted, weighted]).weights_TLK
    assert both is not None and both.shape == (12, 3, 2)


# other routing


@given(traces())
def test_counts_are_what_a_loop_counts(trace: RoutingTrace) -> None:
    expected = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    for token in trace.expert_ids_TLK:
        for layer, chosen in enumerate(token):
            for expert in chosen:
                expected[layer, expert] += 1
    assert np.array_equal(counts_LE(trace), expected)
    assert sum(counts_of(batch, trace.num_experts) for batch in batches(trace, 3)).tolist() == expected.tolist()  # type: ignore


def test_the_best_choice_comes_first_where_there_are_weights() -> None:
    ids = np.array([[[3, 1, 2]], [[0, 1, 2]]], np.uint8)
    weights = np.array([[[0.2, 0.5, 0.3]], [[0.4, 0.4, 0.2]]], np.float16)
    trace = best_first(traced(ids, 4, weights_TLK=weights))
    assert trace.expert_ids_TLK[:, 0].tolist() == [[1, 2, 3], [0, 1, 2]]  # of equal ones the earlier
    one = top1(trace)
    assert one.expert_ids_TLK.tolist() == [[[1]], [[0]]] and one.weights_TLK is not None and one.weights_TLK.shape == (2, 1, 1)
    bare = traced(ids, 4)
    assert best_first(bare) is bare and top1(bare).expert_ids_TLK.ravel().tolist() == [3, 0]


def test_merged_experts_add_up() -> None:
    trace = small(top_k=1)
    merged = merged_experts(trace, 2)
    assert np.array_equal(counts_LE(merged), counts_LE(trace).reshape(3, 2, 2).sum(2))
    with pytest.raises(ValueError, match="take a divisor"):
        merged_experts(trace, 3)
    with pytest.raises(ValueError, match="needs top1 first"):
        merged_experts(small(top_k=2), 2)


@given(traces(), st.floats(0, 1), st.integers(0, 2**20))
def test_rerouted_choices_stay_distinct_and_as_many(trace: RoutingTrace, probability: float, seed: int) -> None:
    rerouted = rerouted_evenly(trace, probability, seed)  # the trace itself checks that choices are distinct and in range
    assert (counts_LE(rerouted).sum(1) == counts_LE(trace).sum(1)).all()
    assert np.array_equal(rerouted.expert_ids_TLK, rerouted_evenly(trace, probability, seed).expert_ids_TLK)
    assert np.array_equal(rerouted_evenly(trace, 0.0, seed).expert_ids_TLK, trace.expert_ids_TLK)


@pytest.mark.parametrize("top_k", [1, 3])
def test_rerouted_choices_are_uniform_and_as_many_as_said(top_k: int) -> None:
    ids = np.broadcast_to(np.arange(top_k, dtype=np.uint8), (20_000, 1, top_k)).copy()
    trace = traced(ids, 8)
    even = counts_LE(rerouted_evenly(trace, 1.0, 1))[0] / 20_000
    if top_k == 1:
        assert np.abs(even - 1 / 8).max() < 0.01
    else:  # the first is drawn from all but the other two, and so on
        assert np.abs(even[3:] - even[3:].mean()).max() < 0.015 and even[3:].min() > 0.3
    half = (rerouted_evenly(trace, 0.5, 1).expert_ids_TLK == trace.expert_ids_TLK)[..., 0].mean()
    assert abs(half - (0.5 + 0.5 / (9 - top_k))) < 0.02
    with pytest.raises(ValueError, match="between 0 and 1"):
        rerouted_evenly(trace, 1.5, 1)


def test_the_probability_for_a_skew_is_the_closed_forms() -> None:
    """Of tokens that go to four experts as 8 : 4 : 2 : 1 the ratio at p is (8 (1 - p) / 15 + p / 4) / ((1 - p) / 15 + p / 4)."""
    ids = np.repeat(np.arange(4, dtype=np.uint8), [128_000, 64_000, 32_000, 16_000])[:, None, None]
    trace = traced(ids, 4)
    assert skew(trace) == 8
    probability = probability_for_skew(trace, 4.02, seed=3)
    # solve for p: 8a + b = 4.02 (a + b) with a = (1 - p) / 15, b = p / 4
    ratio = 4.02
    expected = (8 - ratio) / 15 / ((8 - ratio) / 15 + (ratio - 1) / 4)
    assert abs(probability - expected) < 0.01
    assert abs(skew(rerouted_evenly(trace, probability, 3)) - ratio) < 0.01
    with pytest.raises(ValueError, match="8 times .*: 9.0 is not between"):
        probability_for_skew(trace, 9.0)
    with pytest.raises(ValueError, match="not between"):
        probability_for_skew(trace, 1.0)


def test_skew_of_an_expert_that_nobody_chose_is_infinite() -> None:
    assert skew(traced(np.zeros((3, 1, 1), np.uint8), 2)) == float("inf")
    assert skew(traced(np.array([[[0], [0]], [[1], [0]]], np.uint8), 2)) == 1.0  # of 1 and inf the lower


# real traces


@pytest.mark.parametrize("task", ["summary", "translation"])
def test_the_real_traces_read_as_they_are(task: str) -> None:
    path = TRACES / f"esft_dsv2lite_{task}.npz"
    if not path.is_file():
        pytest.skip(f"no real trace: {path.name} is not in ../shared/data/traces")
    trace = read_trace(path)
    assert (trace.num_layers, trace.top_k, trace.num_experts) == (26, 6, 64) and trace.layers == tuple(range(1, 27))
    assert trace.num_tokens > 8000 and trace.name == path.stem
    assert (counts_LE(trace).sum(1) == trace.num_tokens * 6).all()
    lina = merged_experts(top1(best_first(trace)), 16)
    assert abs(skew(rerouted_evenly(lina, probability_for_skew(lina, 5.56), 0)) - 5.56) < 0.05
