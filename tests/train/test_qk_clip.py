"""QK-clip brings each head's largest logit to the threshold, and leaves heads below it alone; of every kind of attention."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.config import OptimConfig
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.verify.shrink import shrink
from megalina.verify.start import random_batches
from tests.verify.cases import config_with

LATENT: dict[str, Any] = {
    "attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "grouped": {"num_heads": 8, "num_kv_heads": 4, "attention_bias": "qkv"},
    "windows, sinks": {"attention_sinks": True, "window": 3, "full_attention_every": 2},
    "latent": LATENT,
    "latent, compressed queries, ahead": {**LATENT, "q_lora_rank": 10, "mtp_layers": 2},
    "ahead": {"mtp_layers": 1},
}


def step(trainable: Trainable, batch: Batch, limit: float) -> Tensor:
    """[layers, groups]: the largest logits that a step sees whose update moves nothing but by clipping."""
    optimizer = BucketOptimizer(OptimConfig(name="muon_clip", qk_clip_alpha=0.3, qk_clip=limit), trainable.buckets)
    optimizer.lr = 0.0
    result = trainable.step(batch, optimizer.update, directions=optimizer)
    assert result.head_logits is not None and result.max_logit == result.head_logits.max()
    return result.head_logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layers_largest_logits_become_the_threshold(kind: str) -> None:
    """What further layers read has changed by then."""
    base = config_with()
    config = replace(base, model=replace(base.model, **KINDS[kind]), optim=OptimConfig(name="muon_clip"))
    config = shrink(config, 1)
    rows = config.model.vocab_size
    trainable = Trainable(config, build_mesh(), vocab_size=rows, device=torch.device("cpu"), wish_to_stop=lambda: False)
    (batch,) = random_batches(config, 1)
    before_LG = step(trainable, batch, 1e6)
    assert before_LG.shape == (len(trainable.gpt.layers), config.model.num_kv_heads)
    limit = before_LG[0].sort().values[1].item()  # two groups of four are above it
    assert torch.equal(step(trainable, batch, limit), before_LG)  # seen before the update
    after_LG = step(trainable, batch, 1e6)
    torch.testing.assert_close(after_LG[0], before_LG[0].clamp(max=limit), rtol=1e-12, atol=0)
    assert (before_LG[0] > limit).sum() == 2
