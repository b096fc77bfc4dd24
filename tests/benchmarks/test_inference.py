"""The inference benchmark: what it serves, what it refuses, and loads of a tiny run that are those known before."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalina.placement.controller import Policy
from megalina.placement.planners.greedy import greedy
from megalina.placement.routing_trace import read_trace, traced, write_trace
from megalina.placement.split import load_aware
from megalina.placement.triggers import never
from megalina.step.program import Instruction, Kind
from placement_lab.offline import max_over_mean, replay
from placement_lab.oracle import OraclePredictor
from placement_lab.workloads import WORKLOADS, Size, drawn

ROOT = Path(__file__).resolve().parents[2]
TINY = "--layers 2 --batches 2 --batch-tokens 48 --attention-ms 0.5 --experts-ms 2 --slow-motion 1 --slots 7"
SIZE = Size(num_experts=16, num_devices=3, num_layers=2, batch_tokens=48, num_batches=2)


@pytest.fixture(scope="module")
def inference() -> Any:
    return importlib.import_module("benchmarks.inference")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of 64 experts and top-2, three and four layers."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("traces")
    paths = []
    for layers in (3, 4):
        ids = np.argsort(random.random((160, layers, 64)), axis=2)[..., :2].astype(np.uint8)
        paths.append(folder / f"{layers}_layers.npz")
        write_trace(paths[-1], traced(ids, 64, sample_lengths_S=np.full(8, 20)))
    return paths


def settings_of(inference: Any, text: str) -> list[dict[str, Any]]:
    args = {
        "traces": [],
        "profiles": [],
        "workloads": "",
        "devices": "4",
        "skew": "",
        "modes": "",
        "ablations": False,
        "slots": 6,
        "layers": 0,
    }
    args |= {"batch_tokens": 32, "batches": 16, "attention_ms": 1.0, "experts_ms": 1.0, "expert_ms": 0.1, "slow_motion": 1.0}
    args |= {"json": None, "picture": None}
    for word in text.split():
        name, value = word.split("=")
        args[name] = [Path(path) for path in value.split(",")] if name in ("traces", "profiles") else type(args[name])(value)
    found: list[dict[str, Any]] = inference.settings_of(argparse.Namespace(**args))
    return found


# what is served


def test_all_workloads_are_a_setting_each_with_layers_of_their_own(inference: Any) -> None:
    found = settings_of(inference, "workloads=all devices=2,4 slots=8")
    assert [(s["devices"], s["workload"]) for s in found] == [(n, name) for n in (2, 4) for name in WORKLOADS]
    assert {s["layers"] for s in found} == {inference.WORKLOAD_LAYERS} and not any("skew" in s for s in found)
    assert found[0]["modes"] == ["static", "window", "lina", "best", "oracle", "ideal"]


def test_layers_are_those_of_all_traces(inference: Any, traces: list[Path]) -> None:
    both = ",".join(map(str, traces))
    found = settings_of(inference, f"traces={both}")
    assert [(s["skew"], s["layers"]) for s in found] == [("real", 3), ("paper", 3)]
    assert settings_of(inference, f"traces={both} layers=2")[0]["layers"] == 2
    assert settings_of(inference, f"traces={traces[1]}")[0]["layers"] == 4


def test_traces_are_served_in_turn_by_even_parts(inference: Any, traces: list[Path]) -> None:
    (setting,) = settings_of(inference, f"traces={traces[0]},{traces[1]} skew=real")
    routing = inference.routing_of(setting)
    assert [ids_TLK.shape for ids_TLK in routing.batches] == [(32, 3, 1)] * 4
    assert routing.tokens_BR.tolist() == [[8, 8, 8, 8]] * 4
    for trace, turns in zip(traces, ((0, 2), (1, 3)), strict=True):
        first_T = read_trace(trace).expert_ids_TLK[80:144, 0, 0] // 4  # the second half, as whole batches
        assert np.array_equal(np.concatenate([routing.batches[turn][:, 0, 0] for turn in turns]), first_T)


def test_a_profile_of_another_task_changes_nothing_of_what_is_served(inference: Any, traces: list[Path]) -> None:
    (own,) = settings_of(inference, f"traces={traces[0]} skew=real")
    (held_out,) = settings_of(inference, f"traces={traces[0]} profiles={traces[1]} skew=real")
    first, second = inference.routing_of(own), inference.routing_of(held_out)
    assert all(np.array_equal(a, b) for a, b in zip(first.batches, second.batches, strict=True))
    other_TL = read_trace(traces[1]).expert_ids_TLK[:, :3, 0] // 4  # the whole of it
    assert np.array_equal(second.profile.expert_ids_TLK[..., 0], other_TL)
    assert len(first.profile.expert_ids_TLK) == 80


@pytest.mark.parametrize("workload", [*WORKLOADS, ""])
def test_the_oracle_is_told_each_batch_and_the_first_one_twice(inference: Any, traces: list[Path], workload: str) -> None:
    what = f"workloads={workload} batches=5" if workload else f"traces={traces[0]},{traces[1]} skew=real"
    (setting,) = settings_of(inference, what)
    routing = inference.routing_of(setting)
    oracle, state = inference.oracle_of(routing), 0
    for ids_TLK in [routing.batches[0], *routing.batches]:
        for layer in range(setting["layers"]):
            share_E = np.bincount(ids_TLK[:, layer, 0], minlength=16) / 32
            assert np.allclose(oracle.expect(layer, np.zeros(0), state), share_E, rtol=0, atol=1e-12)
        state = oracle.learn(0, np.zeros(0), np.zeros(0), state)


def test_ranks_have_the_tokens_of_the_workload(inference: Any) -> None:
    (setting,) = settings_of(inference, "workloads=ragged_source batches=3")
    assert inference.routing_of(setting).tokens_BR.tolist() == [[3, 6, 10, 13], [6, 10, 13, 3], [10, 13, 3, 6]]


def test_the_profile_of_a_workload_is_as_popular_and_none_of_what_is_served(inference: Any) -> None:
    (setting,) = settings_of(inference, "workloads=rotating batches=5")
    routing = inference.routing_of(setting)
    served_TLK = np.concatenate(routing.batches)
    assert routing.profile.expert_ids_TLK.shape == served_TLK.shape
    assert not np.array_equal(routing.profile.expert_ids_TLK, served_TLK)
    assert np.array_equal(np.sort(routing.profile.expert_ids_TLK, axis=0), np.sort(served_TLK, axis=0))


def test_a_rank_sends_its_own_tokens_and_padding_goes_to_nobody(inference: Any) -> None:
    part, router = inference.OwnPart(np.array([[3, 4], [5, 6]]), 31), torch.zeros(2, 1, dtype=torch.int64)
    assert part.replayed(1, router).tolist() == [[4], [6]]
    assert part.evenly(1, router).tolist() == [[15], [0]]  # tokens 31 and 32 of the batch
    nothing = inference.OwnPart(np.zeros((0, 2), np.int64), 31)
    assert nothing.replayed(0, router[:1]).tolist() == nothing.evenly(0, router[:1]).tolist() == [[16]]
    assert inference.batch_of(0).valid_BS.tolist() == [[False]] and inference.batch_of(2).valid_BS.tolist() == [[True, True]]


def test_devices_take_time_for_their_own_tokens_and_rows(inference: Any) -> None:
    times = inference.Times(attention_s=1.0, experts_s=3.0, expert_s=0.1)

    def seconds(name: str, tokens: int) -> float:
        instruction = Instruction("F", Kind.COMPUTE, name, 0, "0", (), ())
        taken: float = inference.seconds(times, 16, instruction, tokens, 24)
        return taken

    assert [seconds("attention", tokens) for tokens in (0, 16, 24)] == [0, 1, 1.5]
    assert seconds("experts", 0) == pytest.approx(3 * (1.5 + 0.02))
    assert seconds("mix", 16) == 0


# what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "neither --traces and --workloads are given: give one of them"),
        ("--traces TRACE --workloads all", "both --traces and --workloads are given: give one of them"),
        ("--workloads all --profiles TRACE", "--profiles is for --traces"),
        ("--traces TRACE --profiles TRACE", "is both profiled and served, so it isn't held out"),
        ("--workloads all --skew real", "--skew real is of --traces: workloads have their own"),
        ("--workloads all,burst", "--workloads all: choose among balanced, hot_expert"),
        ("--workloads hot_exprt", "--workloads hot_exprt: choose among balanced, hot_expert"),
        ("--traces TRACE --skew even", "--skew even: choose among real, paper, balanced"),
        ("--traces TRACE --layers 4", "has 3 MoE layers: give --layers 3 or fewer"),
        ("--workloads balanced --layers -1", "--layers -1: choose 1 or more, or 0"),
        ("--workloads balanced --devices 3", "--batch-tokens 512 must be a multiple of 3 devices"),
        ("--workloads balanced --devices 0", "--batch-tokens 512 must be a multiple of 0 devices, one or more"),
        ("--workloads balanced --devices 2", "2 devices then have 8 slots for 16 experts"),
        ("--workloads balanced --devices 32", "32 devices can't each have one of 16 experts"),
        ("--workloads burst --devices 4 --batches 2", "burst has 2 batches"),
        ("--workloads balanced --devices 4 --modes lookahead", "lookahead can't be replayed"),
        ("--workloads balanced --devices 4 --modes orcale", "there is no mode 'orcale'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    inference: Any, traces: list[Path], capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert inference.main(arguments.replace("TRACE", str(traces[0])).split()) == inference.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


# a run


def told(name: str) -> tuple[float, float]:
    """The median of the largest load over the mean, without planning and when an oracle plans; all of it known before."""
    workload = WORKLOADS[name](SIZE)
    batches, counts_BLE = drawn(workload, 0), workload.counts_BLE()
    oracle = OraclePredictor(np.concatenate([counts_BLE[:1], counts_BLE]))  # the first batch warms up
    planned = replay(
        [batches[0], *batches], Policy(oracle, greedy, load_aware, never), num_experts=16, num_devices=3, slots_per_device=7
    )
    static, planned_BL = max_over_mean(workload.static_load_BLN()), max_over_mean(planned.load_BLN)
    return float(np.median(static)), float(np.median(planned_BL[1:]))


@pytest.mark.full
def test_a_tiny_run_from_end_to_end(inference: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ranks with unequal numbers of tokens, and one with none."""
    names = "ragged_source,zero_load_rank"
    arguments = f"--devices 3 --workloads {names} --modes best,oracle,ideal {TINY} --json {tmp_path / 'found.json'}"
    assert inference.main(arguments.split()) == 0
    out, err = capfd.readouterr()
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("**")] == [
        "**3 emulated devices, workload ragged_source**",
        "**3 emulated devices, workload zero_load_rank**",
    ]
    assert not err and "infinite" in out and "the paper" not in out
    settings = json.loads((tmp_path / "found.json").read_text())["settings"]
    assert [(s["workload"], s["served"], s["traces"]) for s in settings] == [(name, 2, []) for name in names.split(",")]
    assert settings[0]["most_over_least"][0] > 10 and settings[1]["most_over_least"] == [None]
    for setting in settings:
        modes = setting["modes"]
        assert list(modes) == ["static", "best", "oracle", "ideal"]
        static, oracle = told(setting["workload"])
        assert (modes["static"]["load_max_over_mean"], modes["oracle"]["load_max_over_mean"]) == (static, oracle)
        assert oracle < static and modes["ideal"]["load_max_over_mean"] == 6 / (16 / 3)  # experts of the first device
        assert modes["oracle"]["phase2_rate"] == 0 and modes["oracle"]["failed_fetches"] == 0
        assert all(len(m["batch_ms"]) == 2 and min(m["batch_ms"]) > 0 for m in modes.values())
