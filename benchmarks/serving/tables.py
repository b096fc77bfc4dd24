"""Tables of a map, in Markdown: what replication brings, which mode brings it, and what stands in its way."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.serving.figure import Cell, columns_of, text_of
from benchmarks.serving.sweep import IDEAL, ORACLE, PAYS, STATIC, ModeTime, verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was found at a place of the map."""

    title: str  # of the model
    phase: str
    devices: int
    skew: float
    turns: bool  # two tasks take turns
    cluster: str
    slots: int  # of a device in a layer
    expert_s: float  # to fetch one
    plan_s: float
    times: Mapping[str, ModeTime]

    @property
    def row(self) -> str:
        return f"{self.title}, {self.phase}"

    @property
    def cell(self) -> Cell:
        return Cell(self.row, self.devices, self.skew, verdict(self.times))

    def gain(self, mode: str) -> float:
        """Times as fast as static."""
        return self.times[STATIC].seconds / self.times[mode].seconds

    def as_json(self) -> dict[str, Any]:
        found = verdict(self.times)
        return {**asdict(self), "verdict": asdict(found) | {"pays": found.pays}}


def map_table(title: str, cells: Sequence[Cell]) -> str:
    """The figure in text."""
    columns, rows = columns_of(cells), list(dict.fromkeys(cell.row for cell in cells))
    told = {(cell.row, cell.devices, cell.skew): text_of(cell.verdict) for cell in cells}
    head = [title, *(f"{n} devices, skew {s:g}" for n, s in columns)]
    return _table(head, [[row, *(told.get((row, n, s), "") for n, s in columns)] for row in rows])


def modes_table(title: str, points: Sequence[Point]) -> str:
    """At how many points each mode pays, and is the fastest or as good."""
    verdicts = [verdict(p.times) for p in points]
    paying = [v for v in verdicts if v.pays]
    wanted = sum(v.most >= PAYS for v in verdicts)
    told = f"{title}: something to gain at {wanted} of {len(points)} points, replication pays at {len(paying)}"
    rows = []
    for name in [n for n in (points[0].times if points else ()) if n not in (STATIC, IDEAL)]:
        gains = [p.gain(name) for p in points]
        as_good = "" if name == ORACLE else str(sum(name in v.as_good for v in paying))
        pays, slower = sum(g >= PAYS for g in gains), sum(g < 1 for g in gains)
        rows.append([name, str(pays), as_good, str(slower), f"{statistics.median(gains):.2f}"])
    return _table([told, "pays", "fastest or within 2%, where any pays", "slower than static", "its gain, median"], rows)


def swap_table(points: Sequence[Point]) -> str:
    """Whether experts can come behind a layer."""
    head = ["cluster", "served", "devices", "a layer at even load, ms", "an expert, ms", "hide behind a layer", "slots"]
    head += ["fetched by best, a device and layer", "gain: profile", "best", "ideal"]
    rows = []
    for p in points:
        layer_s = p.times[IDEAL].layer_s
        figures = [f"{layer_s * 1e3:.2f}", f"{p.expert_s * 1e3:.2f}", f"{layer_s / p.expert_s:.1f}", str(p.slots)]
        gains = [f"{p.gain(mode):.2f}" for mode in ("profile", "best", IDEAL)]
        rows.append([p.cluster, p.row, str(p.devices), *figures, f"{p.times['best'].fetched:.1f}", *gains])
    return _table(head, rows)


def plan_table(points: Sequence[Point], modes: Sequence[str] = ("lina", "best")) -> str:
    """What deciding may take: gains by the time of a plan."""
    plans = sorted({p.plan_s for p in points})
    found = {(p.cluster, p.row, p.plan_s): p for p in points}
    head = ["cluster", "served", *(f"{mode}, plan {s * 1e3:g} ms" for mode in modes for s in plans)]
    keys = list(dict.fromkeys((p.cluster, p.row) for p in points))
    rows = [[*key, *(f"{found[*key, s].gain(mode):.2f}" for mode in modes for s in plans)] for key in keys]
    return _table(head, rows)


def slots_table(points: Sequence[Point], modes: Sequence[str] = ("profile", "best", ORACLE)) -> str:
    """Gains by slots of a device."""
    head = ["cluster", "served", "slots", *modes, IDEAL]
    rows = [[p.cluster, p.row, str(p.slots), *(f"{p.gain(mode):.2f}" for mode in (*modes, IDEAL))] for p in points]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), ""])
