"""A made-up run folder: config.yaml and metrics.jsonl as the trainer writes them, for tests and for looking at the report."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megalina.config import (
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RouterConfig,
    RunConfig,
    TrackerConfig,
    TrainConfig,
    WandbConfig,
)
from megalina.track.tracker import Tracker, open_trackers

UNIGRAM_LOSS = 6.3


def config_of(run_dir: Path, **settings: Any) -> PretrainConfig:
    """Settings: steps, layers, experts, lr, router, wandb, tensorboard, image_interval."""
    return PretrainConfig(
        run=RunConfig(dir=str(run_dir)),
        model=ModelConfig(num_layers=settings.get("layers", 4), num_experts=settings.get("experts", 8)),
        router=RouterConfig(kind=settings.get("router", "topk")),
        optim=OptimConfig(lr=settings.get("lr", 1e-3)),
        train=TrainConfig(steps=settings.get("steps", 60), global_batch_size=16, seq_len=256),
        tracker=TrackerConfig(
            wandb=WandbConfig(mode=settings.get("wandb", "disabled")),
            tensorboard=settings.get("tensorboard", False),
            image_interval=settings.get("image_interval", 0),
        ),
    )


def records_of(config: PretrainConfig, *, seed: int = 0) -> list[dict[str, Any]]:
    """A record a step: falling loss, experts that drift apart and come together, one that starves for a while."""
    random = np.random.default_rng(seed)
    steps, layers, experts = config.train.steps, config.model.num_layers, config.model.num_experts
    taste_LE = random.normal(0, 1, (layers, experts))
    drift_LE = np.zeros((layers, experts))
    floor = 2.6 + abs(math.log10(config.optim.lr) + 2.7) * 0.5
    records = []
    for step in range(1, steps + 1):
        done = step / steps
        drift_LE = 0.97 * drift_LE + random.normal(0, 0.06, (layers, experts))
        logits = taste_LE * 1.3 * math.exp(-4 * done) * min(1, done * 20) + drift_LE
        share_LE = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        if 0.1 < done < 0.3:
            share_LE[-1, experts // 2] = 0
            share_LE[-1] /= share_LE[-1].sum()
        loss = floor + (8.3 - floor) * math.exp(-7 * done) + 0.9 * (1 - done) * math.exp(-2 * done) + random.normal(0, 0.05)
        tokens = step * config.train.global_batch_size * config.train.seq_len
        record: dict[str, Any] = {
            "step": step,
            "consumed_samples": step * config.train.global_batch_size,
            "tokens": tokens,
            "loss": loss,
            "aux_loss": 1 + float(((share_LE * experts) ** 2).mean() - 1),
            "z_loss": 0.0,
            "grad_norm": 0.5 + 3 * math.exp(-9 * done) + abs(random.normal(0, 0.1)),
            "lr": config.optim.lr * min(1, step / (0.1 * steps)) * (0.1 + 0.45 * (1 + math.cos(math.pi * done))),
            "tokens_per_s": 9100 + random.normal(0, 250) - (2500 if step % 47 == 0 else 0),
            "mfu": 0.41 + random.normal(0, 0.01),
            "step_s": 0.45 + abs(random.normal(0, 0.01)),
            "load_max_over_mean": (share_LE.max(axis=1) * experts).tolist(),
            "load_entropy": (-(share_LE * np.log(np.maximum(share_LE, 1e-30))).sum(axis=1) / math.log(experts)).tolist(),
            "dropped_fraction": [0.0] * layers,
            "dead_experts": [*[0] * (layers - 1), int(0.15 < done < 0.3)],
            "expert_load": share_LE.tolist(),
        }
        if step % max(steps // 10, 1) == 0:
            record["val_loss"] = loss + 0.08
        records.append(record)
    return records


def start(config: PretrainConfig, *, resumed_step: int = 0) -> Tracker:
    """What the program and the trainer do first: the folder, config.yaml, trackers."""
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    return open_trackers(config.tracker, run_dir=run_dir, config=asdict(config), resumed_step=resumed_step)


def write_run(run_dir: Path, *, until: int | None = None, **settings: Any) -> Path:
    """A whole run, or its first `until` steps."""
    config = config_of(run_dir, **settings)
    tracker = start(config)
    for record in records_of(config)[:until]:
        tracker.log(record)
    tracker.finish(failed=False)
    return run_dir
