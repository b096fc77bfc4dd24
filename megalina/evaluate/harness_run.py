"""Tasks of lm-evaluation-harness on a checkpoint: what is asked, and one rank of it.

python -m megalina.evaluate.harness_run SPEC, with torchrun's variables.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalina.config import InferConfig
from megalina.evaluate.harness import join_group, leave_group, open_harness_model
from megalina.evaluate.worker import in_process
from megalina.nearest import nearest

try:
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table, sanitize_model_name
except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'megalina[lm-eval]'") from error


@dataclass(frozen=True, slots=True)
class HarnessRun:
    """The same on all ranks."""

    checkpoint: str
    tasks: Sequence[str]
    include_path: str = ""  # folder with tasks of your own
    limit: int = 0  # examples of a task; 0: all
    batch_size: int = 8  # texts of a rank at a time
    infer: InferConfig = field(default_factory=InferConfig)
    logs: str = ""  # folder in which a rank leaves why it ended
    out: str = ""  # JSON, written by rank 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "HarnessRun":
        values = json.loads(text)
        return HarnessRun(infer=InferConfig(**values.pop("infer")), **values)


def manager_of(tasks: Sequence[str], include_path: str) -> TaskManager:
    """The harness's own, which knows these tasks.  ValueError for one that isn't there."""
    if include_path and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path}: there is no such folder")
    manager = TaskManager(include_path=include_path or None, include_defaults=False)  # all others take it seconds
    if any(not manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=include_path or None)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(
                f"--lm-eval: lm-evaluation-harness knows no task {task}{nearest(task, manager.all_tasks)}; see `lm_eval ls "
                "tasks`, and give --include-path for tasks of your own"
            )
    return manager


def run_harness(asked: HarnessRun) -> dict[str, Any]:
    """`results`, as the harness writes them, the `name` that it gives the file, and its `table`.

    All ranks call it together; those that are not the first of their node get nothing."""
    join_group()
    model = open_harness_model(Path(asked.checkpoint), batch_size=asked.batch_size, infer=asked.infer)
    with tempfile.TemporaryDirectory(prefix="megalina_results_") as folder:
        tracker = EvaluationTracker(output_path=f"{folder}/results.json")
        try:
            results = simple_evaluate(
                model=model,
                tasks=list(asked.tasks),
                task_manager=manager_of(asked.tasks, asked.include_path),
                limit=asked.limit or None,
                batch_size=asked.batch_size,
                evaluation_tracker=tracker,
            )
        finally:
            model.engine.close()
            leave_group()
        if results is None:
            return {}
        about = tracker.general_config_tracker
        about.model_source, about.model_name = "megalina", asked.checkpoint
        about.model_name_sanitized = sanitize_model_name(asked.checkpoint)
        results["config"] |= {"model": "megalina", "model_args": {"checkpoint": asked.checkpoint}}
        tracker.save_results_aggregated(results=results, samples=results.pop("samples"))
        (written,) = Path(folder).glob("results_*.json")
        return {"results": json.loads(written.read_text()), "name": written.name, "table": make_table(results)}


def main(spec_path: str) -> int:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked = HarnessRun.from_json(Path(spec_path).read_text())
    return in_process(lambda: run_harness(asked), logs=Path(asked.logs), out=Path(asked.out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
