"""Packings: which ones groups are made for, what they put on the wire, which ones are worth a trial."""

from typing import Any

import pytest

from megalina.blocks.counts import expert_bytes_on_rank
from megalina.config import ModelConfig, ParallelConfig, PretrainConfig, StrategyConfig, TrainConfig
from megalina.train.packing import allowed_packings, wire_bytes, worth_trying
from megalina.validate import check_config


def config_of(*, ep: int = 8, packing: str = "auto", memory_gb: float = 0.0, **other: Any) -> PretrainConfig:
    strategy = StrategyConfig(name="lina", packing=packing, packing_memory_gb=memory_gb)
    train = TrainConfig(global_batch_size=32, micro_batch_size=4, seq_len=64, dtype=other.pop("dtype", "float32"))
    model = ModelConfig(num_experts=8, num_layers=6, d_model=512, d_ff=other.pop("d_ff", 32), activation="gelu")
    return PretrainConfig(model=model, parallel=ParallelConfig(ep=ep, **other), strategy=strategy, train=train)


def test_groups_are_made_for_what_is_asked_for_and_fits() -> None:
    assert allowed_packings(config_of(), 8) == (1, 2, 4, 8)
    assert allowed_packings(config_of(ep=2), 8) == (1, 2)
    assert allowed_packings(config_of(ep=1), 8) == (1,)
    assert allowed_packings(config_of(packing="4"), 8) == (4,)
    two_gb = expert_bytes_on_rank(config_of(), 8, 2) / 1e9
    assert allowed_packings(config_of(memory_gb=two_gb), 8) == (1, 2)
    assert allowed_packings(config_of(memory_gb=two_gb * 0.999), 8) == (1,)


def test_the_bytes_of_packed_experts() -> None:
    params = 6 * (2 * 512 * 32)  # one expert in each of six layers: float32 weights, gradients, two moments
    assert expert_bytes_on_rank(config_of(), 8, 1) == 16 * params
    assert expert_bytes_on_rank(config_of(), 8, 4) == 4 * 16 * params
    assert expert_bytes_on_rank(config_of(zero=1), 8, 4) == 4 * (8 + 8 / 4) * params  # as many shards as replicas
    assert expert_bytes_on_rank(config_of(zero=1, tp=2, ep=4), 8, 1) == 2 * (8 + 8 / 2) * params
    assert expert_bytes_on_rank(config_of(dtype="bfloat16"), 8, 1) == (2 + 4 + 12) * params


def test_packing_inside_a_node_saves_the_wire_between_nodes_until_replicas_cost_more() -> None:
    """Four nodes of two ranks: tokens of packing 4 stay inside a node, but each expert has copies on four nodes."""
    rows_bytes = 4 * 6 * (32 * 64 / 8) * 2 * 512 * 4
    expert_bytes = 6 * 2 * 512 * 32 * 4
    found = {k: wire_bytes(config_of(), 8, k, ranks_per_node=2) for k in (1, 2, 4, 8)}
    assert found[1] == pytest.approx(rows_bytes * 6 / 8)
    assert found[2] == pytest.approx(rows_bytes * 2 / 4 + 2 * 1 / 2 * 2 * expert_bytes)
    assert found[4] == pytest.approx(2 * 3 / 4 * 4 * expert_bytes)
    assert found[8] == pytest.approx(2 * 7 / 8 * 8 * expert_bytes * 4 / 8)  # half of the ring's hops are inside a node
    assert found[4] < found[2] < found[1]
    large = {k: wire_bytes(config_of(d_ff=2048), 8, k, ranks_per_node=2) for k in (1, 4)}
    assert large[4] > 1.5 * large[1]
    on_one_node = {k: wire_bytes(config_of(), 8, k, ranks_per_node=8) for k in (1, 8)}
    assert on_one_node[1] == pytest.approx(rows_bytes * 7 / 8)
    assert on_one_node[8] == pytest.approx(2 * 7 / 8 * 8 * expert_bytes)


def test_what_puts_too_many_bytes_on_the_wire_is_not_tried() -> None:
    assert worth_trying(config_of(), 8, (1, 2, 4, 8), ranks_per_node=2) == (1, 2, 4, 8)
    assert worth_trying(config_of(d_ff=2048), 8, (1, 2, 4, 8), ranks_per_node=2) == (1,)
    assert worth_trying(config_of(d_ff=2048), 8, (4,), ranks_per_node=2) == (4,)


@pytest.mark.parametrize(
    ("strategy", "world", "says"),
    [
        ({"packing": "3"}, 8, r"strategy.packing \(3\) must divide parallel.ep \(8\)"),
        ({"packing": "16"}, 8, r"strategy.packing \(16\) must divide parallel.ep \(8\)"),
        ({"packing": "many"}, 8, "strategy.packing=many must be 1, 2, 4, ... or auto"),
        ({"packing": "0"}, 8, "strategy.packing=0 must be 1, 2, 4, ... or auto"),
        ({"packing": "2", "name": "eager"}, 8, "works with strategy=lina or flow .*, not with eager: .* parallel.ep=4"),
        ({"packing": "auto", "name": "lina_nopack"}, 8, "not with lina_nopack: set strategy.packing=1$"),
        ({"packing": "4", "packing_memory_gb": 0.01}, 8, r"needs at least 0.0126 GB .* is 0.01: raise it"),
        ({"packing": "auto", "packing_memory_gb": 0.001}, 8, r"strategy.packing=auto needs at least 0.00315 GB"),
    ],
)
def test_packing_that_can_not_be_is_refused_before_any_rank_starts(strategy: dict[str, Any], world: int, says: str) -> None:
    config = config_of()
    config.strategy = StrategyConfig(**{"name": "lina", **strategy})
    with pytest.raises(ValueError, match=says) as error:
        check_config(config, world)
    assert "\n" not in str(error.value)


def test_packing_that_can_be_is_not_refused() -> None:
    for packing in ("1", "2", "8", "auto"):
        check_config(config_of(packing=packing, memory_gb=1.0), 8)
    check_config(config_of(packing="1", memory_gb=1e-9), 8)  # nothing is packed
    deterministic = config_of()
    deterministic.train.deterministic = True
    with pytest.raises(ValueError, match="train.deterministic=true and strategy.packing=auto exclude each other"):
        check_config(deterministic, 8)
    deterministic.strategy.packing = "2"
    check_config(deterministic, 8)
