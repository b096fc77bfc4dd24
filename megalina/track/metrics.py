"""The metrics file: `metrics.jsonl`, one JSON object a step, the safe record of a run.

A line is handed to the operating system as soon as it is written, so a killed process loses at most the line it was writing.
Everything else that shows a run (report, comparison, a rebuilt W&B folder) is made from this file.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from megalina.whole_file import write_whole

Record = dict[str, Any]

PER_LAYER = ("load_max_over_mean", "load_entropy", "dropped_fraction", "dead_experts")  # lists, a number a MoE layer
MAX_LAYERS_AS_KEYS = 64
_NUMBERS = ("loss", "grad_norm", "val_loss", "lr", "tokens_per_s")  # or None; all that reads the file counts on it
_LAST_STEP = 2**63 - 1

logger = logging.getLogger(__name__)


def json_record(record: Mapping[str, Any]) -> Record:
    """The record as plain JSON values.

    A number that is not finite becomes None, at any depth: JSON has no NaN.  If the loss or the gradient norm is one, the step
    changed no weight, and the record says `"skipped": true`.  Tensors and arrays become lists.
    """
    plain = {key: _plain(value) for key, value in record.items()}
    if any(key in plain and plain[key] is None for key in ("loss", "grad_norm")):
        plain["skipped"] = True
    return plain


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def scalars(record: Mapping[str, Any], layer_numbers: Callable[[int], list[int]]) -> dict[str, float]:
    """The record without `step` as flat numbers, for trackers that know nothing else.

    A per-layer list becomes `layer_00/NAME` and so on, and `layers/NAME_mean` and `_max`; of a model with more than
    `MAX_LAYERS_AS_KEYS` MoE layers only these two, so that the number of keys is bounded.  None is left out.
    `layer_numbers(n)`: the model's numbers of its n MoE layers.
    """
    flat: dict[str, float] = {}
    for key, value in record.items():
        if key in PER_LAYER and value:
            known = [(number, item) for number, item in zip(layer_numbers(len(value)), value, strict=True) if item is not None]
            if len(value) <= MAX_LAYERS_AS_KEYS:
                flat |= {f"layer_{number:02d}/{key}": item for number, item in known}
            if items := [item for _, item in known]:
                flat |= {f"layers/{key}_mean": sum(items) / len(items), f"layers/{key}_max": max(items)}
        elif key != "step" and isinstance(value, int | float):
            flat[key] = value
    return flat


def _parse(line: str) -> Record | None:
    """The record of a line; None: the line holds none."""
    try:
        record = json.loads(line, parse_constant=lambda name: None)  # another program's NaN: as our own writer has it
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] <= _LAST_STEP:
        return None
    return record if all(isinstance(record.get(key), int | float | None) for key in _NUMBERS) else None


def read_metrics(path: Path) -> list[Record]:
    """All records, in the order of the file.

    A last line that was cut off is left out: a running or killed process is in the middle of it.  Raises ValueError, with the
    line's number, for any other line that is no record.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    torn = lines.pop()  # what follows the last line feed: nothing, or half a record
    records = []
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is None:
            raise ValueError(f"{path}: line {number} is not a record with a step: {line[:60]!r}; remove that line")
        records.append(record)
    complete = _parse(torn)
    return records if complete is None else [*records, complete]


class MetricsFile:
    """Appends records.  A run that continues after `resumed_step` keeps the records up to that step and forgets later ones."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """OSError if the file can't be written."""
        self.path = path
        if path.exists():
            self._keep_until(resumed_step)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """`record` as `json_record` gave it."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def rewind(self, step: int) -> None:
        """Forget the records after `step`."""
        self._file.close()
        self._keep_until(step)
        self._file = self.path.open("a", encoding="utf-8")

    def _keep_until(self, last_step: int) -> None:
        """Rewrite the file."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        parsed = [(number, line, _parse(line)) for number, line in enumerate(lines, 1) if line]
        lost = [number for number, _, record in parsed if record is None and number < len(lines)]
        if lost:
            logger.warning("%s: lines %s are no records and were dropped", self.path, lost)
        kept = [line + "\n" for _, line, record in parsed if record is not None and record["step"] <= last_step]
        write_whole(self.path, "".join(kept), durable=True)


def read_yaml(path: Path) -> Any:
    """A YAML file that a run has written, read back; ValueError that names the file where it is damaged."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
