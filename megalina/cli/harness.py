"""lm-evaluation-harness on a checkpoint, for `megalina eval --lm-eval`: checks, ranks, results; local tasks as its files."""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalina.cli.on_ranks import on_ranks

if TYPE_CHECKING:
    from megalina.evaluate.harness_run import HarnessRun
    from megalina.launch import Member

INSTALL = "lm-evaluation-harness is not installed: pip install 'megalina[lm-eval]'"
TASKS_FOLDER = "lm_eval_tasks"  # where local tasks are written that nobody has written yet


def evaluate(args: argparse.Namespace, checkpoint: Path, out: Path, member: "Member | None") -> None:
    """What `--write-tasks` and `--lm-eval` ask for.  ValueError or OSError before a rank starts."""
    quiet = member is not None and member.rank > 0
    names = [name for name in args.lm_eval.split(",") if name]
    if args.lm_eval and find_spec("lm_eval") is None:
        raise ValueError(f"--lm-eval: {INSTALL}")
    include_path = str(args.include_path or "")
    if args.write_tasks or (not include_path and any(name.startswith("megalina_") for name in names)):
        folder = args.write_tasks or out / TASKS_FOLDER
        if args.dry_run:
            if not quiet:
                print(f"{checkpoint}: {', '.join(names) or 'no task'}, after local tasks are written to {folder}")
            return
        if member is None or member.local_rank == 0:  # nodes may have folders of their own
            written = write_local_tasks(checkpoint, folder, examples=args.examples)
            if not quiet:
                print("\n".join(map(str, written)), file=sys.stderr)
        if names and member is not None:
            _wait_for_all(member)
        include_path = include_path or str(folder)
    if not names:
        return
    asked = _asked(args, checkpoint, names, include_path)
    if args.dry_run:
        if not quiet:
            print(f"{asked.checkpoint}: {', '.join(names)}; to {out}")
        return
    found = _join(asked, member) if member is not None else _run(asked, args.ranks or 1)
    if found and not quiet:
        print(found["table"])
        print(write_results(found, out))


def write_local_tasks(checkpoint: Path, folder: Path, *, examples: int) -> list[Path]:
    """Those of the run's `eval`, of its own held-out text, with so many `examples` (0: as many as there).

    ValueError where it has no such text, or no tokenizer."""
    from megalina.checkpoint.files import read_values
    from megalina.config import DataConfig, EvalConfig, PretrainConfig, TrainConfig
    from megalina.data.source import open_data
    from megalina.tasks.harness_files import write_tasks
    from megalina.train.task_scores import tasks_of

    values = read_values(checkpoint)["config"]
    chosen = EvalConfig(**values.get("eval", {}))  # runs of before had none
    config = PretrainConfig(
        data=DataConfig(**values["data"]),
        train=TrainConfig(**values["train"]),
        eval=replace(chosen, examples=examples or chosen.examples),
    )
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    return write_tasks(tasks_of(config, data), folder)


def write_results(found: dict[str, Any], out: Path) -> Path:
    """OUT/lm_eval/MODEL/results_DATE.json, where the harness would put it below an output path OUT/lm_eval."""
    from megalina.whole_file import write_whole

    results = found["results"]
    folder = out / "lm_eval" / str(results["model_name_sanitized"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / str(found["name"])
    write_whole(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return path


def _asked(args: argparse.Namespace, checkpoint: Path, names: list[str], include_path: str) -> "HarnessRun":
    from megalina.checkpoint.files import read_values
    from megalina.compose import CONF
    from megalina.evaluate.harness_run import HarnessRun, manager_of
    from megalina.serve.modes import read_mode

    values = read_values(checkpoint)
    if not values["tokenizer_path"]:
        raise ValueError(f"--lm-eval: {checkpoint} was trained on token ids without a tokenizer, and tasks are text")
    if values["config"]["router"]["kind"] == "expert_choice":
        raise ValueError("--lm-eval: expert choice looks at later tokens, and so at the answers: such a model can't be asked")
    manager_of(names, include_path)
    infer = read_mode(CONF / "infer", "static", [text for text in args.overrides if text.startswith("infer.")])
    return HarnessRun(
        checkpoint=str(checkpoint),
        tasks=names,
        include_path=include_path,
        limit=args.limit,
        batch_size=args.batch_size,
        infer=infer,
    )


def _run(asked: "HarnessRun", ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="megalina_lm_eval_") as name:
        logs, found = Path(name) / "logs", Path(name) / "found.json"
        spec = replace(asked, logs=str(logs), out=str(found)).to_json()
        return on_ranks("megalina.evaluate.harness_run", spec, Path(name), ranks=ranks)


def _wait_for_all(member: "Member") -> None:
    """Until the ranks that write have written."""
    import torch.distributed as dist

    from megalina.evaluate.harness import join_group

    os.environ.update(member.environment())
    join_group()
    if dist.is_initialized():
        dist.barrier()


def _join(asked: "HarnessRun", member: "Member") -> dict[str, Any]:
    from megalina.evaluate.harness_run import run_harness

    os.environ.update(member.environment())
    return run_harness(asked)
