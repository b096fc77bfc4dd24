"""Bytes of tokens: what the collectives were given, by who sits where, summed over all ranks in every step."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalina.config import ModelConfig, ParallelConfig, PretrainConfig, RouterConfig, StrategyConfig, TrainConfig
from megalina.mesh import Axis, build_mesh
from megalina.parallel.token_bytes import TokenBytes
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import random_batch

MODEL = ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=4, num_experts=8, d_ff=16, vocab_size=300)


def test_neighbours_and_others_are_told_apart() -> None:
    counted = TokenBytes(2)
    counted.add(Axis("ep", (4, 5, 6, 7), rank=1), [1, 10, 100, 1000], row_bytes=8)
    counted.add(Axis("ep", (5, 7), rank=0), [10_000, 100_000], row_bytes=1)
    assert counted.take() == (8 * 1100 + 100_000, 8)
    assert counted.take() == (0, 0)


CAPACITY = RouterConfig(capacity_factor=1.0)
DENSE = RouterConfig(kind="dense", balance_loss=0.0, renormalize=False)


def trained(strategy: StrategyConfig, ranks_per_node: int, router: RouterConfig = CAPACITY) -> list[tuple[int, int, int, int]]:
    """Of each of two steps: what the result says, and what this rank gave to all-to-alls of rows."""
    given: list[tuple[int, int]] = []
    send = dist.all_to_all_single

    def watched(out: torch.Tensor, x: torch.Tensor, receive: Any = None, sent: Any = None, **named: Any) -> Any:
        if x.dtype.is_floating_point and sent is not None:
            me, ranks = dist.get_rank(), dist.get_process_group_ranks(named["group"])
            for rank, rows in zip(ranks, sent, strict=True):
                if rank != me:
                    given.append((rank // ranks_per_node != me // ranks_per_node, rows * x[:1].nbytes if len(x) else 0))
        return send(out, x, receive, sent, **named)

    dist.all_to_all_single = watched
    mesh = build_mesh(ep=4)
    config = PretrainConfig(
        model=MODEL, router=router, parallel=ParallelConfig(ep=4), strategy=strategy,
        train=TrainConfig(global_batch_size=8, micro_batch_size=2, seq_len=16),
    )  # fmt: skip
    trainable = Trainable(
        config, mesh, vocab_size=300, device=torch.device("cpu"), wish_to_stop=lambda: False, ranks_per_node=ranks_per_node
    )
    update = BucketOptimizer(config.optim, trainable.buckets).update
    out = []
    for step in range(2):
        given.clear()
        trainable.evaluate(random_batch(2))  # which is no step
        given.clear()
        result = trainable.step(random_batch(2, first=2 * mesh.world.rank + 8 * step), update)
        own = [sum(size for between, size in given if between == way) for way in (True, False)]
        out.append((result.token_bytes_between_nodes, result.token_bytes_within_nodes, *own))
    trainable.close()
    return out


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "strategy", [StrategyConfig(), StrategyConfig(name="flow", parts=2, chunks="2")], ids=lambda strategy: strategy.name
)
def test_they_are_what_the_collectives_were_given(strategy: StrategyConfig) -> None:
    ranks = run_on_ranks(4, trained, strategy, 2)
    for steps in zip(*ranks, strict=True):
        assert len({step[:2] for step in steps}) == 1  # all ranks know the sum
        between, within, *_ = steps[0]
        assert (between, within) == (sum(step[2] for step in steps), sum(step[3] for step in steps))
        assert between > within > 0  # two of three others sit elsewhere


def test_tokens_that_all_experts_get_count_as_sent_to_each_rank() -> None:
    """By hand: a token and its weights to each of three others, and a part of its sum back from each; forward and backward."""
    found = run_on_ranks(4, trained, StrategyConfig(name="flow", parts=2, chunks="2"), 2, DENSE)[0]
    tokens, numbers = 8 * 16, MODEL.d_model + MODEL.d_model + MODEL.num_experts
    sent = MODEL.num_layers * 2 * tokens * numbers * 4
    assert [(between, within) for between, within, *_ in found] == [(2 * sent, sent)] * 2
