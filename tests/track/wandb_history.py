"""The history of offline W&B runs, read back."""

import json
import subprocess
import sys
from pathlib import Path

from megalina.track.metrics import Record


def read_history(wandb_dir: Path) -> list[Record]:
    """What was logged, a record a step, from all offline runs below `wandb_dir`, oldest first.

    A run that was cut and continued from an earlier step has several: what an earlier one logged after that step is forgotten.
    Raises ValueError if there is no run.
    """
    logs = sorted(path for path in wandb_dir.glob("**/run-*.wandb") if not path.parent.is_symlink())
    if not logs:
        raise ValueError(f"{wandb_dir}: no W&B run in it; tools/rebuild_wandb.py RUN_DIR makes one from metrics.jsonl")
    by_step: dict[int, Record] = {}
    for log in logs:
        own: dict[int, Record] = {}
        for item in _history_items(log):
            own.setdefault(item["step"], {}).update(item)  # images are logged beside the step's numbers
        if own:
            by_step = {step: record for step, record in by_step.items() if step < min(own)} | own
    return [by_step[step] for step in sorted(by_step)]


def _history_items(log: Path) -> list[Record]:
    """A killed run's log ends in the middle: what can be read before that counts, so the exit code of the reader doesn't."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    entries = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith('{"num"')]
    items = [entry["history"]["item"] for entry in entries if entry["type"] == "history"]
    return [item for item in items if "step" in item]
