"""Trace import: what others have recorded comes in as they mean it, or the file and the line are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.placement.routing_trace import counts_LE
from placement_lab.trace_import import HistogramTrace, from_histograms, from_megatron_jsonl
from tests.fuzz.bounded import spoiled

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"


def record(step: int, layer: Any, ids: Any, **other: Any) -> dict[str, Any]:
    shape = {"num_tokens": len(ids), "topk": len(ids[0])}
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": 0,
        **shape,
        "top_indices": ids,
    } | other


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


GOOD = [record(0, 1, [[0, 2], [1, 3]]), record(0, 3, [[4, 2], [1, 0]]), record(1, 1, [[2, 5]]), record(1, 3, [[0, 1]])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("import")


# megatron


def test_steps_are_stacked_in_order_layer_by_layer(tmp_path: Path) -> None:
    mtp = record(0, 1, [[7, 6], [5, 4]], block="mtp", mtp_idx=0)
    trace = from_megatron_jsonl(lines(tmp_path / "r.jsonl", mtp, *GOOD, "\n"))
    assert trace.expert_ids_TLK.tolist() == [[[0, 2], [4, 2]], [[1, 3], [1, 0]], [[2, 5], [0, 1]]]
    assert (trace.layers, trace.num_experts, trace.name) == ((1, 3), 8, "r") and trace.sample_lengths_S.tolist() == [2, 1]
    assert from_megatron_jsonl(tmp_path / "r.jsonl", num_experts=6).num_experts == 6


def test_micro_batches_of_a_step_belong_together_by_their_order(tmp_path: Path) -> None:
    step = [record(0, 0, [[0]]), record(0, 1, [[1]]), record(0, 0, [[2], [3]]), record(0, 1, [[0], [1]])]
    trace = from_megatron_jsonl(lines(tmp_path / "m.jsonl", *step))
    assert trace.expert_ids_TLK[..., 0].tolist() == [[0, 1], [2, 0], [3, 1]] and trace.sample_lengths_S.tolist() == [1, 2]
    turned = from_megatron_jsonl(lines(tmp_path / "n.jsonl", *(step[i] for i in (0, 2, 1, 3))))  # all of a layer at once
    assert np.array_equal(turned.expert_ids_TLK, trace.expert_ids_TLK)


def test_a_batch_without_a_token_is_passed_over(tmp_path: Path) -> None:
    empty = [record(2, layer, [[0, 1]]) | {"top_indices": [], "num_tokens": 0} for layer in (1, 3)]
    assert from_megatron_jsonl(lines(tmp_path / "e.jsonl", *GOOD, *empty)).num_tokens == 3


WRONG: list[tuple[list[Any], str]] = [
    ([], "holds no record"),
    (['{"step": 0, "la'], "line 1, is no JSON"),
    ([GOOD[0], "[1, 2]\n"], "line 2 is no record of Megatron's"),
    ([{"iteration": 0, "layer": 0, "counts": [1, 2]}], "it has no top_indices"),
    ([record(-1, 0, [[0]])], "line 1: step must be a number from 0 on, not -1"),
    ([record(0, "x", [[0]])], "layer must be a number from 0 on, not x"),
    ([record(0, 0, [[0, 1], [2]])], "top_indices is no rectangle"),
    ([record(0, 0, [[0.5]])], "must be integers in 2 dimensions, not float64"),
    ([record(0, 0, [[0, 1]], topk=3)], r"topk is 3, but top_indices is \[1, 2\]"),
    ([record(0, 0, [[0, 1]], num_tokens=3)], "num_tokens is 3"),
    ([*GOOD[:3]], r"batch 0 of step 1 has no layers \[3\]"),
    ([GOOD[0], record(0, 3, [[0, 1]])], "unequal shapes"),
    ([record(0, 0, [[0]]), record(1, 0, [[0, 1]])], "step 1 is top-2, those before top-1"),
    ([record(0, 0, [[-1, 1]])], "go from -1 to 1"),
    ([record(0, 0, [[1, 1]])], "chose an expert twice"),
    ([record(0, 0, [[2**70]])], "must be integers in 2 dimensions, not object"),
]


@pytest.mark.parametrize(("records", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_trace_is_named(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        from_megatron_jsonl(lines(tmp_path / "w.jsonl", *records))
    assert str(tmp_path / "w.jsonl") in str(raised.value) and "\n" not in str(raised.value)


# histograms


def test_all_forms_say_the_same(tmp_path: Path) -> None:
    counts = np.arange(1, 13).reshape(2, 2, 3)
    records = [{"iteration": b, "layer": 3 * n, "counts": counts[b, n].tolist()} for b in range(2) for n in range(2)]
    table = "iteration,layer,counts\n" + "".join(f'{r["iteration"]},{r["layer"]},"{r["counts"]}"\n' for r in records)
    (tmp_path / "a.csv").write_text(table)
    (tmp_path / "b.json").write_text(json.dumps(records))
    lines(tmp_path / "c.jsonl", *records)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "e2e.csv").write_text("iteration,latency (ms)\n0,1.5\n")  # no layer's
    for n in range(2):
        rows = "".join(f'{b},1.5,"{counts[b, n].tolist()}"\n' for b in range(2))
        (tmp_path / "f" / f"moe_layer-{3 * n}.csv").write_text(f"iteration,latency (ms),expert distribution\n{rows}")
    for name in ("a.csv", "b.json", "c.jsonl", "f"):
        found = from_histograms(tmp_path / name)
        assert found.counts_BLE.tolist() == counts.tolist() and found.layers == (0, 3) and found.batches == ("0", "1")
    assert from_histograms(tmp_path / "f" / "moe_layer-3.csv").counts_BLE.tolist() == counts[:, 1:].tolist()


def test_one_record_alone_is_one_batch(tmp_path: Path) -> None:
    found = from_histograms(lines(tmp_path / "one.json", {"iteration": 7, "layer": 2, "counts": [1, 0]}))
    assert found.counts_BLE.tolist() == [[[1, 0]]] and (found.batches, found.layers) == (("7",), (2,))


def test_named_histograms_are_taken_by_the_beginning_of_their_names(tmp_path: Path) -> None:
    named = {"a/x": {"layers": [1], "counts": [[1, 2]]}, "b/x": {"layers": [0], "counts": [[3]]}}
    named["a/y"] = {"layers": [1], "counts": [[0, 4]]}
    found = from_histograms(lines(tmp_path / "n.json", named), only="a/")
    assert found.batches == ("a/x", "a/y") and found.counts_BLE.tolist() == [[[1, 2]], [[0, 4]]]
    with pytest.raises(ValueError, match="n.json holds no histogram whose name begins with c"):
        from_histograms(tmp_path / "n.json", only="c")
    with pytest.raises(ValueError, match="batch a/x has no layers"):
        from_histograms(tmp_path / "n.json")
    for layers in ({}, {"layers": "unknown"}):
        lines(tmp_path / "u.json", {"a": {"counts": [[1], [2]]} | layers})
        assert from_histograms(tmp_path / "u.json").layers == (0, 1)


def one(**changed: Any) -> dict[str, Any]:
    return {"iteration": 0, "layer": 0, "counts": [1, 2]} | changed


WRONG_HISTOGRAMS: list[tuple[str, list[Any], str]] = [
    ("w.json", ["[]"], "holds no histogram"),
    ("w.json", ["3"], "holds no histogram"),
    ("w.json", [one(), "{oops\n"], "line 2, is no JSON"),
    ("w.json", [one(), {"layer": 0}], "record 1 is no object with iteration, layer and counts"),
    ("w.json", [{"a": 3}], "a has no lists layers and counts"),
    ("w.json", [one(layer=-1)], "layer must be a number from 0 on"),
    ("w.json", [one(), one()], "batch 0, layer 0 is there twice"),
    ("w.json", [one(), one(layer=1, counts=[1])], r"have layers of \[1, 2\] experts"),
    ("w.json", [one(), one(layer=1), one(iteration=1)], r"batch 1 has no layers \[1\]"),
    ("w.json", [one(counts=[1, -2])], "at least 0"),
    ("w.json", [one(counts=[0, 0])], "not all 0"),
    ("w.json", [one(counts=[0.5, 1])], "must be integers in 1 dimensions"),
    ("w.json", [one(counts=[])], "must be integers"),
    ("w.json", [one(counts="ab")], "must be integers"),
    ("w.csv", [""], "holds no histogram"),
    ("w.csv", ["iteration,layer\n0,1\n"], "line 2 has nothing in column counts"),
    ("w.csv", ['iteration,layer,counts\n0,,"[1]"\n'], "nothing in column layer"),
    ("w.csv", ['iteration,layer,counts\n0,x,"[1]"\n'], "invalid literal"),
    ("w.csv", ['iteration,layer,counts\n0,-1,"[1]"\n'], r"layers \[-1\]"),
    ("w.csv", ['iteration,layer,counts\n0,1,"[1\n'], "w.csv"),
    ("moe_layer-2.csv", ["iteration,counts\n0,1\n"], "nothing in column expert distribution"),
]


@pytest.mark.parametrize(("name", "records", "message"), WRONG_HISTOGRAMS)
def test_a_wrong_histogram_is_named(tmp_path: Path, name: str, records: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        from_histograms(lines(tmp_path / name, *records))
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_an_empty_folder_holds_no_histogram(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no histogram"):
        from_histograms(tmp_path)


def test_histograms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be int64"):
        HistogramTrace(np.ones((1, 1, 2)), ("0",), (0,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of 2 batches"):
        HistogramTrace(np.ones((1, 1, 2), np.int64), ("0", "1"), (0,))


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
@given(edits=EDITS, cut=st.one_of(st.just(0), st.integers(0, 10**6)))
def test_damaged_bytes_are_read_or_named(folder: Path, form: str, edits: list[tuple[int, int]], cut: int) -> None:
    table = 'iteration,layer,counts\n0,0,"[1, 2]"\n1,0,"[3, 4]"\n'
    texts = {"jsonl": "".join(json.dumps(r) + "\n" for r in GOOD), "json": json.dumps([one(), one(layer=1)]), "csv": table}
    read: Callable[[Path], Any] = from_megatron_jsonl if form == "jsonl" else from_histograms
    path = folder / f"damaged.{form}"
    path.write_bytes(spoiled(texts[form].encode(), edits, cut))
    try:
        read(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_the_real_counts_by_domain() -> None:
    path = TRACES / "olmoe_mixtral_expert_counts.json"
    if not path.is_file():
        pytest.skip(f"no real counts: {path.name} is not in ../shared/data/traces")
    found = from_histograms(path, only="olmoe/")
    assert found.counts_BLE.shape[2] == 64 and "olmoe/book" in found.batches
    assert from_histograms(path, only="mistral/").counts_BLE.shape[1:] == (3, 8)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_no_choice_is_lost(folder: Path, seed: int, sizes: list[int]) -> None:
    random = np.random.default_rng(seed)
    batches = [np.argsort(random.random((size, 3, 6)), axis=2)[..., :2] for size in sizes]
    records = [record(step, n, batch[:, n].tolist()) for step, batch in enumerate(batches) for n in range(3)]
    random.shuffle(records)
    trace = from_megatron_jsonl(lines(folder / "all.jsonl", *records), num_experts=6)
    assert np.array_equal(trace.expert_ids_TLK, np.concatenate(batches)) and trace.sample_lengths_S.tolist() == sizes
    assert (counts_LE(trace).sum(1) == 2 * sum(sizes)).all()
