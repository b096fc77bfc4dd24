"""One rank of interleaved runs: python -m megalina.compare.worker SPEC, with torchrun's variables."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalina.compare.interleaved import Competitor, Layout, alone, is_variant, layout_of, rows_along, run_interleaved
from megalina.compare.results import EAGER, as_json, in_own_time, measure, tuned_eager
from megalina.console import StatusLine
from megalina.data.source import open_data
from megalina.mesh import all_gather_object
from megalina.timeline.contention import Alone
from megalina.timeline.picture import draw
from megalina.timeline.trace import TracedStep, write_trace
from megalina.worker import load_config

GAP_S = 0.05  # between two steps of a trace


def main(spec_path: str) -> int:
    """`SPEC`: JSON with name, configs {strategy: YAML}, rounds, turn, to_the_end (names), ranks_per_node, link_mbit, slow_motion,
    shown (names), note, and files: out (JSON), picture (PNG), trace (.json.gz)."""
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    configs = {name: load_config(text) for name, text in spec["configs"].items()}
    first = next(iter(configs.values()))
    data = open_data(first.data, seq_len=first.train.seq_len, seed=first.train.seed)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=first.cluster.timeout_s))
    began_s, status = time.monotonic(), StatusLine()

    def progress(done: int, total: int, name: str) -> None:
        if rank == 0:
            left_s = (time.monotonic() - began_s) / done * (total - done) if done else 0.0
            eta = f", {left_s:.0f} s left" if done else ""
            status.show(f"{spec['name']}: {done}/{total}{eta}  {name}")

    turns = {"rounds": spec["rounds"], "turn": spec["turn"]}
    competitors = run_interleaved(configs, data, **turns, baseline=EAGER, to_the_end=spec["to_the_end"], progress=progress)
    eager = next(c for c in competitors if is_variant(c.name, EAGER))
    known = alone([eager, *competitors])
    link = {"ranks_per_node": spec["ranks_per_node"], "link_mbit": spec["link_mbit"]}
    clock = measure(competitors, known, turn=spec["turn"], **link)
    found = {name: in_own_time(measured, spec["slow_motion"]) for name, measured in clock.items()}
    by_name = {c.name: c for c in competitors}
    by_name[EAGER] = by_name[tuned_eager(found)]
    shown = {name: traced(by_name[name], known) for name in spec["shown"] if name in by_name}
    if rank == 0:
        status.end()
        Path(spec["out"]).write_text(json.dumps(as_json(spec["name"], found, slow_motion=spec["slow_motion"]), allow_nan=False))
        if spec["picture"]:
            draw(Path(spec["picture"]), {name: step.by_rank[0] for name, step in shown.items()}, note=spec["note"])
        if spec["trace"]:
            write_trace(Path(spec["trace"]), one_after_another(list(shown.values())), note=spec["note"])
    dist.destroy_process_group()
    return 0


def traced(competitor: Competitor, known: Mapping[Layout, Mapping[str, Alone]]) -> TracedStep:
    """The last step, of all ranks.  `known`: by layout."""
    mesh, trainable = competitor.runner.mesh, competitor.runner.trainable
    return TracedStep(all_gather_object(mesh, competitor.events[-1]), rows_along(trainable), known[layout_of(mesh)])


def one_after_another(steps: Sequence[TracedStep]) -> dict[int, TracedStep]:
    """By number, from 1: each begins where the one before it ends, whatever was between them."""
    out, at_s = {}, 0.0
    for number, step in enumerate(steps, 1):
        events = [e for of_rank in step.by_rank for e in of_rank]
        by_s = at_s - min(e.start_s for e in events)
        moved = [
            [replace(e, enqueued_s=e.enqueued_s + by_s, start_s=e.start_s + by_s, end_s=e.end_s + by_s) for e in of_rank]
            for of_rank in step.by_rank
        ]
        out[number] = replace(step, by_rank=moved)
        at_s = max(e.end_s for of_rank in moved for e in of_rank) + GAP_S
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
