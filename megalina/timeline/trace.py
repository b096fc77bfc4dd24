"""The trace: steps of all ranks as one file for https://ui.perfetto.dev or chrome://tracing.

A process a rank, with lanes for what it computed, what it had on the wire by class, and where its program stood; of a pipeline
with the cells of its list, each from its first computation to its last.  An arrow goes from each all-to-all to the computation
that it held up.  A click on what was on the wire shows its group, its bytes, how long it was held back, its slowdown, and what
shared the wire with it.
"""

import gzip
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalina.timeline.contention import CALIBRATED_AXIS, Alone, class_of, group_slowdowns
from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event
from megalina.timeline.spans import Span, overlaps, rows
from megalina.whole_file import write_whole

FILE = "trace.json.gz"  # in a run folder
LANES = ("step", "cells", "compute", "tokens", "messages", "counts and sums", "gradients", "parameters", "waits")
LANE_OF = {"a2a": "tokens", "pp": "messages", "grads": "gradients", "params": "parameters", "other": "counts and sums"}
ROWS = 100  # a lane has at most so many rows
MOST_BESIDE = 4  # of what shared the wire with a transfer, the longest
COMMON = "U:measured>.-.0"  # the sum over the world that closes a step: it ends on all ranks at once, almost
ESTIMATED = "estimated: clocks of other machines are set by the end of the sum that closes each step"


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One step of all ranks."""

    by_rank: Sequence[Sequence[Event]]  # as a recorder gives them
    groups: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)  # ranks that talk along each axis: mesh.rows
    alone: Mapping[str, Alone] = field(default_factory=dict)  # by op, for slowdowns; empty: they aren't shown
    places: Sequence[str] = ()  # of each rank in a pipeline, "pipeline rank 1, stage 1"; (): there is none
    cells: Sequence[Mapping[str, str]] = ()  # of each rank: the cell that an instruction is in, `2F0`, by tag

    def slowdowns(self) -> list[dict[str, float]]:
        """Of each rank, by tag: of each of its groups the smallest over the group's ranks."""
        out: list[dict[str, float]] = [{} for _ in self.by_rank]
        for op, axis in CALIBRATED_AXIS.items():
            for ranks in self.groups.get(axis, ()):
                of_op = [[e for e in self.by_rank[rank] if e.op == op] for rank in ranks]
                found = group_slowdowns(of_op, self.alone)
                for rank in ranks:
                    out[rank] |= found
        return out

    def group_of(self, rank: int) -> dict[str, Sequence[int]]:
        """The ranks that a rank talks to, itself among them, by axis."""
        return {axis: ranks for axis, table in self.groups.items() for ranks in table if rank in ranks}


def write_trace(
    path: Path, steps: Mapping[int, TracedStep], offsets_s: Sequence[float] = (), note: str = "", name: str = "rank"
) -> None:
    """`steps`: by number; gzip if the name ends in .gz.

    `offsets_s`: what is added to each rank's times, as from `aligned`; nothing where all ranks are on one machine.  `note`
    stands beside each rank's name, such as that times are emulated; `name`: what a process is, with its number."""
    ranks = max(len(step.by_rank) for step in steps.values())
    offsets_s = offsets_s or [0.0] * ranks
    every = [(rank, e) for step in steps.values() for rank, events in enumerate(step.by_rank) for e in events]
    zero_s = min((e.start_s + offsets_s[rank] for rank, e in every), default=0.0)
    lines: list[dict[str, Any]] = []
    slowdowns = {number: step.slowdowns() for number, step in steps.items()}
    for rank in range(ranks):
        events = {number: step.by_rank[rank] for number, step in steps.items()}
        details = {n: _details(events[n], step.group_of(rank), slowdowns[n][rank]) for n, step in steps.items()}
        cells = {n: cell_spans(events[n], step.cells[rank]) for n, step in steps.items() if step.cells}
        place = next((step.places[rank] for step in steps.values() if step.places), "")
        lines += _process(rank, events, details, cells, offsets_s[rank] - zero_s, ", ".join(filter(None, (place, note))), name)
    clock = ESTIMATED if any(offsets_s) else "one machine's"
    content = {"traceEvents": lines, "displayTimeUnit": "ms", "otherData": {"clock": clock}}
    data = json.dumps(content, separators=(",", ":")).encode()
    write_whole(path, gzip.compress(data) if path.suffix == ".gz" else data)


def aligned(by_rank: Sequence[Sequence[Event]], machines: Sequence[str]) -> list[float]:
    """An estimate of what to add to each rank's times to have them on rank 0's clock.

    Machines count from moments of their own.  The sum over all ranks that closes a step ends on all at about the same time;
    a machine's offset is the median over its ranks of the difference, so it is wrong by what the ends differ (about the
    latency of the network).  `machines`: the name of each rank's; ranks on rank 0's need none."""
    ends = [next((e.end_s for e in events if e.tag == COMMON and e.kind == SEND), None) for events in by_rank]
    differences: dict[str, list[float]] = {}
    for machine, end_s in zip(machines, ends, strict=True):
        if ends[0] is not None and end_s is not None:
            differences.setdefault(machine, []).append(ends[0] - end_s)
    known = {name: statistics.median(values) for name, values in differences.items() if name != machines[0]}
    return [known.get(machine, 0.0) for machine in machines]


def cell_spans(events: Sequence[Event], cell_of: Mapping[str, str]) -> dict[str, Span]:
    """From the first computation of each cell to its last, in the order in which they begin; `cell_of`: by tag.

    Cells that go together take turns, so their spans overlap."""
    out: dict[str, Span] = {}
    for e in sorted((e for e in events if e.kind == COMPUTE and e.tag in cell_of), key=lambda e: e.start_s):
        start_s, end_s = out.get(cell_of[e.tag], (e.start_s, e.end_s))
        out[cell_of[e.tag]] = start_s, max(end_s, e.end_s)
    return out


def _process(
    rank: int,
    steps: Mapping[int, Sequence[Event]],
    details: Mapping[int, Sequence[dict[str, Any]]],
    cells: Mapping[int, Mapping[str, Span]],
    shift_s: float,
    note: str,
    name: str,
) -> list[dict[str, Any]]:
    """All lines of one rank.  `details`: by step, of each event; `cells`: by step."""
    spans: dict[str, list[tuple[Span, dict[str, Any]]]] = {lane: [] for lane in LANES}
    placed: dict[tuple[int, int], tuple[str, int]] = {}  # step, place of the event -> lane, place there
    for step, events in steps.items():
        if events:
            whole = min(e.start_s for e in events), max(e.end_s for e in events)
            spans["step"].append((whole, {"name": f"step {step}"}))
        spans["cells"] += [(span, {"name": cell}) for cell, span in cells.get(step, {}).items()]
        for i, e in enumerate(events):
            lane = {COMPUTE: "compute", WAIT: "waits"}.get(e.kind) or LANE_OF[class_of(e)]
            placed[step, i] = lane, len(spans[lane])
            spans[lane].append(((e.start_s, e.end_s), {"name": e.tag, "args": details[step][i]}))
    lines = [
        {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"{name} {rank}" + (f" ({note})" if note else "")}},
        {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}},
    ]
    threads: dict[str, list[int]] = {}
    for number, lane in enumerate(LANES):
        threads[lane] = [number * ROWS + row for row in rows([span for span, _ in spans[lane]])]
        for thread in sorted(set(threads[lane])):
            of_lane = lane if thread % ROWS == 0 else f"{lane} {thread % ROWS + 1}"
            lines.append({"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": of_lane}})
            lines.append({"ph": "M", "pid": rank, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}})
        for ((start_s, end_s), line), thread in zip(spans[lane], threads[lane], strict=True):
            at = {"pid": rank, "tid": thread, "ts": _us(start_s + shift_s), "dur": _us(end_s - start_s)}
            lines.append({"ph": "X", "cat": lane} | line | at)
    for step, events in steps.items():
        for sent, blocked in arrows(events):
            ends = []
            for i in (sent, blocked):
                lane, place = placed[step, i]
                ends.append(threads[lane][place])
            source, target = events[sent], events[blocked]
            arrow = {"cat": "blocks", "name": "blocks", "pid": rank, "id": f"{rank}/{step}/{source.tag}"}
            inside_s = min(1e-7, (source.end_s - source.start_s) / 2)  # an arrow belongs to the box that it begins in
            lines.append({"ph": "s"} | arrow | {"tid": ends[0], "ts": _us(source.end_s - inside_s + shift_s)})
            lines.append({"ph": "f", "bp": "e"} | arrow | {"tid": ends[1], "ts": _us(target.start_s + shift_s)})
    return lines


def arrows(events: Sequence[Event]) -> list[tuple[int, int]]:
    """(all-to-all, what it held up) as places in `events`, which hold computation and waits in the program's order.

    Held up was the first computation after the wait that is of the same layer and part (a chunk's, or the whole part's), or
    any if there is none."""
    waits = {e.tag: i for i, e in enumerate(events) if e.kind == WAIT}
    out = []
    for i, e in enumerate(events):
        if e.kind != SEND or e.op != "tokens" or (wait := waits.get(e.tag.replace(">", "<", 1))) is None:
            continue
        parts = e.part, e.part.partition("c")[0]
        later = [j for j in range(wait + 1, len(events)) if events[j].kind == COMPUTE]
        own = (j for j in later if (events[j].phase, events[j].layer) == (e.phase, e.layer) and events[j].part in parts)
        if (blocked := next(own, later[0] if later else None)) is not None:
            out.append((i, blocked))
    return out


def _details(
    events: Sequence[Event], groups: Mapping[str, Sequence[int]], slowdowns: Mapping[str, float]
) -> list[dict[str, Any]]:
    """What a click on each box shows."""
    sends = [i for i, e in enumerate(events) if e.kind == SEND]
    beside: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
    for a, b, seconds in overlaps([(events[i].start_s, events[i].end_s) for i in sends]):
        beside[sends[a]].append((seconds, sends[b]))
        beside[sends[b]].append((seconds, sends[a]))
    out = []
    for i, e in enumerate(events):
        details: dict[str, Any] = {} if e.kind == COMPUTE else {"op": e.op, "axis": e.axis}
        if e.kind != COMPUTE and e.axis in groups:
            details["group"] = " ".join(map(str, groups[e.axis]))
        if e.kind == WAIT:
            details["exposed_ms"] = round(e.exposed_s * 1e3, 4)
        if e.kind == SEND:
            details |= {"bytes": e.num_bytes, "held_ms": round((e.start_s - e.enqueued_s) * 1e3, 4)}
            if e.tag in slowdowns:
                details["slowdown"] = round(slowdowns[e.tag], 3)
            longest = sorted(beside[i], reverse=True)[:MOST_BESIDE]
            if longest:
                details["beside"] = ", ".join(f"{events[j].tag} {seconds * 1e3:.1f} ms" for seconds, j in longest)
        out.append(details)
    return out


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
