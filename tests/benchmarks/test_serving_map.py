"""The map of serving: a corner of it from end to end, and what is refused."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalina.placement.routing_trace import traced, write_trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def serving_map() -> Any:
    return importlib.import_module("benchmarks.serving_map")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "even.npz"
    ids_TLK = np.random.default_rng(0).integers(0, 64, (1200, 26, 1)).astype(np.uint8)
    write_trace(path, traced(ids_TLK, 64, sample_lengths_S=np.full(2, 600)))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--models gpt5", "--models gpt5: choose among lina, mixtral, v2lite, v3"),
        ("--clusters tpu", "--clusters tpu: choose among h100_400g, gb200_nvl72, rtx4090_pcie"),
        ("--devices 8,one", "--devices one: give numbers of devices, 2 or more"),
        ("--devices 1", "--devices 1: give numbers"),
        ("--plan-ms -1", "--plan-ms -1: give milliseconds, 0 or more"),
        ("--check-ms inf", "--check-ms inf: give milliseconds"),
        ("--against-measured", "--against-measured and --traces go together"),
        ("--traces TRACE", "--against-measured and --traces go together"),
        ("--against-measured --traces TRACE --picture a.png", "--picture is of the map"),
        ("--json nowhere/a.json", "there is no folder"),
        (
            "--against-measured --traces TRACE",
            "most popular expert has",
        ),  # its routing is too even to be made as skewed as it was
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    serving_map: Any, trace: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert serving_map.main(arguments.replace("TRACE", str(trace)).split()) == serving_map.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


@pytest.mark.full
@pytest.mark.usefixtures("every_status_line")
def test_a_corner_of_the_map_from_end_to_end(serving_map: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found_path, picture = tmp_path / "map.json", tmp_path / "map.png"
    arguments = f"--models mixtral --clusters h100_400g --devices 8 --json {found_path} --picture {picture}"
    assert serving_map.main(arguments.split()) == 0
    out, err = capsys.readouterr()
    assert picture.read_bytes()[:4] == b"\x89PNG" and "6/6" in err
    points = json.loads(found_path.read_text())["points"]
    assert [(p["phase"], p["skew"], p["turns"], p["plan_s"]) for p in points] == [
        ("prefill", 1.5, True, 0.0005),
        *(("prefill", 2.5, True, s) for s in (0.0005, 0.0, 0.0062)),
        ("decode", 1.5, True, 0.0005),
        *(("decode", 2.5, True, s) for s in (0.0005, 0.0, 0.0062)),
        ("prefill", 2.5, False, 0.0005),
        ("decode", 2.5, False, 0.0005),
    ]
    middle = points[1]
    assert middle["slots"] == 2 and middle["expert_s"] == pytest.approx(352.3e6 / (64e9 * 0.8), rel=0.001)
    assert middle["verdict"]["pays"] and middle["verdict"]["mode"] == "profile"  # an expert takes longer to come than a layer
    assert middle["times"]["best"]["waits_s"]["wait fetch"] > 0.002
    assert not points[4]["verdict"]["pays"]  # decoding reads weights, and replicas are more of them
    first, second = (p["verdict"]["gain"] for p in points[:2])
    assert f"| Mixtral, 8, top-2, prefill | {first:.1f} P | {second:.1f} P |" in out
    for title in (
        "Can a swap hide?",
        "What a plan may take",
        "Slots of a device",
        "Deciding, here, in Python",
        "One task for long",
    ):
        assert title in out


def test_slots_are_a_quarter_more_and_one_at_least(serving_map: Any) -> None:
    assert [serving_map.slots_of(256, n) for n in (8, 32, 128, 512)] == [40, 10, 3, 2]
