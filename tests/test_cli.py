"""The command `megalina`, and compose(): the same mains and the same configuration from a clone, a wheel, a shell and Python."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalina.cli import train
from megalina.cli.main import COMMANDS, main
from megalina.compose import CONF, _composed, compose
from megalina.config import PretrainConfig, RunConfig
from megalina.worker import load_config
from tests.commands import done

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {  # the script in the repository that is the same
    "train": "pretrain_gpt_moe.py",
    "eval": "tools/evaluate_gpt_moe.py",
    "plan": "tools/plan.py",
    "simulate": "tools/simulate.py",
    "compare": "tools/compare_strategies.py",
    "verify": "tools/verify_layouts.py",
    "checkpoint": "tools/checkpoint.py",
    "data": "tools/preprocess_data.py",
    "generate": "tools/generate.py",
    "doctor": "tools/doctor.py",
    "examples": "tools/examples.py",
    "completion": "tools/completion.py",
    "report": "tools/write_report.py",
}


def test_the_help_has_a_line_for_each_command() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        said = done(main, *arguments)
        assert (said.returncode, said.stderr) == (0, "")
        assert [line.split()[0] for line in said.stdout.splitlines()[-len(COMMANDS) :]] == list(COMMANDS) == list(SCRIPTS)


def test_an_unknown_command_is_one_line_with_the_nearest() -> None:
    said = done(main, "trian", "experiment=laptop")
    assert (said.returncode, said.stdout, said.stderr.count("\n")) == (2, "", 1)
    assert said.stderr.startswith("megalina trian: there is no such command (did you mean train?); there are train, eval, plan, ")
    assert "did you mean" not in done(main, "x").stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_its_scripts_main_and_has_its_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    said = done(main, command, "--help")
    own = import_module(f"megalina.cli.{COMMANDS[command][0]}").main
    assert (said.returncode, said.stderr) == (0, "")
    if command not in ("train", "simulate"):  # their help is in conf/
        assert said.stdout.startswith(f"usage: megalina {command} ")
    assert said.stdout.replace(f"megalina {command}", "X").split() == done(own, "--help").stdout.replace("script.py", "X").split()
    source = (ROOT / SCRIPTS[command]).read_text()
    assert f"from megalina.cli.{COMMANDS[command][0]} import main\n" in source and f"megalina {command} --help" in source


def test_exit_codes_and_the_last_line_are_the_mains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = done(main, "train", "optim.lrr=1")
    assert (refused.returncode, refused.stderr) == (2, "there is no setting optim.lrr (did you mean optim.lr?); see --help\n")
    assert done(main, "report", "nothing").returncode == 2
    assert sys.argv[0] != "megalina report"


@pytest.mark.parametrize("arguments", [pytest.param(["--help"], marks=pytest.mark.full), ["-h", "model=laptop", "train.steps=3"]])
def test_the_quick_help_is_hydras(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quick = done(train.main, *arguments)
    monkeypatch.setattr(train, "show_help", lambda *_: False)
    slow = done(train.main, *arguments)
    assert quick == slow and quick.stdout.count("\n") > 200


@pytest.mark.full
def test_hydras_own_flags_are_hydras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = done(train.main, "--cfg", "job", "model=laptop", "run.dir=here", "--resolve")
    assert load_config(job.stdout) == compose(["model=laptop", "run.dir=here"])
    assert "hydra.sweep.dir" not in job.stdout and "sweeper" in done(train.main, "--hydra-help").stdout
    (tmp_path / "own.yaml").write_text("defaults: [pretrain, _self_]\ntrain: {steps: 7}\n")
    named = done(train.main, "--config-dir", tmp_path, "--config-name", "own", "--cfg", "job")
    assert "steps: 7" in named.stdout, named.stderr


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "overrides",
    [
        ("train.steps=7", "model=laptop", "train.steps=8"),
        ("experiment=laptop", "optim.lr=${optim.eps}", "router=sigmoid"),
        ("model.layer=[attention,ffn]", "model.name='a b'", "cluster.hardware.memory_gib=40", "cluster=h100_400g"),
        ("+train.stepz=1", "model=tiny"),
        ("model.name=null",),
        ("train.steps=1,2",),
        ("optim.lrr=1", "model=tiny"),
    ],
)
def test_values_that_are_set_after_composing_are_hydras(overrides: tuple[str, ...]) -> None:
    def said(make: Callable[[], PretrainConfig]) -> Any:
        try:
            return replace(make(), run=RunConfig(dir=""))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return type(error), str(error)

    assert said(lambda: compose(overrides)) == said(lambda: load_config(_composed(overrides)))


def test_a_changed_file_is_composed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr("megalina.compose.CONF", tmp_path / "conf")
    assert compose(["optim=sgd", "train.steps=3"]).optim.lr == 0.1
    (tmp_path / "conf" / "optim" / "sgd.yaml").write_text("name: sgd\nlr: 0.75\n")
    assert compose(["optim=sgd", "train.steps=3"]).optim.lr == 0.75


def test_compose_is_the_command_line_and_leaves_hydra_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert compose(("experiment=laptop", "train.steps=7")).train.steps == 7
        assert GlobalHydra.instance().hydra is outer
    assert compose().model == compose([]).model == compose(["model=tiny"]).model
    assert not GlobalHydra.instance().is_initialized()
    with pytest.raises(hydra.errors.ConfigCompositionException):
        compose(["optim.lrr=1"])
    assert not GlobalHydra.instance().is_initialized()
    bench = compose(["model=bench"])
    assert load_config(OmegaConf.to_yaml(OmegaConf.structured(bench))) == bench


def test_what_is_installed_has_all_packages_and_configurations(tmp_path: Path) -> None:
    """The build that a wheel is made of, away from the repository: the command runs on it, in an empty folder."""
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("megalina", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path / "built")]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    shutil.rmtree(source)
    built = tmp_path / "built" / "lib"
    for folder, name in ((ROOT / "conf", "*.yaml"), (ROOT / "megalina", "*.py")):
        there = built / "megalina" / "conf" if name == "*.yaml" else built / "megalina"
        for path in folder.rglob(name):
            assert (there / path.relative_to(folder)).is_file(), path
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["megalina"].partition(":")
    start = f"import sys; from {module} import {function}; sys.exit({function}())"
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(built)}
    command = [sys.executable, "-c", start, "train", "experiment=laptop", "train.steps=20", "launch.dry_run=true"]
    ran = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "2 ranks" in ran.stdout, ran.stderr
    assert list((tmp_path / "empty").iterdir()) == []
