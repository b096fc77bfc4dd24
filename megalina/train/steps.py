"""The steps of a run: everything that one training step needs and changes, and the step itself."""

from pathlib import Path

import torch

from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.data.source import TokenData
from megalina.mesh import build_mesh
from megalina.parallel.functions import Verdict
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.doctor import Doctor
from megalina.train.ledger import Ledger, Line, RandomState, line_of
from megalina.train.load_watch import LoadWatch
from megalina.train.run_state import RunState
from megalina.train.sample_windows import after
from megalina.train.schedule import learning_rate
from megalina.train.spike_guard import SpikeGuard
from megalina.train.stop import StopWish


class Steps:
    """Data, program, optimizer, guard and state.  It logs nothing and saves nothing."""

    batch: Batch  # this rank's part of the last step

    def __init__(self, config: PretrainConfig, data: TokenData, *, device: torch.device):
        self.config, self.data, self.device = config, data, device
        self.mesh = build_mesh(tp=config.parallel.tp, ep=config.parallel.ep, timeout_s=config.cluster.timeout_s)
        self.is_first = self.mesh.world.rank == 0
        wish = StopWish(max_minutes=config.train.max_minutes if self.is_first else 0.0)  # one clock decides
        vocab_size = config.model.vocab_size or data.vocab_size  # the model may have more than the tokenizer
        guard = SpikeGuard(config.guard)
        self.doctor = Doctor(
            self.mesh.log,
            world=self.mesh.world.size,
            rank=self.mesh.world.rank,
            timeout_s=config.hang.timeout_s,
            folder=Path(config.run.dir) / "logs",
        )
        self.trainable = Trainable(
            config,
            self.mesh,
            vocab_size=vocab_size,
            device=device,
            wish_to_stop=wish,
            is_spike=guard.is_spike,
            explain=self.doctor.explain,
        )
        self.optimizer = BucketOptimizer(config.optim, self.trainable.buckets)
        self.watch = LoadWatch(len(self.trainable.gpt.moe_layers), config.model.num_experts)
        self.state = RunState(
            config, self.mesh, self.trainable, self.optimizer, self.watch, guard, Ledger(), tokenizer_path=data.tokenizer_path
        )
        own = config.train.global_batch_size // self.mesh.dp.size  # this rank's sequences of a step
        self.first_sample, self.own_samples = self.mesh.dp.rank * own, own

    def compute(self, step: int) -> tuple[Verdict, Line]:
        """One step, with its entry in the ledger; nothing is logged or saved."""
        train, state = self.config.train, self.state
        self.mesh.log.position.step = step
        self.optimizer.lr = learning_rate(
            self.config.schedule,
            peak=self.config.optim.lr,
            step=step,
            total_steps=train.steps,
            tokens_per_step=train.global_batch_size * train.seq_len,
        )
        first = after(state.consumed_samples, train.global_batch_size, state.windows)
        self.batch = self.data.train.batch(first + self.first_sample, self.own_samples).to(self.device)
        random = RandomState()
        verdict = self.trainable.step(self.batch, self.optimizer.update)
        state.step, state.tokens = step, state.tokens + verdict.loss_tokens
        state.consumed_samples = first + train.global_batch_size
        if verdict.updates:
            state.guard.accept(verdict.loss)
            if self.config.guard.spike == "skip":
                state.spikes = 0
            for layer, load in zip(self.trainable.gpt.moe_layers, verdict.loads, strict=True):
                router = self.trainable.gpt.layers[layer].router
                if router.bias_E is not None:
                    router.update_bias(load[:-1].to(self.device))
        else:
            state.skipped_steps += 1
        digest = random.digest(seed=train.seed, first_sample=first)
        line = line_of(verdict, step=step, first_sample=first, count=train.global_batch_size, random=digest)
        if train.ledger:
            state.ledger.add(line)
        return verdict, line
