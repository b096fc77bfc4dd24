"""One rank of a contest: python -m megalina.compare.worker SPEC, with torchrun's variables."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalina.compare.contest import alone, contest
from megalina.compare.results import EAGER, as_json, measure, tuned_eager
from megalina.data.source import open_data
from megalina.timeline.picture import draw
from megalina.worker import load_config


def main(spec_path: str) -> int:
    """`SPEC`: JSON with name, configs {strategy: YAML}, rounds, turn, ranks_per_node, link_mbit, out (JSON), picture (PNG)."""
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    configs = {name: load_config(text) for name, text in spec["configs"].items()}
    first = next(iter(configs.values()))
    data = open_data(first.data, seq_len=first.train.seq_len, seed=first.train.seed)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=first.cluster.timeout_s))
    began_s = time.monotonic()

    def progress(done: int, total: int, name: str) -> None:
        if rank == 0:
            left_s = (time.monotonic() - began_s) / done * (total - done) if done else 0.0
            eta = f", {left_s:.0f} s left" if done else ""
            print(f"\r{spec['name']}: {done}/{total}{eta}  {name:20s}", end="", file=sys.stderr, flush=True)

    contestants = contest(configs, data, rounds=spec["rounds"], turn=spec["turn"], progress=progress)
    eager = next(c for c in contestants if c.name.startswith(EAGER))
    known = alone(eager, sharded=False)
    link = {"ranks_per_node": spec["ranks_per_node"], "link_mbit": spec["link_mbit"]}
    found = measure(contestants, known, turn=spec["turn"], **link)
    if rank == 0:
        print(file=sys.stderr)
        Path(spec["out"]).write_text(json.dumps(as_json(spec["name"], found), allow_nan=False))
        if spec["picture"]:
            events = {c.name: c.events[-1] for c in contestants}
            events[EAGER] = events[tuned_eager(found)]
            shown = {name: events[name] for name in spec["shown"] if name in events}
            draw(Path(spec["picture"]), shown, note=spec["note"])
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
