"""The ladder's settings: what they have in common, and what differs."""

from dataclasses import replace

import pytest
import torch

from megalina.blocks.model import shape_of
from megalina.compare.ladder import EAGER_PIECES, LADDER, LINK_MBIT, OVERRIDES, PLAIN, STRATEGIES, Setting
from megalina.compose import compose
from megalina.mesh import build_mesh
from megalina.parallel.shard import build_shard, parameter_groups
from megalina.step import strategy
from megalina.train.packing import wire_bytes
from megalina.validate import check_config

SETTINGS = {s.name: s for s in LADDER}


def test_every_strategy_that_there_is_climbs_the_ladder() -> None:
    assert set(STRATEGIES) - {"flow_packed", PLAIN} == {*strategy.STRATEGIES, "auto"}
    assert set(OVERRIDES) <= set(STRATEGIES)
    assert EAGER_PIECES[0] == 0 and len(set(EAGER_PIECES)) > 2 and LINK_MBIT == 500


@pytest.mark.parametrize("setting", LADDER, ids=lambda s: s.name)
def test_a_setting_composes_with_emulated_devices(setting: Setting) -> None:
    config = compose(setting.all_overrides())
    check_config(config, setting.world)
    model, cluster = config.model, config.cluster
    assert config.parallel.ep == setting.world and (model.num_layers, model.d_model) == (6, 512)
    of_experts = (model.num_experts, model.d_ff, config.router.top_k)
    assert of_experts == ((64, 4, 6) if "fine" in setting.name else (setting.world, 32, 2))
    half_of_all = 16 * model.num_layers * model.num_experts * 2 * model.d_model * model.d_ff / 2
    assert config.strategy.packing_memory_gb == pytest.approx(half_of_all / 1e9)
    assert config.parallel.dispatch == ("auto" if "fine" in setting.name else "rows")
    assert (PLAIN in setting.strategies) == (setting.name not in ("4x1 light", "4x1 heavy"))
    assert (cluster.attention_ms, cluster.experts_ms) == (10, 14)
    assert config.optim.clip_norm > 0 and config.optim.name == "adamw"
    tokens = config.train.global_batch_size * config.train.seq_len // setting.world
    assert tokens == (128 if "fine" in setting.name else {4: 256, 8: 128}[setting.world])


@pytest.mark.parametrize("name", [name for name in SETTINGS if "fine" not in name])
def test_a_layers_dense_gradients_are_light_or_heavy(name: str) -> None:
    config = compose(SETTINGS[name].all_overrides())
    config.model.num_experts = 4  # few, on one rank
    gpt = build_shard(
        config.model, config.router, build_mesh(), vocab_size=384, max_positions=64, seed=0, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    groups = parameter_groups(gpt, shape_of(config.model, config.router, tp=1, sequence=True))
    dense_bytes = sum(4 * p.numel() for _, p in groups["dense.3"])
    router_bytes = 4 * config.model.d_model * (SETTINGS[name].world - 4)
    assert (dense_bytes + router_bytes) / 1e6 == pytest.approx(1.84 if "heavy" in name else 0.8, rel=0.05)


def test_a_setting_with_twice_the_ranks_sends_half_the_rows_a_rank() -> None:
    def rows_bytes(setting: Setting) -> float:
        world = setting.world
        return wire_bytes(compose(setting.all_overrides()), world, 1, ranks_per_node=1) * world / (world - 1)

    light, doubled = SETTINGS["4x1 light"], SETTINGS["4x2 light"]
    assert rows_bytes(doubled) == pytest.approx(rows_bytes(light) / 2)
    assert rows_bytes(replace(light, overrides=("train.seq_len=32",))) == pytest.approx(rows_bytes(light) / 2)
