"""megalina doctor: what a machine lacks is found, named, and comes with what to do."""

import json
import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from megalina import readiness
from megalina.cli import doctor
from megalina.rank_pool import RanksFailed
from megalina.readiness import Level, disk, gpus, packages, port, several_ranks, wandb
from tests.commands import done


def test_this_machine_is_ready_and_says_so(tmp_path: Path) -> None:
    said = done(doctor.main, "--ranks", 2, "--folder", tmp_path, "--json", tmp_path / "found.json")
    assert (said.returncode, said.stderr) == (0, ""), said.stdout
    assert said.stdout.endswith("ready: python pretrain_gpt_moe.py experiment=laptop\n")
    assert "2 processes start, find each other and sum" in said.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ready"] and {f["about"] for f in found["findings"]} >= {"Python", "packages", "GPUs", "ranks", "disk", "W&B"}


def test_what_is_bad_is_the_last_line_and_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "version", lambda name: "0.1")
    said = done(doctor.main, "--ranks", 0, "--folder", tmp_path)
    assert said.returncode == 1 and said.stdout.endswith("\nnot ready: packages\n")
    assert "torch 0.1 isn't >=2.11" in said.stdout and "-> pip install -r requirements.lock" in said.stdout


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = readiness.version

    def version(name: str) -> str:
        if name == "safetensors":
            raise PackageNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(readiness, "version", version)
    assert packages().level is Level.BAD and packages().text == "safetensors is missing"
    monkeypatch.setattr(readiness, "requires", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name)))
    assert packages().text == "megalina isn't installed in this Python"


def test_ranks_that_fail_are_told_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> list[float]:
        raise RanksFailed("rank 1 was killed\nand more")

    monkeypatch.setattr("megalina.rank_pool.RankPool.run", fails)
    found = several_ranks(2)
    assert found.level is Level.BAD and found.text == "2 processes don't work together: rank 1 was killed" and found.todo


def test_a_port_in_use_is_a_note_with_another_one() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        number = listener.getsockname()[1]
        assert port(number).level is Level.NOTE and f"--master-port={number + 1}" in port(number).todo
    # Below the ports that the system hands out: another test's connection may take one of those at any moment.
    assert any(port(number).level is Level.GOOD for number in range(20_000, 20_010))


def test_a_full_disk_and_one_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk(tmp_path / "not" / "there").level in (Level.GOOD, Level.NOTE)
    monkeypatch.setattr(readiness, "SMALL_DISK_GB", 1e9)
    assert disk(tmp_path).level is Level.NOTE
    monkeypatch.setattr(readiness.os, "access", lambda *_: False)
    assert disk(tmp_path).level is Level.BAD


@pytest.mark.parametrize(("build", "said"), [(None, "a build for CPU"), ("13.0", "sees none")])
def test_a_gpu_that_torch_does_not_see(build: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(readiness.shutil, "which", lambda name: None)
    assert gpus().level is Level.NOTE
    monkeypatch.setattr(readiness.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("torch.version.cuda", build)
    assert gpus().level is Level.BAD and said in gpus().text and gpus().todo


def test_wandb_has_a_key_or_runs_offline(tmp_path: Path) -> None:
    assert wandb({}, tmp_path).level is Level.NOTE
    assert wandb({"WANDB_API_KEY": "x" * 40}, tmp_path).level is Level.GOOD
