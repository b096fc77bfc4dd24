"""The state of a run: all that a checkpoint holds, and the way back from one.

Tensors are saved whole, whatever the layout: weights, optimizer moments, master weights, routers' state.  Everything
random is a function of the seed and of how many sequences were consumed, so these two numbers are the state of the data
and of all random numbers.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megalina.checkpoint.checkpoints import Checkpoints
from megalina.checkpoint.files import MODEL, SaveFailed
from megalina.checkpoint.profile import PROFILE
from megalina.comm.slice import Slice
from megalina.config import PretrainConfig
from megalina.mesh import Mesh
from megalina.model.init import local_shape, spec_of
from megalina.parallel.reshard import move
from megalina.parallel.trainable import Trainable
from megalina.placement.routing_trace import write_trace
from megalina.rank_files import Unsaved
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.built import Built
from megalina.train.guard import LoadWatch, SpikeGuard
from megalina.train.ledger import Ledger
from megalina.train.rebalancing import Rebalancing
from megalina.train.run_profile import RunProfile
from megalina.train.sample_windows import Window, pairs

logger = logging.getLogger("megalina")


class RunState:
    """Knows the step and writes or reads everything else where it lives."""

    def __init__(self, config: PretrainConfig, built: Built, guard: SpikeGuard, *, tokenizer_path: str):
        self.config, self.built, self.guard, self.tokenizer_path = config, built, guard, tokenizer_path
        self.watch = LoadWatch(len(built.trainable.gpt.moe_layers), config.model.num_experts)
        self.ledger = Ledger()
        self.rebalancing = Rebalancing(built, self.tensors, interval=config.parallel.rebalance_interval)
        self.profile = RunProfile(config.profile, ranks=built.mesh.world.size // built.mesh.pp)
        self.step = 0
        self.consumed_samples = 0  # sequences: where the data goes on
        self.tokens = 0  # positions with a loss, so far
        self.skipped_steps = 0
        self.rewinds = 0
        self.spikes = 0  # in a row; with guard.spike=rewind since the last save
        self.windows: list[Window] = pairs(config.data.skip_samples)  # sequences to pass over
        self.failed_saves = 0
        self.saved_step = -1  # of the last save that was begun and has not failed
        self.val_loss: float | None = None
        self.searches = 0  # for a plan, that have come to an end
        options = config.checkpoint
        self.checkpoints = Checkpoints(
            Path(config.run.dir) / "checkpoints",
            built.mesh,
            keep_last=options.keep_last,
            keep_every=options.keep_every,
            asynchronous=options.async_save,
        )

    def save(self) -> None:
        """Write a checkpoint of this step; all ranks together.  One that fails is counted, and the run goes on.

        CollectivesDiffer, on all ranks, where they have mixed up collectives since the last comparison."""
        trainable = self.built.trainable
        trainable.settle()
        trainable.compare_collectives()
        values = {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "tokens": self.tokens,
            "optimizer_steps": self.built.optimizer.step_count,
            "skipped_steps": self.skipped_steps,
            "val_loss": self.val_loss,
            "last_step_of_experts": self.watch.state(),
            "vocab_size": trainable.gpt.vocab_size,
            "tokenizer_path": self.tokenizer_path,
            "rewinds": self.rewinds,
            "skipped_samples": self.windows,
            "guard_losses": self.guard.state(),
            "profile": self.profile.state(),
            "plan": {"now": trainable.plan.as_json(), "searches": self.searches},
            "ledger": self.ledger.lines(),
            "ledger_saved_lines": self.ledger.saved_lines,
            "arithmetic": self.arithmetic(),
            "rebalancing": self.rebalancing.state(),
            "config": asdict(self.config),
        }
        self.saved_step = self.step
        trace = self.profile.trace(self.built.mesh, trainable.gpt, model_name=self.config.model.name)
        beside = None if trace is None else lambda folder: write_trace(folder / PROFILE, trace)
        self._try(lambda: self.checkpoints.save(self.step, self.tensors(), values, beside=beside))
        self.ledger.saved()
        if self.config.guard.spike == "rewind":
            self.spikes = 0

    def wait(self) -> None:
        """Until an asynchronous save is done."""
        self._try(self.checkpoints.wait)

    def close(self) -> None:
        """The last save must succeed: it is tried once more.  Unsaved, on all ranks, where it can't be."""
        self.wait()
        if self.saved_step != self.step:
            self.save()
            self.wait()
        if self.saved_step != self.step:
            raise Unsaved(
                f"the state after step {self.step} could not be saved in {self.config.run.dir}/checkpoints (see the warnings): "
                "make room on the disk and run the same command again; it goes on from the newest checkpoint that is there"
            )

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except SaveFailed as error:
            self.failed_saves += 1
            self.saved_step = -1
            if self.built.mesh.world.rank == 0:
                logger.warning("warning: %s; older checkpoints are kept, the run goes on", error)

    def arithmetic(self) -> dict[str, Any]:
        """What rounding depends on: where all of it is equal, two runs are equal to the last bit."""
        train, device = self.config.train, self.built.trainable.gpt.device
        return {
            "mesh": self.built.mesh.unpacked | self.built.mesh.pipeline,  # each line of the ledger has its plan
            "parallel": asdict(self.config.parallel),
            "strategy": asdict(self.config.strategy),
            "batch": [train.global_batch_size, train.micro_batch_size],
            "recompute": train.recompute,
            "dtype": train.dtype,
            "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def move_to(self, mesh: Mesh, trainable: Trainable, optimizer: BucketOptimizer) -> int:
        """Go on with these, which get the state of the present ones; returns the bytes that this rank has sent.

        All ranks together, between two steps; nothing on disk is touched."""
        built = self.built
        before, tensors = built.mesh, self.tensors()
        optimizer.step_count, optimizer.lr = built.optimizer.step_count, built.optimizer.lr
        built.become(mesh, trainable, optimizer)
        self.checkpoints.use(mesh)
        return move(tensors, before, self.tensors(), mesh, trainable.log)

    def tensors(self) -> dict[str, Sequence[Slice]]:
        """This rank's part of all that is saved, as views."""
        return self._model() | self.built.optimizer.slices()

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, of any layout of the same model."""
        values = self.checkpoints.load(path, self.tensors())
        self.built.optimizer.step_count = values["optimizer_steps"]
        self.step, self.consumed_samples = values["step"], values["consumed_samples"]
        self.tokens, self.skipped_steps = values["tokens"], values["skipped_steps"]
        self.rewinds, self.val_loss, self.saved_step = values["rewinds"], values["val_loss"], values["step"]
        known = {*self.windows, *((first, stop) for first, stop in values["skipped_samples"])}
        self.windows = sorted(known)
        self.guard.load(values["guard_losses"])
        if "profile" in values:  # older checkpoints know of none
            self.profile.load(values["profile"])
        self.ledger.load(values["ledger"], values["ledger_saved_lines"])
        self.watch.load(values["last_step_of_experts"])
        self.rebalancing.load(values.get("rebalancing", {}))

    def load_weights(self, path: Path) -> None:
        """Only the weights and router biases; step and optimizer stay as they are."""
        self.checkpoints.load(path, self._model(), prefix=MODEL)
        self.built.optimizer.masters_from_parameters()

    def _model(self) -> dict[str, Sequence[Slice]]:
        """This rank's part of the model's state, as views."""
        gpt = self.built.trainable.gpt
        out: dict[str, Sequence[Slice]] = {}
        for name, p in gpt.named_parameters():
            spec = spec_of(p)
            length = {0: spec.rows} if spec.rows else {}  # the vocabulary's padding depends on tp
            out[MODEL + name] = [Slice(p.detach().view(local_shape(p)), spec.sharded, order=spec.order, length=length)]
        return out | {MODEL + name: [Slice(value, {})] for name, value in gpt.router_state().items()}
