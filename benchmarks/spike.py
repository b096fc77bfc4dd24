"""What `guard.spike=rewind` does about a window of corrupted text, on the smallest model and real text.

    python benchmarks/spike.py --json spike.json

Four runs of the same seed: one whose text is noise for some batches, with the guard on rewind; the same without a guard and
with guard.spike=skip; and one that never sees the sequences that the first has passed over (data.skip_samples).  The first
and the last must end with the same weights, bit for bit.
"""

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalina.batch import Batch
from megalina.checkpoint.stored import read_tensors
from megalina.config import CheckpointConfig, DataConfig, GuardConfig, PretrainConfig, RunConfig, ScheduleConfig, TrainConfig
from megalina.data.source import TokenData, open_data
from megalina.train.trainer import Trainer

STEPS, BATCH, INTERVAL = 240, 8, 20
BAD = range(BATCH * 150, BATCH * 153)  # three batches


def config_of(folder: Path, name: str, **guard: Any) -> PretrainConfig:
    (folder / name).mkdir(parents=True, exist_ok=True)
    return PretrainConfig(
        run=RunConfig(dir=str(folder / name)),
        data=DataConfig(),
        schedule=ScheduleConfig(warmup_steps=20),
        train=TrainConfig(steps=STEPS, global_batch_size=BATCH, micro_batch_size=BATCH, eval_interval=0),
        checkpoint=CheckpointConfig(interval=INTERVAL),
        guard=GuardConfig(**guard),
    )


class Quiet:
    """A tracker that shows nothing."""

    def log(self, record: dict[str, Any]) -> None:
        if record["step"] % 40 == 0:
            print(f"  step {record['step']}: loss {record['loss']:.4f}", file=sys.stderr)

    def rewind(self, step: int) -> None: ...


def run(config: PretrainConfig, data: TokenData, *, corrupted: bool) -> Trainer:
    print(f"{config.run.dir}: guard.spike={config.guard.spike}, text {'corrupted' if corrupted else 'as it is'}", file=sys.stderr)
    out = Trainer(config, data, device=torch.device("cpu"), tracker=Quiet())  # type: ignore[arg-type]
    batch_of = data.train.batch

    def spoiled(first: int, count: int) -> Batch:
        batch = batch_of(first, count)
        bad_B = torch.tensor([int(s) in BAD for s in batch.sample_B])
        noise = torch.randint(0, data.vocab_size, batch.labels_BS.shape, generator=torch.Generator().manual_seed(first))
        return replace(batch, labels_BS=torch.where(bad_B.unsqueeze(1), noise, batch.labels_BS))

    if corrupted:
        data.train.batch = spoiled  # type: ignore[method-assign]
    try:
        out.begin(None)
        out.loop()
    finally:
        data.train.batch = batch_of  # type: ignore[method-assign]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = config_of(folder, "rewind", spike="rewind")
        data = open_data(first.data, seq_len=first.train.seq_len, seed=first.train.seed)
        runs = {"rewind": run(first, data, corrupted=True)}
        windows = runs["rewind"].state.windows
        innocent = config_of(folder, "never saw it", spike="rewind")
        innocent.data.skip_samples = [min(w[0] for w in windows), max(w[1] for w in windows)]
        runs["never saw it"] = run(innocent, data, corrupted=False)
        runs["skip"] = run(config_of(folder, "skip", spike="skip"), data, corrupted=True)
        runs["no guard"] = run(config_of(folder, "no guard"), data, corrupted=True)
        weights = {kind: read_tensors(folder / kind / "checkpoints" / f"step_{STEPS:08d}") for kind in ("rewind", "never saw it")}
        equal = all(torch.equal(value, weights["never saw it"][key]) for key, value in weights["rewind"].items())
        rows = [
            {"run": kind, "val_loss": r.validate(), "rewinds": r.state.rewinds, "skipped_steps": r.state.skipped_steps}
            for kind, r in runs.items()
        ]
    print(f"{'run':<14} {'validation loss':>16} {'rewinds':>8} {'skipped steps':>14}")
    for row in rows:
        print(f"{row['run']:<14} {row['val_loss']:>16.6f} {row['rewinds']:>8} {row['skipped_steps']:>14}")
    print(f"passed over: sequences {innocent.data.skip_samples}; weights of the first two bit-equal: {equal}")
    if arguments.json:
        result = {"rows": rows, "skipped_samples": innocent.data.skip_samples, "bit_equal": equal}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if equal and rows[0]["rewinds"] else 1


if __name__ == "__main__":
    from megalina.console import command

    command(main)
