"""What the host needs for an instruction: a real training step whose tensors are next to nothing, on this rank alone.

It is run before there is a process group, so nothing waits for another rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.cost.stage_work import StageWork
from megalina.step.program import Kind
from megalina.train.bucket_optimizer import BucketOptimizer

VOCAB = 128
TOKENS = 8


@dataclass(frozen=True, slots=True)
class TinyStep:
    """`run` makes a step of so many instructions that compute, of so many kernels as the cost model counts them."""

    run: Callable[[], object]
    instructions: int
    kernels: float


def tiny_step(device: torch.device) -> TinyStep:
    config = PretrainConfig()
    model, train = config.model, config.train
    model.d_model, model.d_ff, model.num_heads, model.num_kv_heads, model.num_experts = 16, 8, 2, 2, 2
    model.num_layers, model.vocab_size = 4, VOCAB
    train.global_batch_size = train.micro_batch_size = 1
    train.seq_len = TOKENS
    trainable = Trainable(config, build_mesh(), vocab_size=VOCAB, device=device, wish_to_stop=lambda: False)
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    batch = _batch().to(device)
    buckets = {name: bucket.spec for name, bucket in trainable.buckets.items()}
    work = StageWork(config, world=1, vocab_rows=VOCAB, buckets=buckets)
    computed = [instruction for instruction in trainable.program if instruction.kind is Kind.COMPUTE]
    return TinyStep(
        lambda: trainable.step(batch, optimizer.update), len(computed), sum(work(instruction).kernels for instruction in computed)
    )


def _batch() -> Batch:
    tokens_BS = torch.arange(TOKENS).unsqueeze(0)  # and their positions
    true_BS = torch.ones(1, TOKENS, dtype=torch.bool)
    return Batch(tokens_BS, tokens_BS, true_BS, true_BS, tokens_BS, None, torch.zeros(1, dtype=torch.int64))
