"""A training step in one of torch's pipelines on this rank: its schedule, its split backward, its messages on gloo, all torch's.

An emulated device takes as long for attention and experts as for these instructions in a list of ours, from when their real math
begins; what stands between them takes what it takes here, on both sides.  A cell of weights' gradients alone is walked by torch
as a whole, and takes its time so.  What is sent leaves when the device has it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import get_schedule_class

from benchmarks.pipelining.cells import CELL, cell_seconds
from benchmarks.pipelining.tables import Kind
from benchmarks.pipelining.torch_model import Sections, Stage
from megalina.batch import Batch
from megalina.blocks.pipelined import pipelined
from megalina.comm.links import urgent_meanwhile
from megalina.config import PretrainConfig
from megalina.parallel.emulated_device import EmulatedDevice
from megalina.parallel.trainable import DTYPES
from megalina.step.program import Instruction
from megalina.step.program import Kind as InstructionKind

NO_LABEL = -100  # torch's cross entropy leaves it out


class TimedStage(PipelineStage):
    """A stage whose layers take the time of an emulated device."""

    sections: Sections | None = None

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """The first stage does nothing for its inputs, and all of its backward with its weights: so torch does it."""
        if self.sections is not None:
            self.sections.late = not full_backward
        super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        began_s = time.perf_counter()
        if self.sections is not None:
            self.sections.late, self.sections.counts = False, self.is_first
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        if self.sections is not None and not self.is_first:
            weights = Instruction("W", InstructionKind.COMPUTE, CELL, self.stage_index)
            self.sections.device.ran(weights, began_s, time.perf_counter())
            self.sections.counts = True

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        self._until_ready()
        return super().get_fwd_send_ops(fwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        self._until_ready()
        return super().get_bwd_send_ops(bwd_chunk_id)

    def _until_ready(self) -> None:
        if self.sections is not None:
            self.sections.device.synchronize()


class TorchPipeline:
    """One of torch's schedules, ready to train.  `weights`: of the whole model, by the GPT's names, which are copied.  Weights
    move as plain gradient descent moves them.  All ranks of the world make it together."""

    def __init__(
        self, config: PretrainConfig, kind: Kind, weights: Mapping[str, Tensor], *, vocab_size: int, late_receives: bool = False
    ):
        rank, train = dist.get_rank(), config.train
        job = pipelined(config, dist.get_world_size(), vocab_size=vocab_size)
        own, last = job.pipeline.stages_of(rank), job.pipeline.stages - 1
        seconds = cell_seconds(config, {number: stage.layers for number, stage in enumerate(job.stages)})
        self.device = None if seconds is None else EmulatedDevice(seconds)
        sections = None if self.device is None else Sections(self.device)
        self.modules = {number: Stage(config, weights, job.stages[number], sections) for number in own}
        self.micro_batches = train.global_batch_size // train.micro_batch_size
        self.is_first, self.is_last, self.lr = 0 in own, last in own, config.optim.lr
        self._divisor = 1.0
        words_BS = torch.zeros(train.micro_batch_size, train.seq_len, dtype=torch.int64)
        dtype, tokens = DTYPES[train.dtype], words_BS.numel()
        stream_TD = torch.zeros(tokens, config.model.d_model, dtype=dtype, requires_grad=True)
        logits_TV = torch.zeros(tokens, config.model.vocab_size, dtype=dtype, requires_grad=True)
        stages = []
        for number, module in self.modules.items():
            stage = TimedStage(
                module,
                number,
                last + 1,
                torch.device("cpu"),
                input_args=words_BS if number == 0 else stream_TD,
                output_args=logits_TV if number == last else stream_TD,
            )
            stage.sections = sections
            stages.append(stage)
        given = {"n_microbatches": self.micro_batches, "loss_fn": self._loss, "scale_grads": False}
        if late_receives:
            given["defer_pp_recv"] = True
        self.schedule = get_schedule_class(kind.name)(stages if kind.chunks > 1 else stages[0], **given)

    def gradients(self, batch: Batch) -> float:
        """Those of a global batch, in the parameters; returns this rank's part of the loss.  All ranks call it together."""
        for module in self.modules.values():
            module.zero_grad(set_to_none=True)
        self._divisor = float(batch.loss_mask_BS.sum())
        losses: list[Tensor] = []
        words = (batch.tokens_BS,) if self.is_first else ()
        last = {"target": batch.labels_BS.where(batch.loss_mask_BS, NO_LABEL), "losses": losses} if self.is_last else {}
        self.schedule.step(*words, return_outputs=False, **last)
        if self.device is not None:
            self.device.synchronize()
        return float(torch.stack(losses).detach().sum()) if losses else 0.0

    def step(self, batch: Batch) -> tuple[float, float]:
        """A training step: loss, and how long this rank stood still for messages, s.  The norm is summed as in a step of ours,
        with the loss."""
        with urgent_messages() if self.device is not None else nullcontext(), watched_waits(self.device) as waited_s:
            loss = self.gradients(batch)
        parameters: list[Tensor] = [p for module in self.modules.values() for p in module.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters), "a parameter has no gradient"
        squares = float(torch.stack(torch._foreach_norm(gradients)).double().square().sum())
        sums = torch.tensor([loss, squares], dtype=torch.float64)
        dist.all_reduce(sums)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-self.lr)
        return float(sums[0]), sum(waited_s)

    def _loss(self, logits_TV: Tensor, labels_BS: Tensor) -> Tensor:
        return F.cross_entropy(logits_TV, labels_BS.flatten(), ignore_index=NO_LABEL, reduction="sum") / self._divisor


@contextmanager
def urgent_messages() -> Iterator[None]:
    """Torch's schedules hand messages to gloo as our links do (`megalina/comm/links.py`)."""
    batch = schedules._batch_p2p

    def urgently(*args: Any, **kwargs: Any) -> list[dist.Work]:
        with urgent_meanwhile():
            return list(batch(*args, **kwargs))

    schedules._batch_p2p = urgently
    try:
        yield
    finally:
        schedules._batch_p2p = batch


@contextmanager
def watched_waits(device: EmulatedDevice | None) -> Iterator[list[float]]:
    """How long each wait of torch's schedules for messages lasts; on an emulated device from when that is free."""
    seconds: list[float] = []
    wait = schedules._wait_batch_p2p

    def watched(work: list[dist.Work]) -> None:
        began_s = time.perf_counter()
        wait(work)
        since_s = began_s if device is None else max(began_s, device.free_s)
        seconds.append(max(0.0, time.perf_counter() - since_s))

    schedules._wait_batch_p2p = watched
    try:
        yield seconds
    finally:
        schedules._wait_batch_p2p = wait
