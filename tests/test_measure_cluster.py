"""tools/measure_cluster.py as a user runs it: alone, on two ranks, joined, and mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megalina import launch
from megalina.config import ClusterConfig, HardwareConfig
from megalina.validate import check_hardware
from tools import measure_cluster
from tools.measure_cluster import BAD_INPUT, FAILED, main

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--device", "cpu", "--seconds", "0.001"]


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr(measure_cluster, "run_ranks", started)


def read(path: Path) -> ClusterConfig:
    figures = yaml.safe_load(path.read_text())
    return ClusterConfig(**{**figures, "hardware": HardwareConfig(**figures["hardware"])})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "100000"], "--ranks 100000 must be 1 to "),
        (["--out", "/no/such/folder/x.yaml"], "/no/such/folder/x.yaml: there is no folder /no/such/folder"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json: there is no folder /no/such/folder"),
        (["--out", "x.yml"], "--out x.yml must end in .yaml"),
        (["--device", "cuda"], "--device cuda, but torch sees no GPU"),
        (["--check", "--out", "no_such.yaml"], "no_such"),
        (["--check", "--out", "local.yaml"], "conf/cluster/local.yaml: nodes is 0"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    no_ranks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(words) == BAD_INPUT
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out


def test_ranks_are_not_asked_for_where_something_else_has_started_them(
    no_ranks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in launch.rank_environment(1, 4, 1, 2, "127.0.0.1", 29500).items():
        monkeypatch.setenv(name, value)
    assert main(["--ranks", "2"]) == BAD_INPUT
    assert "--ranks 2: torchrun has started 4 ranks; leave it out" in capsys.readouterr().err


@pytest.mark.full
def test_a_rank_that_fails_ends_all_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    out = tmp_path / "two.yaml"
    assert main(["--ranks", "2", *SHORT, "--out", str(out)]) == FAILED
    assert "rank" in capfd.readouterr().err and not out.exists()


@pytest.mark.full
def test_two_ranks_measure_all_and_their_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, numbers = tmp_path / "two.yaml", tmp_path / "two.json"
    assert main(["--ranks", "2", *SHORT, "--out", str(out), "--json", str(numbers)]) == 0
    cluster = read(out)
    check_hardware(cluster)
    assert (cluster.name, cluster.nodes, cluster.ranks_per_node) == ("two", 1, 2)
    assert "# Command: tools/measure_cluster.py --seconds 0.001 --ranks 2\n" in out.read_text()
    hardware = cluster.hardware
    assert hardware.host_is_device and hardware.float32_tflops * 1000 > 0.5 and 0 < hardware.host_stage_us < 1e5
    found = json.loads(numbers.read_text())
    assert found["cluster"]["hardware"]["product_sizes"] == hardware.product_sizes
    one, two = found["measured"]["passes"]
    assert set(one) == set(two) and len(one) > 70 and all(s > 0 for s in one.values())
    assert set(found["measured"]["contention"]) == {"all-to-all under all-reduce", "all-reduce under all-to-all"}
    text = capsys.readouterr().out
    for piece in ("products, GFLOP/s", "all-reduce", "time over time alone", "held out: ", f"{out} is written"):
        assert piece in text


@pytest.mark.full
def test_one_rank_measures_what_one_rank_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one.yaml"
    assert main(["--ranks", "1", *SHORT, "--out", str(out)]) == 0
    cluster = read(out)
    check_hardware(cluster)
    assert (cluster.nodes, cluster.ranks_per_node) == (1, 1)
    text = capsys.readouterr().out
    assert "not measured, there is one rank a node" in out.read_text()
    assert "inside a node" not in text and "on another group" not in text


@pytest.mark.full
def test_ranks_that_something_else_has_started_on_two_nodes_measure_the_links_between_them(tmp_path: Path) -> None:
    port, ranks = launch.free_port(), []
    for rank in range(2):
        environment = {**os.environ, **launch.rank_environment(rank, 2, 0, 1, "127.0.0.1", port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "tools/measure_cluster.py", *SHORT, "--out", str(tmp_path / f"rank_{rank}.yaml")]
        files = {"stdout": open(tmp_path / f"{rank}.out", "w"), "stderr": open(tmp_path / f"{rank}.err", "w")}  # noqa: SIM115
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, **files))
    codes = [process.wait(timeout=250) for process in ranks]
    assert codes == [0, 0], [(tmp_path / f"{rank}.err").read_text() for rank in range(2)]
    cluster = read(tmp_path / "rank_0.yaml")
    check_hardware(cluster)
    assert (cluster.nodes, cluster.ranks_per_node) == (2, 1)
    assert "link_gbit: " in (text := (tmp_path / "rank_0.yaml").read_text()) and "measured: a node's, one line through" in text
    shown = (tmp_path / "0.out").read_text()
    assert "over nodes: alone" in shown and "inside a node" not in shown
    assert not (tmp_path / "rank_1.yaml").exists() and not (tmp_path / "1.out").read_text()


@pytest.mark.full
def test_forecasts_are_held_against_steps_of_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "check.json"
    assert main(["--check", "--ranks", "2", "--device", "cpu", "--steps", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found) == {"laptop", "copies", "wide"}
    for row in found.values():
        assert row["predicted_s"] > 0 and row["measured_s"] > 0
        assert {"F experts", "B attention", "waits for grads"} <= set(row["parts_s"])
    assert "where the forecast differs most" in capsys.readouterr().out
