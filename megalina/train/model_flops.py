"""The FLOPs of a model and of the device it runs on, from which model FLOPs utilisation (MFU) follows."""

from dataclasses import dataclass

import torch

from megalina.blocks.counts import count_parameters, training_flops_per_token
from megalina.config import ModelConfig, RouterConfig
from megalina.train.throughput import measure_matmul_flops, published_peak_flops


@dataclass(frozen=True, slots=True)
class ModelFlops:
    total_params: int
    active_params: int  # used for one token, embeddings included, as model cards count it
    per_token: float  # FLOPs of forward and backward


def model_flops(model: ModelConfig, router: RouterConfig, *, vocab_size: int, seq_len: int) -> ModelFlops:
    """Counts of a model whose vocabulary isn't padded."""
    counts = count_parameters(model, router, vocab_size=vocab_size, seq_len=seq_len)
    per_token = training_flops_per_token(model, router, vocab_size=vocab_size, seq_len=seq_len)
    return ModelFlops(counts.total, counts.active, per_token)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one rank's device: the published dense peak of a GPU, or the best matmul rate measured here and now."""
    if device.type == "cuda":
        published = published_peak_flops(torch.cuda.get_device_name(device), dtype)
        if published is not None:
            return published
    return measure_matmul_flops(device, dtype)
