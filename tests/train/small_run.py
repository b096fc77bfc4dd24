"""A small run: the trainer's loop on a few thousand random tokens, without launcher, report or trackers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalina.batch import Batch
from megalina.checkpoint.files import read_values
from megalina.checkpoint.stored import read_tensors
from megalina.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RouterConfig,
    RunConfig,
    ScheduleConfig,
    TrackerConfig,
    TrainConfig,
    WandbConfig,
)
from megalina.data.indexed import IndexedWriter
from megalina.data.source import open_data
from megalina.train.trainer import Trainer

MADE = ("config", "arithmetic", "plan", "ledger", "ledger_saved_lines")  # ledgers in checkpoints begin where others were saved
Actions = dict[int, Callable[[Trainer], None]]  # after a step has been logged
VOCABULARY, LENGTH = 300, 16  # padded to 384 rows with tp = 1, to 512 with tp = 2 and 4
GROUPS = {
    "model": {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 4, "num_experts": 4, "d_ff": 16},
    "router": {"balance_loss": 0.05, "z_loss": 0.01},
    "parallel": {},
    "optim": {"lr": 3e-3},
    "schedule": {"warmup_steps": 2},
    "train": {
        "steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "seq_len": LENGTH, "eval_interval": 0, "eval_sequences": 7,
    },
    "checkpoint": {"keep_last": 100},
}  # fmt: skip
SCHEMA = {
    "model": ModelConfig,
    "router": RouterConfig,
    "parallel": ParallelConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
}


def write_tokens(prefix: Path) -> None:
    """Documents of 5 to 60 tokens in which some words often follow each other, so that there is something to learn."""
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([VOCABULARY - 1, 0, 1])
        for _ in range(200):
            start, count = int(random.integers(VOCABULARY)), int(random.integers(5, 60))
            writer.add_document((start + np.arange(count) * 7 + random.integers(0, 3, count)) % VOCABULARY)


def config_of(folder: Path, run: str, **settings: Any) -> PretrainConfig:
    """`config_of(folder, "a", ep=2, steps=8)`: each key goes to the group that has it, `bias` to the model.

    `write_tokens` has written FOLDER/tokens."""
    groups = {name: dict(values) for name, values in GROUPS.items()}
    for key, value in settings.items():
        owners = [name for name, schema in SCHEMA.items() if key in schema.__dataclass_fields__ and key != "name"]
        assert len(owners) == 1 or key == "bias", (key, owners)
        groups[owners[0]][key] = value
    (folder / run).mkdir(exist_ok=True)
    return PretrainConfig(
        run=RunConfig(dir=str(folder / run)),
        launch=LaunchConfig(device="cpu"),
        data=DataConfig(kind="indexed", prefix=str(folder / "tokens"), cache_dir=str(folder / "cache"), split="80,20"),
        tracker=TrackerConfig(wandb=WandbConfig(mode="disabled"), tensorboard=False, progress="none", samples=0),
        cluster=ClusterConfig(peak_tflops=1.0),
        **{name: SCHEMA[name](**values) for name, values in groups.items()},
    )


@dataclass
class Recorder:
    """A tracker that remembers; `after[step](run)` is called when that step is logged."""

    after: Actions = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    run: Trainer | None = None

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(dict(record))
        if (action := self.after.get(record["step"])) is not None:
            assert self.run is not None
            action(self.run)

    def rewind(self, step: int) -> None:
        self.records = [record for record in self.records if record["step"] <= step]

    def finish(self, *, failed: bool) -> None:
        assert not failed

    def of(self, key: str) -> list[Any]:
        return [r[key] for r in self.records]


def start(config: PretrainConfig, point: Path | None = None, after: Actions | None = None) -> Trainer:
    """A run on the ranks that there are, ready for `loop`; its tracker, on every rank, is a `Recorder`."""
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    recorder = Recorder(after or {})
    run = recorder.run = Trainer(config, data, device=torch.device("cpu"), tracker=recorder)  # type: ignore[arg-type]
    run.begin(point)
    return run


def records_of(config: PretrainConfig, point: Path | None = None, after: Actions | None = None) -> Recorder:
    """Run to its end."""
    run = start(config, point, after)
    run.loop()
    recorder = run.tracker
    assert isinstance(recorder, Recorder)
    recorder.run = None
    return recorder


def checkpoint(config: PretrainConfig, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step_{step:08d}"


def steps_kept(config: PretrainConfig) -> list[int]:
    return sorted(int(p.name[5:]) for p in (Path(config.run.dir) / "checkpoints").iterdir())


def same_checkpoints(a: Path, b: Path) -> list[str]:
    """What differs in two checkpoints, bit by bit; how they were made does not count: settings, and when others were saved."""
    first, second = read_tensors(a), read_tensors(b)
    values = [{k: v for k, v in read_values(p).items() if k not in MADE} for p in (a, b)]
    names = [n for n in first if n not in second or first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])]
    return names + [n for n in second if n not in first] + [k for k in values[0] if values[0][k] != values[1].get(k)]


def weights_of(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.built.trainable.gpt.named_parameters()}


def random_batch(sequences: int = 8, *, first: int = 0, length: int = LENGTH) -> Batch:
    """Sequences `first`, `first` + 1, ... of random words, each a function of its number."""
    words = [
        torch.randint(0, VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(first + i)) for i in range(sequences)
    ]
    tokens, every = torch.stack(words), torch.ones(sequences, length, dtype=torch.bool)
    position = torch.arange(length).repeat(sequences, 1)
    return Batch(tokens[:, :-1], tokens[:, 1:], every, every, position, None, torch.arange(first, first + sequences))
