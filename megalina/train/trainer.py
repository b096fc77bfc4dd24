"""The trainer: one run of pretraining, on one rank of it.

All ranks run this very code.  What differs between them (clocks, signals, files) enters only through rank 0's word or
through a reduction that a step's program makes anyway.
"""

import logging
import os
import statistics
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalina.batch import Batch
from megalina.checkpoint.checkpoints import read_values
from megalina.config import PretrainConfig
from megalina.data.source import TokenData, open_data
from megalina.mesh import build_mesh
from megalina.parallel.functions import Verdict
from megalina.parallel.trainable import DTYPES, Trainable
from megalina.track.progress import Progress
from megalina.track.tracker import Tracker, open_trackers
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.closing import close_run
from megalina.train.load_watch import LoadWatch
from megalina.train.model_flops import model_flops, peak_flops
from megalina.train.resume import newest_checkpoint, resume_point
from megalina.train.run_state import RunState
from megalina.train.schedule import learning_rate
from megalina.train.stop import StopWish
from megalina.train.throughput import mfu, peak_memory_bytes

logger = logging.getLogger("megalina")
WARM_UP_STEPS = 3  # the first steps of a process are left out of the median speed


def train(config: PretrainConfig) -> dict[str, Any]:
    """Train, from the first step or from a checkpoint; returns the run's summary, the same on all ranks.

    torchrun's environment variables say which rank this is (none: a single process).
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = choose_device(config.launch.device)
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    start = resume_point(config)
    tracker = None
    if rank == 0:  # before the first collective, so that a slow tracker keeps nobody waiting inside one
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        resumed = read_values(start)["step"] if start else 0
        tracker = open_trackers(config.tracker, run_dir=Path(config.run.dir), config=asdict(config), resumed_step=resumed)
    failed = True
    try:
        if world > 1:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=config.cluster.timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
        run = Run(config, data, device=device, tracker=tracker)
        run.begin(start)
        try:
            run.loop()
        except Exception as error:
            error.add_note(f"rank {rank} of {world}, in step {run.state.step + 1}")
            raise
        summary = run.close()
        failed = False
    finally:
        if tracker is not None:
            tracker.finish(failed=failed)
    if dist.is_initialized():
        dist.destroy_process_group()
    return summary


def choose_device(wish: str) -> torch.device:
    """This rank's device: its CUDA device by LOCAL_RANK, or the CPU."""
    if wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("launch.device=cuda, but torch sees no GPU; use launch.device=cpu or auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


class Run:
    """The loop over steps: data, program, update, validation, checkpoints, metrics."""

    def __init__(self, config: PretrainConfig, data: TokenData, *, device: torch.device, tracker: Tracker | None):
        self.config, self.data, self.device, self.tracker = config, data, device, tracker
        self.mesh = build_mesh(tp=config.parallel.tp, ep=config.parallel.ep, timeout_s=config.cluster.timeout_s)
        self.is_first = self.mesh.world.rank == 0
        wish = StopWish(max_minutes=config.train.max_minutes if self.is_first else 0.0)  # one clock decides
        vocab_size = config.model.vocab_size or data.vocab_size  # the model may have more than the tokenizer
        self.trainable = Trainable(config, self.mesh, vocab_size=vocab_size, device=device, wish_to_stop=wish)
        self.optimizer = BucketOptimizer(config.optim, self.trainable.buckets)
        self.watch = LoadWatch(len(self.trainable.gpt.moe_layers), config.model.num_experts)
        self.state = RunState(config, self.mesh, self.trainable, self.optimizer, self.watch, tokenizer_path=data.tokenizer_path)
        self.flops = model_flops(config.model, config.router, vocab_size=vocab_size, seq_len=config.train.seq_len)
        self.peak = config.cluster.peak_tflops * 1e12 or peak_flops(device, DTYPES[config.train.dtype])
        self.first_sample, self.own_samples = self._share(config.train.global_batch_size)
        self._step_s: list[float] = []
        self._record: dict[str, Any] = {}

    def begin(self, start: Path | None) -> None:
        """Take the state of the checkpoint `start`, or the weights of `train.init_from`."""
        if start is not None:
            self.state.load(start)
        elif self.config.train.init_from:
            self.state.load_weights(Path(self.config.train.init_from))
        if self.is_first:
            logger.info("data: %s", self.data.description)
            logger.info("%s", self._describe())
            if start is not None:
                logger.info("resumed from %s after step %d", start, self.state.step)

    def loop(self) -> None:
        """Steps until the end, `train.exit_step`, or a wish to stop."""
        train, state = self.config.train, self.state
        last_step = min(train.exit_step or train.steps, train.steps)
        interval = self.config.checkpoint.interval
        progress = Progress(train.steps, state.step, self.config.tracker.progress if self.is_first else "none")
        with progress:
            while state.step < last_step:
                step = state.step + 1
                record, stop = self._one_step(step)
                if step == train.steps or (train.eval_interval and step % train.eval_interval == 0):
                    state.val_loss = record["val_loss"] = self.validate()
                if self.tracker is not None:
                    self.tracker.log(record)
                progress.update(record)
                self._record = record
                if stop or step == last_step or (interval and step % interval == 0):
                    state.save()
                if stop:
                    if self.is_first:
                        logger.info("stopped after step %d as asked; the same command goes on from there", step)
                    break
        state.checkpoints.wait()

    def validate(self) -> float | None:
        """Mean loss in nats over the first `train.eval_sequences` of the validation text; None without such text."""
        valid, train, dp = self.data.valid, self.config.train, self.mesh.dp
        if valid is None:
            return None
        total = torch.zeros(2, dtype=torch.float64)
        count = min(train.eval_sequences, valid.num_sequences)
        for first in range(0, count, train.micro_batch_size * dp.size):
            own = first + dp.rank * train.micro_batch_size
            batch = valid.batch(own, train.micro_batch_size)
            beyond = torch.arange(own, own + train.micro_batch_size) >= count  # all ranks take part to the end
            nothing = batch.valid_BS & ~beyond.unsqueeze(1)
            batch = replace(batch, loss_mask_BS=batch.loss_mask_BS & nothing, valid_BS=nothing)
            total += self.trainable.evaluate(batch.to(self.device)).cpu()
        return (total[0] / total[1].clamp(min=1)).item()

    def close(self) -> dict[str, Any]:
        """The report, on rank 0, and the summary."""
        train, state = self.config.train, self.state
        tokens_per_s = (
            self._tokens_per_s(statistics.median(self._step_s[WARM_UP_STEPS:] or self._step_s)) if self._step_s else None
        )
        summary = {
            "run_dir": str(Path(self.config.run.dir)),
            "steps": state.step,
            "finished": state.step >= train.steps,
            "val_loss": state.val_loss,
            "unigram_loss": self.data.unigram_loss,
            "train_loss": self._record.get("loss"),
            "tokens": state.tokens,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s) if tokens_per_s else None,
            "skipped_steps": state.skipped_steps,
            "dead_experts": sum(self._record.get("dead_experts", [])),
            "total_params": self.flops.total_params,
            "active_params": self.flops.active_params,
            "peak_memory_gb": peak_memory_bytes(self.device) / 1e9,
        }
        if self.is_first and self._record:
            checkpoint = newest_checkpoint(Path(self.config.run.dir) / "checkpoints")
            close_run(self.config, self.data, checkpoint=checkpoint, summary=summary)
        return summary

    def _one_step(self, step: int) -> tuple[dict[str, Any], bool]:
        train, state = self.config.train, self.state
        started_s = time.perf_counter()
        self.optimizer.lr = learning_rate(
            self.config.schedule,
            peak=self.config.optim.lr,
            step=step,
            total_steps=train.steps,
            tokens_per_step=train.global_batch_size * train.seq_len,
        )
        first = state.consumed_samples + self.first_sample
        batch: Batch = self.data.train.batch(first, self.own_samples).to(self.device)
        verdict = self.trainable.step(batch, self.optimizer.update)
        state.step, state.tokens = step, state.tokens + verdict.loss_tokens
        state.consumed_samples += train.global_batch_size
        if verdict.finite:
            for layer, load in zip(self.trainable.gpt.moe_layers, verdict.loads, strict=True):
                router = self.trainable.gpt.layers[layer].router
                if router.bias_E is not None:
                    router.update_bias(load[:-1].to(self.device))
        else:
            state.skipped_steps += 1
        step_s = time.perf_counter() - started_s
        self._step_s.append(step_s)
        return self._step_record(verdict, step_s), verdict.stop

    def _step_record(self, verdict: Verdict, step_s: float) -> dict[str, Any]:
        state = self.state
        tokens_per_s = self._tokens_per_s(step_s)
        return {
            "step": state.step,
            "consumed_samples": state.consumed_samples,
            "tokens": state.tokens,
            "loss": verdict.loss,
            "aux_loss": verdict.balance_loss,
            "z_loss": verdict.z_loss,
            "grad_norm": verdict.grad_norm,
            "lr": self.optimizer.lr,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "step_s": step_s,
            "skipped_steps": state.skipped_steps,
            "memory_gb": peak_memory_bytes(self.device) / 1e9,
            **asdict(self.watch.report(state.step, verdict.loads)),
        }

    def _tokens_per_s(self, step_s: float) -> float:
        return self.config.train.global_batch_size * self.config.train.seq_len / step_s

    def _mfu(self, tokens_per_s: float) -> float:
        per_token, devices = self.flops.per_token, self.mesh.world.size
        return mfu(tokens_per_s=tokens_per_s, flops_per_token=per_token, peak_flops=self.peak, num_devices=devices)

    def _share(self, sequences: int) -> tuple[int, int]:
        """This rank's sequences of a step: the first, how many."""
        own = sequences // self.mesh.dp.size
        return self.mesh.dp.rank * own, own

    def _describe(self) -> str:
        train, shape = self.config.train, " x ".join(f"{n} {k}" for k, n in self.mesh.shape.items())
        return (
            f"model: {self.config.model.name}, {self.flops.total_params / 1e6:,.1f} M parameters, "
            f"{self.flops.active_params / 1e6:,.1f} M active; {self.mesh.world.size} rank(s) = {shape}, "
            f"{self.trainable.micro_batches} micro-batch(es) of {train.micro_batch_size}, {train.dtype} on {self.device.type}\n"
            f"optimizer: {self.optimizer.description}; {len(self.trainable.program)} stages a step; "
            f"peak for MFU {self.peak / 1e12:,.2f} TFLOP/s a rank"
        )
