"""Trace import: routing that others have recorded, token by token or only counted.

`from_megatron_jsonl` reads what Megatron-Core writes with --moe-routing-trace-path (its core/transformer/moe/router_trace.py): a
file a rank, router_trace_rank<r>.jsonl, in which a line is one layer of one batch:

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 2, "topk": 2,
     "top_indices": [[12, 45], [7, 12]]}

`from_histograms` reads counts alone, of which four forms are known:

    CSV, a line an iteration and layer    columns iteration, layer, counts (a list in brackets, in quotes)
    CSV of HarMoEny, a file a layer       moe_layer-<l>.csv, columns iteration and "expert distribution"; give the folder
    JSON lines, or one JSON list          {"iteration": 0, "layer": 3, "counts": [17, 147, ...]}
    one JSON object of named histograms   {"olmoe/book": {"layers": [0, 7], "counts": [[...], [...]]}, ...}; a text or nothing as
                                          layers: they are numbered from 0

Traces that are arrays already (FLAME-MoE's, a table a layer whose rows i are one token in all of them) need no import: stack the
layers' ids as [T, L, K] and give them to `routing_trace.traced`.

Shapes: B batches or iterations, L layers, E experts.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalina.placement.routing_trace import Counts, RoutingTrace, traced


@dataclass(frozen=True, slots=True, eq=False)
class HistogramTrace:
    """Counts alone: for what needs no path of a token.  ValueError, in one line, where the parts don't fit."""

    counts_BLE: Counts
    batches: tuple[str, ...]  # the name or number of each
    layers: tuple[int, ...]  # of the model, rising
    name: str = ""

    def __post_init__(self) -> None:
        where, shape = f"histograms {self.name}", list(self.counts_BLE.shape)
        if self.counts_BLE.ndim != 3 or self.counts_BLE.dtype != np.int64 or self.counts_BLE.size == 0:
            raise ValueError(f"{where}: counts must be int64 [B, L, E], each at least 1, not {self.counts_BLE.dtype} {shape}")
        rising = list(self.layers) == sorted(set(self.layers)) and min(self.layers, default=0) >= 0
        if shape[:2] != [len(self.batches), len(self.layers)] or not rising:
            raise ValueError(f"{where}: counts are {shape}, but of {len(self.batches)} batches, layers {list(self.layers)}")
        if int(self.counts_BLE.min()) < 0 or not self.counts_BLE.any(axis=2).all():
            raise ValueError(f"{where}: counts must be at least 0, and not all 0 in a layer of a batch")


def from_megatron_jsonl(path: Path, *, num_experts: int | None = None) -> RoutingTrace:
    """One rank's trace.  Records that have the step in common are one batch; where a step has several batches (micro-batches),
    their n-th records in each layer belong together.  Each batch is a sample, since where sequences end isn't recorded.

    Records of other blocks than the decoder (multi-token prediction) are passed over: they route no token that comes out.
    Megatron writes choices by rising id where its router gives a mask, and no weights: then the first choice is not the best one,
    so that paths of first choices say less.  `num_experts`: the file doesn't say; without it, as in `traced`.
    ValueError, naming the file and the line, for what isn't such a trace, or has a batch in which a layer is missing."""
    batches: dict[tuple[int, int], dict[int, np.ndarray[Any, Any]]] = {}  # (step, which of it) -> layer -> [T, K]
    seen: dict[tuple[int, int], int] = {}  # (step, layer) -> records
    for number, record in _json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(record, dict) or "top_indices" not in record:
            raise ValueError(f"{where} is no record of Megatron's router trace: it has no top_indices")
        if record.get("block", "decoder") != "decoder" or record["top_indices"] == []:  # another block, or no token
            continue
        step, layer = (_whole(where, key, record.get(key)) for key in ("step", "layer"))
        ids_TK = _integers(where, "top_indices", record["top_indices"], ndim=2)
        for key, size in (("num_tokens", ids_TK.shape[0]), ("topk", ids_TK.shape[1])):
            if record.get(key, size) != size:
                raise ValueError(f"{where}: {key} is {record[key]}, but top_indices is {list(ids_TK.shape)}")
        nth = seen[step, layer] = seen.get((step, layer), -1) + 1
        batches.setdefault((step, nth), {})[layer] = ids_TK
    layers = sorted({layer for batch in batches.values() for layer in batch})
    if not layers:
        raise ValueError(f"{path} holds no record of a decoder's layer")
    stacked: list[np.ndarray[Any, Any]] = []
    for (step, nth), batch in sorted(batches.items()):
        if missing := [layer for layer in layers if layer not in batch]:
            raise ValueError(f"{path}: batch {nth} of step {step} has no layers {missing}: cut off, or layers of several ranks")
        if len(shapes := sorted({ids_TK.shape for ids_TK in batch.values()})) > 1:
            raise ValueError(f"{path}: batch {nth} of step {step} has layers of unequal shapes {shapes}")
        if stacked and shapes[0][1] != stacked[0].shape[2]:
            raise ValueError(f"{path}: batch {nth} of step {step} is top-{shapes[0][1]}, those before top-{stacked[0].shape[2]}")
        stacked.append(np.stack([batch[layer] for layer in layers], axis=1))
    lengths_S = np.array([len(batch_TLK) for batch_TLK in stacked], np.int64)
    try:
        ids_TLK = np.concatenate(stacked)
        return traced(ids_TLK, num_experts, sample_lengths_S=lengths_S, layers=layers, name=path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_histograms(path: Path, *, only: str = "") -> HistogramTrace:
    """Counts of each batch and layer, from a file of one of the forms above, or the folder of moe_layer-<l>.csv.

    `only`: of named histograms those whose name begins so; they must be of one model.
    ValueError, naming the file, for what isn't such a file, or has a batch in which a layer is missing or is there twice."""
    found: dict[str, dict[int, np.ndarray[Any, Any]]] = {}  # batch -> layer -> [E]
    for where, batch, layer, listed in _histograms(path, only):
        if layer in (of_batch := found.setdefault(batch, {})):
            raise ValueError(f"{where}: batch {batch}, layer {layer} is there twice")
        of_batch[layer] = _integers(where, "counts", listed, ndim=1)
    if not found:
        raise ValueError(f"{path} holds no histogram" + (f" whose name begins with {only}" if only else ""))
    layers = sorted({layer for of_batch in found.values() for layer in of_batch})
    first = next(iter(found))
    for batch, of_batch in found.items():
        if missing := [layer for layer in layers if layer not in of_batch]:
            raise ValueError(f"{path}: batch {batch} has no layers {missing}")
        if len(sizes := sorted({len(counts_E) for b in (first, batch) for counts_E in found[b].values()})) > 1:
            raise ValueError(f"{path}: batches {first} and {batch} have layers of {sizes} experts: they must be of one model")
    counts_BLE = np.array([[of_batch[layer] for layer in layers] for of_batch in found.values()], np.int64)
    try:
        return HistogramTrace(counts_BLE, tuple(found), tuple(layers), path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _histograms(path: Path, only: str) -> Iterator[tuple[str, str, int, Any]]:
    """Where it is said, batch, layer, and the listed counts."""
    if path.is_dir():
        files = [(match, file) for file in path.iterdir() if (match := re.fullmatch(r"moe_layer-(\d+)\.csv", file.name))]
        for match, file in sorted(files, key=lambda found: int(found[0][1])):
            yield from _csv_histograms(file, int(match[1]))
    elif path.suffix == ".csv":
        match = re.fullmatch(r"moe_layer-(\d+)\.csv", path.name)
        yield from _csv_histograms(path, int(match[1]) if match else None)
    else:
        yield from _json_histograms(path, only)


def _csv_histograms(path: Path, layer: int | None) -> Iterator[tuple[str, str, int, Any]]:
    """`layer`: of the whole file, where its name says it."""
    column = "counts" if layer is None else "expert distribution"
    with path.open(newline="", encoding="utf-8") as file:
        try:
            lines = csv.DictReader(file, strict=True)
            for line in lines:
                where = f"{path}, line {lines.line_num}"
                if missing := {"iteration", column, *(["layer"] if layer is None else [])} - {k for k, v in line.items() if v}:
                    raise ValueError(f"{where} has nothing in column {', '.join(sorted(missing))}")
                listed = json.loads(line[column])
                yield where, line["iteration"], int(line["layer"]) if layer is None else layer, listed
        except (ValueError, RecursionError, csv.Error) as error:
            raise ValueError(_named(path, error)) from error


def _json_histograms(path: Path, only: str) -> Iterator[tuple[str, str, int, Any]]:
    records: Any = None
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        records = [record for _, record in _json_lines(path)]  # one a line, or it says which line is none
    if isinstance(records, dict) and "counts" not in records:
        for name, histogram in records.items():
            if not name.startswith(only):
                continue
            layers, counts = (histogram.get(key) if isinstance(histogram, dict) else None for key in ("layers", "counts"))
            if isinstance(counts, list) and (layers is None or isinstance(layers, str)):  # a remark that they aren't known
                layers = list(range(len(counts)))
            if not isinstance(layers, list) or not isinstance(counts, list) or len(layers) != len(counts):
                raise ValueError(f"{path}: {name} has no lists layers and counts of one length")
            for layer, listed in zip(layers, counts, strict=True):
                yield f"{path}: {name}", name, _whole(f"{path}: {name}", "layers", layer), listed
        return
    for number, record in enumerate([records] if isinstance(records, dict) else records if isinstance(records, list) else []):
        where = f"{path}, record {number}"
        if not isinstance(record, dict) or not {"iteration", "layer", "counts"} <= set(record):
            raise ValueError(f"{where} is no object with iteration, layer and counts")
        iteration, layer = (_whole(where, key, record[key]) for key in ("iteration", "layer"))
        yield where, str(iteration), layer, record["counts"]


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and value of each line that isn't blank."""
    with path.open(encoding="utf-8") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(_named(path, error, f", line {max(1, number)}, is no JSON")) from error


def _named(path: Path, error: Exception, what: str = "") -> str:
    said = str(error).splitlines()[0]
    return said if said.startswith(str(path)) else f"{path}{what}: {said}"


def _whole(where: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{where}: {key} must be a number from 0 on, not {str(value)[:40]}")
    return value


def _integers(where: str, key: str, value: Any, *, ndim: int) -> np.ndarray[Any, Any]:
    """int64, of that many dimensions."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {key} is no rectangle of numbers") from error
    if array.ndim != ndim or array.size == 0 or array.dtype.kind not in "iu" or (array.dtype == np.uint64):
        raise ValueError(f"{where}: {key} must be integers in {ndim} dimensions, not {array.dtype} {list(array.shape)}")
    return array.astype(np.int64)
