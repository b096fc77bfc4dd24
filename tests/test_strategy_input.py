"""Strategies and emulated clusters that can't be: one line with the number and what to change, before any rank starts."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina import namespaces
from megalina.config import ClusterConfig, PretrainConfig
from megalina.step.strategy import STRATEGIES
from megalina.validate import check_config
from megalina.validate_strategy import PACKED
from tests.cluster_tools import Planted
from tools import emulate_cluster


def config_of(world: int = 1, **settings: object) -> PretrainConfig:
    """Two MoE layers of four experts, sequences of 128 tokens, one micro-batch of two a step and rank; `strategy__...` and
    `cluster__...` as given, as many expert-parallel ranks as there are."""
    config = PretrainConfig()
    config.launch.device = "cpu"
    config.parallel.ep, config.train.global_batch_size = world, 2 * world
    for key, value in settings.items():
        group, name = key.split("__")
        assert hasattr(getattr(config, group), name)
        setattr(getattr(config, group), name, value)
    return config


def refusal(config: PretrainConfig, world: int = 1) -> str:
    with pytest.raises(ValueError) as error:
        check_config(config, world)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "flo"}, "strategy.name=flo is not one of eager, "),
        ({"name": "flo"}, "(did you mean flow?)"),
        ({"name": "lina_zero"}, "strategy=lina_zero moves ZeRO-1's all-gathers and needs parallel.zero=1; without it take "),
        ({"name": "lina", "chunks": "257"}, "strategy.chunks=257: 257 chunks of 256 tokens a part are too many: lower it"),
        ({"name": "lina", "chunks": "2,257"}, "strategy.chunks=2,257: 257 chunks of 256 tokens a part"),
        ({"name": "flow", "parts": 2, "chunks": "129"}, "129 chunks of 128 tokens a part are too many"),
        ({"chunks": "1,2,2"}, "strategy.chunks=1,2,2 must be one number above 0, or one for each of 2 MoE layers"),
        ({"chunks": "0"}, "strategy.chunks=0 must be one number above 0"),
        ({"chunks": "-1"}, "strategy.chunks=-1 must be a number, one for each MoE layer as 1,2,2, or auto"),
        ({"chunks": "1,auto"}, "strategy.chunks=1,auto must be a number, one for each MoE layer"),
        ({"chunks": ""}, "strategy.chunks= must be a number"),
        ({"chunks": "1,"}, "strategy.chunks=1, must be a number"),
        ({"windows": "atuo"}, "strategy.windows=atuo is not one of none, auto (did you mean auto?)"),
        ({"parts": -1}, "strategy.parts=-1 must be at least 1"),
        ({"parts": 0}, "strategy.parts=0 must be at least 1"),
        ({"late_layers": -1}, "strategy.late_layers=-1 must be at least 0"),
        ({"bucket_mb": math.nan}, "strategy.bucket_mb=nan must be a finite number"),
        ({"partition_bytes": "-4096"}, "strategy.partition_bytes=-4096 must be bytes, 1024 or more, 0 (whole buckets) or auto"),
        ({"partition_bytes": "1MB"}, "strategy.partition_bytes=1MB must be bytes, 1024 or more, 0 (whole buckets) or auto"),
        ({"name": "flow", "parts": 3}, "strategy.parts (3) must divide train.micro_batch_size (2) or the number of micro-"),
        (
            {"packing": "2"},
            "strategy.packing=2 works with strategy=lina or flow or pair or lina_zero or lancet or search or auto, not with",
        ),
        ({"deferred_weights": "some"}, "strategy.deferred_weights=some is not one of none, experts, all"),
        ({"deferred_mb": 1.0}, "strategy.deferred_weights=none defers none: set strategy.deferred_weights=experts or all"),
        ({"name": "flow", "parts": 2, "join_weights": True}, "joins weights' gradients that are deferred or last, and none are"),
        (
            {"name": "lancet", "deferred_weights": "all", "join_weights": True},
            "joins what parts and chunks give, and there is one of both: set strategy.parts=2",
        ),
        ({"name": "auto", "join_weights": True}, "strategy=auto finds strategy.join_weights itself: leave it at False"),
        ({"partition": "two"}, "strategy.partition=two must be none, auto, a number of parts, or ranges such as"),
        ({"partition": "2"}, "strategy.partition=2 does nothing with strategy=eager, only with lancet: leave it at none"),
        ({"name": "auto", "partition": "2"}, "strategy.partition=2 does nothing with strategy=auto, only with lancet"),
        ({"name": "lancet", "partition": "9"}, "strategy.partition=9: 9 parts; give 1 to 8"),
        ({"name": "lancet", "partition": "4"}, "strategy.partition=4: 4 parts must divide train.micro_batch_size (2)"),
        ({"name": "lancet", "partition": "2", "parts": 2}, "strategy.partition=2 and strategy.parts=2 both cut micro-batches"),
        ({"name": "lancet", "partition_backward": "mirrored"}, "strategy.partition=none cuts nothing: give strategy.partition=2"),
        ({"name": "lancet", "partition": "auto", "partition_backward": "mirrored"}, "finds strategy.partition_backward itself"),
        ({"name": "lancet", "partition": "attention.0..mix.7:2"}, "this model and layout have no instruction mix.7"),
        ({"name": "lina", "packing": "0"}, "strategy.packing=0 must be 1, 2, 4, ... or auto"),
        ({"name": "lina", "packing": "some"}, "strategy.packing=some must be 1, 2, 4, ... or auto"),
        ({"name": "lina", "packing": "auto", "packing_memory_gb": -1.0}, "strategy.packing_memory_gb=-1.0 must be at least 0"),
    ],
)
def test_a_strategy_that_cannot_be_is_named(settings: dict[str, object], said: str) -> None:
    assert said in refusal(config_of(**{f"strategy__{key}": value for key, value in settings.items()}))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("packing", ["3", "8"])
def test_packing_that_does_not_divide_is_named_with_both_numbers(name: str, packing: str) -> None:
    config = config_of(4, strategy__name=name, strategy__packing=packing, parallel__zero=1, train__micro_batch_size=1)
    assert refusal(config, 4) == f"strategy.packing ({packing}) must divide parallel.ep (4)"
    for fits in ("1", "2", "4", *(["auto"] if name != "search" else [])):
        config.strategy.packing = fits
        check_config(config, 4)


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(PACKED)))
def test_strategies_without_packing_refuse_it(name: str) -> None:
    said = refusal(config_of(4, strategy__name=name, strategy__packing="2"), 4)
    assert f"not with {name}: set strategy.packing=1, or pack with parallel.ep=2 alone" in said


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 600))
def test_there_are_at_most_as_many_chunks_as_tokens(seq_len: int, micro_batch_size: int, chunks: int) -> None:
    config = config_of(
        strategy__name="lina",
        strategy__chunks=str(chunks),
        train__seq_len=seq_len,
        train__micro_batch_size=micro_batch_size,
        train__global_batch_size=micro_batch_size,
    )
    tokens = seq_len * micro_batch_size
    if chunks <= tokens:
        check_config(config, 1)
    else:
        assert f"{chunks} chunks of {tokens} tokens" in refusal(config)


FIGURES = [name for name, field in ClusterConfig.__dataclass_fields__.items() if field.type in (int, float, "int", "float")]


@pytest.mark.parametrize("name", FIGURES)
@given(value=st.one_of(st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(max_value=-1e-300), st.integers(max_value=-1)))
def test_no_figure_of_a_cluster_is_negative_or_infinite(name: str, value: float) -> None:
    assert refusal(config_of(**{f"cluster__{name}": value})).startswith(f"cluster.{name}={value} must be ")


def test_the_figures_of_links_and_devices_are_among_those() -> None:
    assert {"link_gbit", "latency_us", "device_gflops", "attention_ms", "experts_ms", "kernel_floor_ms"} <= set(FIGURES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention_ms": 1.0}, "cluster.attention_ms (1) and cluster.experts_ms (0) go together: give both"),
        ({"experts_ms": 2.5}, "cluster.attention_ms (0) and cluster.experts_ms (2.5) go together: give both"),
        (
            {"attention_ms": 1.0, "experts_ms": 1.0, "device_gflops": 9.0},
            "cluster.device_gflops and cluster.attention_ms exclude each other: give rates or times",
        ),
    ],
)
def test_devices_of_two_minds_are_refused(settings: dict[str, object], said: str) -> None:
    assert refusal(config_of(**{f"cluster__{key}": value for key, value in settings.items()})) == said


@pytest.mark.parametrize("figure", ["device_gflops", "experts_ms"])
def test_devices_are_emulated_on_cpus_alone(figure: str) -> None:
    config = config_of(launch__device="cuda", **{f"cluster__{figure}": 1.0})
    assert refusal(config) == f"cluster.{figure} emulates a device on CPUs: set launch.device=cpu"


@pytest.mark.parametrize("setting", ["name", "chunks", "partition_bytes", "windows"])
def test_what_measured_times_decide_is_not_deterministic(setting: str) -> None:
    config = config_of(train__deterministic=True, **{"strategy__name": "lina", f"strategy__{setting}": "auto"})
    assert "train.deterministic=true and auto in strategy.* exclude each other" in refusal(config)
    config.train.deterministic = False
    check_config(config, 1)


@pytest.mark.parametrize(
    "figure",
    [
        *("--link-mbit -5", "--link-mbit nan", "--link-mbit inf", "--latency-us -1", "--latency-us nan", "--latency-us inf"),
        *("--nodes -1", "--nodes 0", "--nodes 255", "--ranks-per-node 0", "--timeout-s nan", "--timeout-s -1"),
        *("--like lina_testbed --slowdown nan", "--like lina_testbed --slowdown inf", "--like lina_testbed --slowdown 0"),
    ],
)
def test_no_cluster_is_made_of_such_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, figure: str
) -> None:
    """Before anything is made; root, and an `ip` that tells what it is asked for."""
    planted = Planted(tmp_path)
    monkeypatch.setenv("PATH", f"{planted.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces, "LOCKS", tmp_path / "locks")
    with pytest.raises(SystemExit, match="2"):
        emulate_cluster.main([*figure.split(), "--", "true"])
    out, err = capsys.readouterr()
    option, value = figure.split()[-2:]
    assert err.startswith(f"argument {option}: {value} must be a ")
    assert (out, err.count("\n"), planted.calls) == ("", 1, [])
