"""A proof of a model with code of your own in it: all that megalina takes from a declaration, held against a measurement.

Layouts against one process in float64, declared parameters against the modules', declared FLOPs and kept bytes against what the
functions do, the planner's memory with and without it, and a checkpoint of one layout gone on with in another.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalina.blocks.counts import count_parameters, training_flops_per_token
from megalina.blocks.model import blocks_of
from megalina.config import CheckpointConfig, ClusterConfig, DataConfig, PretrainConfig, RunConfig, TrackerConfig, WandbConfig
from megalina.data.indexed import IndexedWriter
from megalina.data.source import open_data
from megalina.model.gpt import GPT
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.rank_pool import RankPool
from megalina.train.trainer import Trainer
from megalina.verify.compare import compare
from megalina.verify.declared import Declared, declared_and_counted
from megalina.verify.on_ranks import PRELOAD, Pool
from megalina.verify.recording import SEQUENCES, Layout
from megalina.verify.reference import record
from megalina.verify.shrink import shrink
from megalina.verify.start import random_batches

STEPS = 2  # of a row, and before and after the checkpoint
COUNTED_LENGTH = 64  # tokens of a sequence; torch counts no FLOPs of attention in sequences as short
BYTES_A_TOKEN = 32  # indices that functions keep and declarations leave out
SHARE = 0.05  # by which declared FLOPs and bytes may be off: sums for statistics are not declared
LAYOUTS = (
    Layout(2, tp=2),
    Layout(2, tp=2, sequence=False, recompute="full"),
    Layout(2, ep=2, micro_batch=1),
    Layout(2, ep=2, zero=1, recompute="selective", strategy="flow"),
    Layout(2, cp=2),
)


class NotProven(AssertionError):
    """What differs, in one line with the numbers."""


def prove(config: PretrainConfig, *, without: PretrainConfig | None = None) -> dict[str, Any]:
    """What was held against what, for people and machines.  NotProven with the first thing that differs.

    `config`: with code of your own in it; it is shrunk.  `without`: the same model without it, to name what it adds."""
    base = shrink(config, 2)
    added = _added(config, without) if without is not None else {}
    return {
        "layouts": _layouts(base),
        "parameters": _parameters(base),
        **_declared(base),
        "added": added,
        "checkpoint": _checkpoint(base),
    }


def _layouts(base: PretrainConfig) -> dict[str, Any]:
    """Every layout equals one process: losses, routing, activations, gradients, norms and weights."""
    batches, worst = random_batches(base, STEPS), 0.0
    mixing = any(block.mixes_tokens for _, block in blocks_of(base.model, base.router).all())  # which cp > 1 refuses
    layouts = [layout for layout in LAYOUTS if layout.cp == 1 or not mixing]
    with Pool() as pool:
        for layout in layouts:
            config = replace(base, strategy=replace(base.strategy, parts=2 if layout.strategy == "flow" else 1))
            config = replace(config, train=replace(config.train, micro_batch_size=layout.micro_batch))
            found = compare(record(config, batches), pool.record(config, layout, batches))
            if found.first is not None:
                raise NotProven(f"{layout}: {found.first}, off by {found.first.error:.1e}")
            worst = max(worst, found.largest_error)
    return {"rows": [str(layout) for layout in layouts], "largest_error": worst}


def _parameters(base: PretrainConfig) -> int:
    """As the planner counts them, and as the model has them."""
    words, length = base.model.vocab_size, base.model.max_positions or base.train.seq_len
    counted = count_parameters(base.model, base.router, vocab_size=words, seq_len=length).total
    built = sum(p.numel() for p in GPT(base.model, base.router, vocab_size=words, max_positions=length, seed=0).parameters())
    if counted != built:
        raise NotProven(f"{counted} parameters are declared, the model has {built}")
    return built


def _declared(base: PretrainConfig) -> dict[str, Any]:
    """FLOPs and kept bytes of every forward instruction, in float32, of so long sequences that little is kept of weights."""
    train = replace(base.train, dtype="float32", seq_len=COUNTED_LENGTH, global_batch_size=2, micro_batch_size=2)
    model = replace(base.model, max_positions=COUNTED_LENGTH if base.model.max_positions else 0)
    config = replace(base, model=model, train=train)
    rows = declared_and_counted(config)
    tokens = config.train.micro_batch_size * config.train.seq_len
    for row in rows:
        if wrong := differs(row, tokens):
            raise NotProven(wrong)
    first = {(row.block, row.instruction.split(".")[0]): row for row in reversed(rows)}
    return {
        "flops": {f"{block} {name}": [row.flops, row.counted_flops] for (block, name), row in sorted(first.items())},
        "kept_bytes": {f"{block} {name}": [row.kept_bytes, row.counted_bytes] for (block, name), row in sorted(first.items())},
    }


def differs(row: Declared, tokens: int) -> str:
    """What is declared wrongly of an instruction of so many tokens; empty: nothing."""
    if abs(row.flops - row.counted_flops) > SHARE * row.counted_flops:
        return f"{row.instruction} of {row.block}: {row.flops:.0f} FLOPs are declared, {row.counted_flops:.0f} were counted"
    if abs(row.kept_bytes - row.counted_bytes) > max(SHARE * row.counted_bytes, BYTES_A_TOKEN * tokens):
        return f"{row.instruction} of {row.block}: {row.kept_bytes} kept bytes are declared, {row.counted_bytes} were counted"
    return ""


def _added(config: PretrainConfig, without: PretrainConfig) -> dict[str, float]:
    """What the planner says that it costs."""
    words = config.model.vocab_size or 128
    length = config.train.seq_len

    def figures(of: PretrainConfig) -> tuple[float, float, float]:
        params = count_parameters(of.model, of.router, vocab_size=words, seq_len=length).total
        flops = training_flops_per_token(of.model, of.router, vocab_size=words, seq_len=length)
        state = sum(InstructionBytes(of, 1, vocab_size=words).state.values())
        return params, flops, state

    names = ("parameters", "flops_per_token", "state_bytes")
    return {name: a - b for name, a, b in zip(names, figures(config), figures(without), strict=True)}


def _checkpoint(base: PretrainConfig) -> dict[str, Any]:
    """What one layout wrote, another goes on with, as one process would have."""
    with tempfile.TemporaryDirectory() as folder, RankPool(preload=PRELOAD) as pool:
        _write_tokens(Path(folder) / "tokens", base.model.vocab_size)
        whole, names = pool.run(1, _trained, _run(base, folder, "one", steps=2 * STEPS), None)[0]
        saving = _run(replace(base, parallel=replace(base.parallel, ep=2)), folder, "ep", steps=STEPS)
        first, _ = pool.run(2, _trained, saving, None)[0]
        point = Path(saving.run.dir) / "checkpoints" / f"step_{STEPS:08d}"
        other = _run(replace(base, parallel=replace(base.parallel, tp=2)), folder, "tp", steps=2 * STEPS)
        then, _ = pool.run(2, _trained, other, point)[0]
    error = max(abs(a - b) / abs(a) for a, b in zip(whole, first + then, strict=True))
    if not error < 1e-9:
        raise NotProven(f"losses after a checkpoint of ep=2 was gone on with under tp=2: {first + then}, one process: {whole}")
    return {"from": "ep 2", "to": "tp 2", "losses": then, "largest_error": error, "reported": names}


def _run(base: PretrainConfig, folder: str, name: str, *, steps: int) -> PretrainConfig:
    (Path(folder) / name).mkdir()
    return replace(
        base,
        run=RunConfig(dir=f"{folder}/{name}"),
        launch=replace(base.launch, device="cpu"),
        train=replace(base.train, steps=2 * STEPS, exit_step=steps, global_batch_size=SEQUENCES, micro_batch_size=2),
        checkpoint=CheckpointConfig(interval=STEPS),
        data=DataConfig(kind="indexed", prefix=f"{folder}/tokens", cache_dir=f"{folder}/cache", split="80,20"),
        tracker=TrackerConfig(wandb=WandbConfig(mode="disabled"), tensorboard=False, progress="none", samples=0),
        cluster=ClusterConfig(peak_tflops=1.0),
    )


def _write_tokens(prefix: Path, words: int) -> None:
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([words - 1, 0, 1])
        for _ in range(100):
            writer.add_document(random.integers(0, words, int(random.integers(5, 60))))


class _Losses:
    """A tracker that remembers the losses."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.names: list[str] = []

    def log(self, values: dict[str, Any]) -> None:
        self.seen.append(values["loss"])
        self.names = [name for name in values if name.endswith("_loss")]

    def rewind(self, step: int) -> None:
        pass

    def finish(self, *, failed: bool) -> None:
        pass


def _trained(config: PretrainConfig, point: Path | None) -> tuple[list[float], list[str]]:
    """On a rank: the losses of the steps from a checkpoint on, and which auxiliary ones are reported."""
    data, losses = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed), _Losses()
    trainer = Trainer(config, data, device=torch.device("cpu"), tracker=losses)  # type: ignore[arg-type]
    trainer.begin(point)
    trainer.loop()
    trainer.runner.close()
    return losses.seen, losses.names
