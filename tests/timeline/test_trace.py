"""The trace as Perfetto reads it: boxes of a lane's row don't overlap, arrows begin and end inside boxes."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalina.timeline.contention import Alone
from megalina.timeline.recorder import Event
from megalina.timeline.trace import COMMON, TracedStep, aligned, arrows, write_trace
from tests.timeline.made import compute, event, grads, tokens, wait


def layer(start_s: float = 0.0) -> list[Event]:
    """Forward of a layer and the end of the step: the shared experts compute under the dispatch."""
    events = [
        compute("route", 0.0, 1.0, layer=0),
        compute("shared", 1.0, 2.0, layer=0),
        wait("dispatch", 2.0, 3.0, 1.0, layer=0),
        tokens("dispatch", 1.0, 3.0, 4096, layer=0, enqueued_s=0.5),
        compute("attention", 3.0, 4.0, layer=7),  # of another part, say
        compute("experts", 4.0, 5.0, layer=0),
        tokens("combine", 5.0, 6.0, layer=0),
        wait("combine", 6.0, 6.0, 0.0, layer=0),
        compute("mix", 6.0, 7.0, layer=0),
        grads("dense.0", 5.0, 8.0),
        grads("copied.0", 5.5, 7.0, axis="world"),
        event("send", "measured", 8.0, 9.0, op="sum", axis="world", phase="U"),
    ]
    return [replace(e, **{t: getattr(e, t) + start_s for t in ("enqueued_s", "start_s", "end_s")}) for e in events]


def written(path: Path, steps: dict[int, Any], *arguments: Any) -> list[dict[str, Any]]:
    """`steps`: events by rank, or traced steps."""
    write_trace(path, {n: s if isinstance(s, TracedStep) else TracedStep(s) for n, s in steps.items()}, *arguments)
    data = path.read_bytes()
    found = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    lines: list[dict[str, Any]] = found["traceEvents"]
    return lines


def lane_names(lines: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    return {(x["pid"], x["tid"]): x["args"]["name"] for x in lines if x["name"] == "thread_name"}


def test_each_rank_is_a_process_with_its_lanes(tmp_path: Path) -> None:
    lines = written(tmp_path / "trace.json", {7: [layer(), layer(0.25)]})
    assert [x["args"]["name"] for x in lines if x["name"] == "process_name"] == ["rank 0", "rank 1"]
    names = lane_names(lines)
    expected = ["step", "compute", "tokens", "counts and sums", "gradients", "gradients 2", "waits"]
    assert [name for (pid, _), name in sorted(names.items()) if pid == 0] == expected
    boxes = {(x["pid"], names[x["pid"], x["tid"]], x["name"]): x for x in lines if x["ph"] == "X"}
    assert len(boxes) == 2 * (1 + 12)
    dispatch = boxes[0, "tokens", "F:dispatch>.0.0"]
    assert (dispatch["ts"], dispatch["dur"]) == (1e6, 2e6)
    assert dispatch["args"] == {"op": "tokens", "axis": "ep", "bytes": 4096, "held_ms": 500.0}
    assert boxes[1, "waits", "F:dispatch<.0.0"]["args"]["exposed_ms"] == 1000
    assert boxes[1, "step", "step 7"]["ts"] == 0.25e6
    assert {(boxes[0, lane, name]["dur"]) for lane, name in [("gradients", "B:dense.0>.-.0")]} == {3e6}


def test_a_click_on_a_transfer_shows_its_group_its_slowdown_and_what_was_beside_it(tmp_path: Path) -> None:
    late = [replace(e, start_s=e.start_s + 0.5) if e.name == "dispatch" else e for e in layer()]  # it waited for nobody
    groups = {"ep": [[0, 1], [2, 3]], "dp": [[0, 1, 2, 3]], "world": [[0, 1, 2, 3]]}
    alone = {"tokens": Alone(1.0, 0.0), "grads": Alone(2.0, 0.0)}
    step = TracedStep([layer(), late, layer(), layer()], groups, alone)
    lines = written(tmp_path / "trace.json", {1: step})
    args = {(x["pid"], x["name"]): x["args"] for x in lines if x["ph"] == "X" and x["cat"] != "step"}
    dispatch = [args[rank, "F:dispatch>.0.0"] for rank in range(4)]
    assert [a["group"] for a in dispatch] == ["0 1", "0 1", "2 3", "2 3"]
    assert [a["slowdown"] for a in dispatch] == [1.5, 1.5, 2, 2]
    assert "beside" not in dispatch[0]
    assert args[3, "B:dense.0>.-.0"]["slowdown"] == 1.5 and args[3, "B:dense.0>.-.0"]["group"] == "0 1 2 3"
    assert args[0, "B:dense.0>.-.0"]["beside"] == "B:copied.0>.-.0 1500.0 ms, F:combine>.0.0 1000.0 ms"
    assert args[0, "F:combine>.0.0"]["beside"] == "B:dense.0>.-.0 1000.0 ms, B:copied.0>.-.0 500.0 ms"
    assert "slowdown" not in args[0, "U:measured>.-.0"] and args[0, "U:measured>.-.0"]["group"] == "0 1 2 3"
    assert args[0, "F:dispatch<.0.0"]["group"] == "0 1" and args[0, "F:experts.0.0"] == {}


def test_boxes_of_a_row_never_overlap(tmp_path: Path) -> None:
    lines = written(tmp_path / "trace.json", {1: [layer()], 2: [layer(20.0)]})
    rows: dict[int, list[tuple[float, float]]] = {}
    for x in lines:
        if x["ph"] == "X":
            rows.setdefault(x["tid"], []).append((x["ts"], x["ts"] + x["dur"]))
    assert sum(map(len, rows.values())) == 2 * 13
    for spans in rows.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))


def test_arrows_go_from_an_all_to_all_to_what_it_held_up(tmp_path: Path) -> None:
    events = layer()
    tags = [(events[i].tag, events[j].tag) for i, j in arrows(events)]
    assert tags == [("F:dispatch>.0.0", "F:experts.0.0"), ("F:combine>.0.0", "F:mix.0.0")]
    lines = written(tmp_path / "trace.json", {1: [events], 2: [layer(20.0)]})
    starts = {x["id"]: x for x in lines if x["ph"] == "s"}
    ends = {x["id"]: x for x in lines if x["ph"] == "f"}
    assert len(starts) == 4 and starts.keys() == ends.keys()
    names = lane_names(lines)
    for arrow, lane in [(a, "tokens") for a in starts.values()] + [(a, "compute") for a in ends.values()]:
        assert names[0, arrow["tid"]] == lane
        inside = [x for x in lines if x["ph"] == "X" and x["tid"] == arrow["tid"] and x["ts"] <= arrow["ts"] < x["ts"] + x["dur"]]
        assert len(inside) == 1
    assert all(starts[i]["ts"] < ends[i]["ts"] for i in starts)


def test_a_chunks_arrow_ends_at_its_own_experts_or_where_chunks_join() -> None:
    events = [
        wait("dispatch", 0, 1, 1.0, layer=0, part="0c0"),
        wait("dispatch", 1, 2, 1.0, layer=0, part="0c1"),
        tokens("dispatch", 0, 1, layer=0, part="0c0"),
        tokens("dispatch", 1, 2, layer=0, part="0c1"),
        compute("experts", 2, 3, layer=0, part="0c0"),
        wait("combine", 3, 4, 1.0, layer=0, part="0c0"),
        tokens("combine", 3, 4, layer=0, part="0c0"),
        compute("experts", 4, 5, layer=0, part="0c1"),
        compute("join", 5, 6, layer=0, part="0"),
        compute("experts", 6, 7, layer=0, part="0c0", phase="B"),
    ]
    assert [(events[i].tag, events[j].tag) for i, j in arrows(events)] == [
        ("F:dispatch>.0.0c0", "F:experts.0.0c0"),
        ("F:dispatch>.0.0c1", "F:experts.0.0c1"),
        ("F:combine>.0.0c0", "F:join.0.0"),
    ]


def test_an_all_to_all_that_nobody_was_seen_to_wait_for_has_no_arrow() -> None:
    assert arrows([tokens("dispatch", 0, 1, layer=0), compute("experts", 1, 2, layer=0)]) == []


def test_a_name_that_ends_in_gz_is_compressed(tmp_path: Path) -> None:
    assert written(tmp_path / "trace.json.gz", {1: [layer()]})


def test_clocks_of_other_machines_are_set_by_the_end_of_the_common_sum(tmp_path: Path) -> None:
    by_rank = [layer(), layer(0.125), layer(500.0), layer(500.25)]  # two machines; on one of them nothing is changed
    assert any(e.tag == COMMON for e in by_rank[0])
    offsets_s = aligned(by_rank, ["a", "a", "b", "b"])
    assert offsets_s == [0.0, 0.0, -500.125, -500.125]
    lines = written(tmp_path / "trace.json", {3: by_rank}, offsets_s)
    starts = {x["pid"]: x["ts"] for x in lines if x["name"] == "step 3"}
    assert starts == {0: 0.125e6, 1: 0.25e6, 2: 0.0, 3: 0.25e6}
    assert "estimated" in json.loads((tmp_path / "trace.json").read_text())["otherData"]["clock"]


def test_without_the_common_sum_no_clock_is_changed() -> None:
    assert aligned([[compute("embed", 0, 1)], [compute("embed", 9, 10)]], ["a", "b"]) == [0.0, 0.0]


@pytest.mark.parametrize("suffix", [".json", ".gz"])
def test_a_file_that_is_there_is_replaced_as_a_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    path.write_text("old")
    assert written(path, {1: [layer()]})


def test_cells_of_a_pipeline_have_a_lane_and_ranks_say_where_they_are(tmp_path: Path) -> None:
    events = [
        compute("attention", 1.0, 2.0, layer=0),
        wait("stream", 2.0, 4.0, 2.0, op="recv", layer=1, part="1"),
        event("send", "stream", 0.5, 4.0, op="recv", axis="pp0-1", layer=1, part="1"),
        compute("head", 4.0, 5.0, part="1"),
        compute("experts", 4.5, 7.0, layer=0),
        compute("measure", 8.0, 9.0, phase="U"),
    ]
    cells = {"F:attention.0.0": "0F0", "F:experts.0.0": "0F0", "F:stream<.1.1": "1F1", "F:head.-.1": "1F1"}
    step = TracedStep([events], places=["pipeline rank 0: stages 0 and 1"], cells=[cells])
    lines = written(tmp_path / "trace.json", {1: step}, (), "emulated")
    assert lines[0]["args"]["name"] == "rank 0 (pipeline rank 0: stages 0 and 1, emulated)"
    names = lane_names(lines)
    found = {x["name"]: (names[0, x["tid"]], x["ts"], x["dur"]) for x in lines if x.get("cat") == "cells"}
    assert found == {"0F0": ("cells", 0.5e6, 6e6), "1F1": ("cells 2", 3.5e6, 1e6)}  # they took turns
    assert [names[0, x["tid"]] for x in lines if x.get("cat") == "messages"] == ["messages"]
