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

from megalina.blocks.counts import model_flops
from megalina.changed_settings import as_json, change_line, changes
from megalina.checkpoint.files import newest_checkpoint, read_values
from megalina.config import PretrainConfig
from megalina.console import StatusLine
from megalina.data.source import TokenData, open_data
from megalina.parallel.plan_file import PLAN_FILE, write_plan
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import DTYPES
from megalina.rank_files import Unsaved
from megalina.track.progress import Progress
from megalina.track.tracker import Tracker, open_trackers
from megalina.train import flight_recorder
from megalina.train.finalize import close_run
from megalina.train.guard import DeadModel
from megalina.train.recovery import meet_spike, name_non_finite, saved_before
from megalina.train.replay import replay
from megalina.train.resume import agreed_resume_point, resume_point
from megalina.train.step_runner import StepRunner
from megalina.train.task_scores import TaskScores
from megalina.train.throughput import mfu, peak_flops, peak_memory_bytes
from megalina.train.timing import Timing, emulation_note

logger = logging.getLogger("megalina")
WARM_UP_STEPS = 3  # the first steps of a process are left out of the median speed


def train(config: PretrainConfig) -> dict[str, Any]:
    """Train, from the first step or from a checkpoint; returns the run's summary, the same on all ranks.

    torchrun's environment variables say which rank this is (none: a single process).  Unsaved, on all ranks, where the last
    state could not be saved: the report is written nevertheless.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if config.train.deterministic:
        make_deterministic()
    device = choose_device(config.launch.device)
    line = StatusLine()
    show = line.show if rank == 0 else lambda text: None
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    tracker = None
    expected = None
    if rank == 0:  # before the first collective, so that a slow tracker keeps nobody waiting inside one
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        expected = resume_point(config)
        resumed_step = read_values(expected)["step"] if expected else 0
        show("opening metrics.jsonl, W&B and TensorBoard ...")
        tracker = open_trackers(config.tracker, run_dir=Path(config.run.dir), config=asdict(config), resumed_step=resumed_step)
    failed, trainer, unsaved = True, None, None
    try:
        if device.type == "cuda":
            flight_recorder.prepare(os.environ, Path(config.run.dir) / "logs")
        if world > 1:
            show(f"waiting for {world} ranks ...")
            timeout = timedelta(seconds=config.cluster.timeout_s)
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store keeps the addresses of lost ranks
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"attempt_{attempt}", store),
                rank=rank,
                world_size=world,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        show("building the model ...")
        trainer = Trainer(config, data, device=device, tracker=tracker)
        line.end()
        doctor = trainer.runner.doctor
        doctor.start()
        try:
            start = agreed_resume_point(config, trainer.state.checkpoints)
            trainer.begin(start)
            if tracker is not None and start != expected:  # a file of tensors is damaged
                tracker.rewind(trainer.state.step)
            trainer.loop()
        except Unsaved as error:  # which all ranks have agreed upon
            unsaved = error
        except Exception as error:
            error.add_note(f"rank {rank} of {world}, in step {trainer.state.step + 1}")
            doctor.stop(error)
            raise
        summary = trainer.close()
        trainer.runner.close()
        failed = unsaved is not None
    finally:
        line.end()
        if tracker is not None:
            tracker.finish(failed=failed)
        if trainer is not None:
            trainer.runner.doctor.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    if unsaved is not None:
        raise unsaved
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


class Trainer:
    """One run: its steps, and between them validation, checkpoints, metrics."""

    def __init__(self, config: PretrainConfig, data: TokenData, *, device: torch.device, tracker: Tracker | None):
        self.config, self.device, self.tracker = config, device, tracker
        self.runner = StepRunner(config, data, device=device)
        self.data = self.runner.data
        self.built, self.state = self.runner.built, self.runner.state
        self.timing = Timing(config, self.built)
        vocab_size = self.built.trainable.gpt.vocab_size
        self.flops = model_flops(config.model, config.router, vocab_size=vocab_size, seq_len=config.train.seq_len)
        self.peak = config.cluster.peak_tflops * 1e12 or peak_flops(device, DTYPES[config.train.dtype])
        self._tasks = TaskScores(config, data, self.built.mesh) if config.eval.interval else None
        self._task_scores: dict[str, float] = {}  # the newest
        self._dead_model = DeadModel(vocab_size)
        self._step_s: list[float] = []
        self._record: dict[str, Any] = {}
        self._changed: dict[int, dict[str, Any]] = {}  # what the first step of this start says of it, by its number

    def begin(self, start: Path | None) -> None:
        """Take the state of the checkpoint `start`, or the weights of `train.init_from`."""
        if start is not None and self.config.train.resume == "verify":
            step = read_values(start)["step"]
            replay(self.runner, start, self.state.checkpoints.first_good(saved_before(start.parent, step)))
        elif start is not None:
            self.state.load(start)
        elif self.config.train.init_from:
            self.state.load_weights(Path(self.config.train.init_from))
        if start is not None:
            self.runner.keep_plan(read_values(start))
        self.runner.check_known(last_step=self.last_step)
        if self.runner.is_first and self.config.train.ledger:
            self.state.ledger.open(Path(self.config.run.dir), self.state.step)
        if self.runner.is_first:
            logger.info("data: %s", self.data.description)
            logger.info("%s", self._describe())
            if self._tasks is not None:
                logger.info("%s", self._tasks.description)
            if start is not None:
                logger.info("resumed from %s after step %d", start, self.state.step)
        if start is not None and (pairs := as_json(changes(read_values(start)["config"], self.config))):
            self._changed = {self.state.step + 1: {"changed_settings": pairs}}
            if self.runner.is_first:
                logger.info("%s", change_line(self.state.step, pairs))

    @property
    def last_step(self) -> int:
        """Of this start."""
        return min(self.config.train.exit_step or self.config.train.steps, self.config.train.steps)

    def loop(self) -> None:
        """Steps until the end, `train.exit_step`, or a wish to stop."""
        train, state, runner = self.config.train, self.state, self.runner
        last_step = self.last_step
        interval = self.config.checkpoint.interval
        progress = Progress(train.steps, state.step, self.config.tracker.progress if self.runner.is_first else "none")
        with progress:
            while state.step < last_step:
                step = state.step + 1
                recorder = self.timing.recorder(step)
                started_s = time.perf_counter()
                result, _ = runner.compute(step, record=recorder)
                step_s = time.perf_counter() - started_s
                contention = self.timing.after(step, recorder)
                if result.spike and meet_spike(runner, result, state.consumed_samples, self.tracker):
                    continue
                if not result.finite:
                    name_non_finite(runner, result)
                self._step_s.append(step_s)
                record, stop = self._step_record(result, step_s) | contention, result.stop
                if step == train.steps or (train.eval_interval and step % train.eval_interval == 0):
                    state.val_loss = record["val_loss"] = self.validate()
                if self._tasks is not None and (step == train.steps or step % self.config.eval.interval == 0):
                    self._task_scores = self._tasks.record(self.built.trainable, self.device)
                    record |= self._task_scores
                if self.tracker is not None:
                    self.tracker.log(record)
                progress.update(record)
                self._record = record
                if stop or step == last_step or (interval and step % interval == 0):
                    state.save()
                if stop:
                    if self.runner.is_first:
                        logger.info("stopped after step %d as asked; the same command goes on from there", step)
                    break
                searches = state.searches
                runner.adapt(step_s)
                if runner.is_first and state.searches > searches:
                    self._write_plan()
        if state.saved_step >= 0 or state.failed_saves:
            state.close()

    def _write_plan(self) -> None:
        """What a search has found, for other runs."""
        folder, world = Path(self.config.run.dir), self.built.mesh.world.size
        write_plan(folder / PLAN_FILE, self.config, world, self.built.trainable.plan, evidence=self.runner.evidence)

    def validate(self) -> float | None:
        """Mean loss in nats over the first `train.eval_sequences` of the validation text; None without such text."""
        valid, train, mesh = self.data.valid, self.config.train, self.built.mesh
        if valid is None:
            return None
        total = torch.zeros(2, dtype=torch.float64)
        count = min(train.eval_sequences, valid.num_sequences)
        for first in range(0, count, train.micro_batch_size * mesh.readers):
            own = first + mesh.reader * train.micro_batch_size
            batch = valid.batch(own, train.micro_batch_size)
            beyond = torch.arange(own, own + train.micro_batch_size) >= count  # all ranks take part to the end
            nothing = batch.valid_BS & ~beyond.unsqueeze(1)
            batch = replace(batch, loss_mask_BS=batch.loss_mask_BS & nothing, valid_BS=nothing)
            total += self.built.trainable.evaluate(batch.to(self.device)).cpu()
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
            "rewinds": state.rewinds,
            "failed_saves": state.failed_saves,
            "dead_experts": sum(self._record.get("dead_experts", [])),
            "dead_model": self._dead_model.dead,
            "total_params": self.flops.total_params,
            "active_params": self.flops.active_params,
            "peak_memory_gb": peak_memory_bytes(self.device) / 1e9,
            "emulation": emulation_note(self.built.trainable),
            **self._task_scores,
        }
        if self.runner.is_first and self._record:
            if missing := self.state.profile.missing(self.config.run.dir):
                logger.warning("warning: %s", missing)
            checkpoint = newest_checkpoint(Path(self.config.run.dir) / "checkpoints")
            close_run(self.config, self.data, checkpoint=checkpoint, summary=summary)
        return summary

    def _step_record(self, result: StepResult, step_s: float) -> dict[str, Any]:
        state = self.state
        tokens_per_s = self._tokens_per_s(step_s)
        load = self.state.watch.report(state.step, result.loads)
        layers, least = self.built.trainable.gpt.moe_layers, self.config.guard.min_entropy
        warnings = [
            *self._dead_model.warnings(result),
            *self.state.watch.warnings(load, moe_layers=layers, min_entropy=least),
        ]
        if self.runner.is_first:
            for line in warnings:
                logger.warning("warning: step %d: %s", state.step, line)
        return {
            "step": state.step,
            "consumed_samples": state.consumed_samples,
            "tokens": state.tokens,
            "loss": result.loss,
            "aux_loss": result.balance_loss,
            "z_loss": result.z_loss,
            **{name: mean for name, mean in result.auxiliary.items() if name not in ("balance_loss", "z_loss")},
            "grad_norm": result.grad_norm,
            **self._clipped_heads(result),
            **self._balance_of_ranks(result),
            "lr": self.built.optimizer.lr,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "step_s": step_s,
            "skipped_steps": state.skipped_steps,
            "rewinds": state.rewinds,
            "failed_saves": state.failed_saves,
            "token_bytes_between_nodes": result.token_bytes_between_nodes,
            "token_bytes_within_nodes": result.token_bytes_within_nodes,
            "memory_gb": peak_memory_bytes(self.device) / 1e9,
            **asdict(load),
            **self._changed.get(state.step, {}),
            **({"warnings": warnings} if warnings else {}),
        } | ({"plan": str(self.built.trainable.plan), "packing": self.built.mesh.packing} if self.runner.adapts else {})

    def _clipped_heads(self, result: StepResult) -> dict[str, float]:
        """With QK-clip: the largest attention logit, and the share of groups of heads on this rank that were clipped."""
        if result.head_logits is None or result.max_logit is None:
            return {}
        clipped = (result.head_logits > self.config.optim.qk_clip).double().mean().item()
        return {"max_logit": result.max_logit, "clipped_heads": clipped if result.updates else 0.0}

    def _balance_of_ranks(self, result: StepResult) -> dict[str, float]:
        """How evenly the step's rows were spread over ranks, and how many experts had moved before it, where they may."""
        rebalancing, moved = self.state.rebalancing, self.runner.moved
        if self.built.mesh.ep.size == 1:
            return {}
        if moved is not None and moved.experts and self.runner.is_first:
            logger.info("before step %d %s", self.state.step, moved)
        experts = {"moved_experts": 0 if moved is None else moved.experts} if rebalancing.interval else {}
        return {"rank_load_max_over_mean": rebalancing.fullest_over_mean(result.loads), **experts}

    def _tokens_per_s(self, step_s: float) -> float:
        return self.config.train.global_batch_size * self.config.train.seq_len / step_s

    def _mfu(self, tokens_per_s: float) -> float:
        per_token, devices = self.flops.per_token, self.built.mesh.world.size
        return mfu(tokens_per_s=tokens_per_s, flops_per_token=per_token, peak_flops=self.peak, num_devices=devices)

    def _describe(self) -> str:
        train, trainable, mesh = self.config.train, self.built.trainable, self.built.mesh
        shape = " x ".join(f"{n} {k}" for k, n in (mesh.pipeline | mesh.shape).items())
        note = emulation_note(trainable)
        return (
            f"model: {self.config.model.name}, {self.flops.total_params / 1e6:,.1f} M parameters, "
            f"{self.flops.active_params / 1e6:,.1f} M active; {mesh.world.size} rank(s) = {shape}, "
            f"{trainable.micro_batches} micro-batch(es) of {train.micro_batch_size}, {train.dtype} on {self.device.type}\n"
            f"optimizer: {self.built.optimizer.description}; {len(trainable.program)} instructions a step; "
            f"peak for MFU {self.peak / 1e12:,.2f} TFLOP/s a rank" + (f"; {note}" if note else "")
        )


def make_deterministic() -> None:
    """For `train.deterministic=true`, before the first CUDA call.  An operation that has no deterministic kernel then raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: NVIDIA's documentation, "Results reproducibility"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over every buffer
    torch.backends.cudnn.benchmark = False
