"""Which sequences a rank takes: each of a global batch once, at home where nodes are as many; and no layout changes a loss."""

import os
from pathlib import Path
from typing import Any

import pytest

from megalina.config import ParallelConfig, PretrainConfig, RouterConfig, TrainConfig
from megalina.train.own_samples import OwnSamples, at_home, own_samples
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import config_of, records_of, write_tokens


def config(nodes: int, *, tp: int = 1, cp: int = 1, batch: int = 16) -> PretrainConfig:
    return PretrainConfig(
        router=RouterConfig(locality_nodes=nodes),
        parallel=ParallelConfig(tp=tp, cp=cp),
        train=TrainConfig(global_batch_size=batch),
    )


@pytest.mark.parametrize(
    ("world", "tp", "cp", "nodes"),
    [(1, 1, 1, 0), (4, 1, 1, 0), (4, 1, 1, 2), (8, 2, 1, 2), (8, 1, 1, 4), (6, 1, 1, 3), (8, 1, 2, 2), (8, 2, 2, 0)],
)
@pytest.mark.parametrize("first", [0, 7, 48])
def test_each_sequence_is_taken_once_and_at_home(world: int, tp: int, cp: int, nodes: int, first: int) -> None:
    """By all ranks of tp and cp."""
    own = config(nodes, tp=tp, cp=cp, batch=24)
    per_node = world // max(nodes, 1)
    taken = []
    for rank in range(0, world, tp * cp):
        found = own_samples(own, world=world, rank=rank, ranks_per_node=per_node)
        alike = [own_samples(own, world=world, rank=r, ranks_per_node=per_node) for r in range(rank, rank + tp * cp)]
        assert set(alike) == {found}
        samples = [found.first(first) + i * found.stride for i in range(found.count)]
        assert len(samples) == 24 * tp * cp // world
        if nodes > 1:
            assert {s % nodes for s in samples} == {rank // per_node}
        taken += samples
    assert sorted(taken) == list(range(first, first + 24))


def test_elsewhere_neighbours_are_taken() -> None:
    assert own_samples(config(2), world=4, rank=3, ranks_per_node=4) == OwnSamples(4, 1, 0, 3)  # one node
    assert not at_home(config(2, batch=15), world=4, ranks_per_node=2)  # homes of unequal numbers of sequences
    assert not at_home(config(2, tp=4), world=8, ranks_per_node=2)  # a tp group on two nodes
    assert at_home(config(2), world=4, ranks_per_node=2)


def run(folder: Path, name: str, ranks_per_node: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    local = {"dtype": "float64", "locality_loss": 0.1, "locality_nodes": 2, "steps": 4}
    return records_of(config_of(folder, name, **local, **settings)).records


@pytest.mark.full
def test_no_layout_changes_a_loss_and_bytes_are_of_nodes(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    (one,) = run_on_ranks(1, run, tmp_path, "one", 1, {})
    (two_nodes, *_) = run_on_ranks(4, run, tmp_path, "two", 2, {"ep": 4})
    (one_node, *_) = run_on_ranks(4, run, tmp_path, "four", 4, {"ep": 4})
    for key in ("loss", "locality_loss", "aux_loss", "grad_norm"):
        for found in (two_nodes, one_node):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in one], rel=1e-12)
    assert all(r["locality_loss"] > 0 for r in one)
    assert [r["token_bytes_between_nodes"] for r in one_node] == [0] * 4
    assert all(r["token_bytes_between_nodes"] > 0 and r["token_bytes_within_nodes"] > 0 for r in two_nodes)
