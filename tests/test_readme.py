"""The README names what is there: its files exist, its overrides compose, its commands' tools have these flags."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from megalina.cli import train
from megalina.config import PretrainConfig
from tests.commands import done

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:wandb login && )?(python (?:pretrain|tools|benchmarks)[^#\n]*(?:\\\n[^#\n]*)*)", README, re.M)


def test_every_file_that_the_table_names_exists() -> None:
    table = README.split("## Where is ...?")[1].split("## The tree")[0]
    folder = ""
    missing = []
    for row in table.splitlines():
        for name in re.findall(r"`([\w/]+\.?\w*/?)`", row):
            path = ROOT / name if "/" in name else ROOT / folder / name
            folder = str(Path(name).parent) if "/" in name else folder
            if "." in name or name.endswith("/"):
                missing += [] if path.exists() else [name]
    assert missing == []


def test_the_tree_names_every_package_and_tool() -> None:
    tree = README.split("## The tree")[1]
    for package in sorted(p.parent.name for p in (ROOT / "megalina").glob("*/__init__.py")):
        assert f"  {package}/" in tree, package
    for beside in ("papers", "benchmarks"):
        for package in sorted(p.parent.name for p in (ROOT / beside).glob("*/__init__.py")):
            assert f"{package}/" in tree, package
    assert "placement_lab/" in tree
    for path in [*(ROOT / "megalina").glob("[!_]*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("[!_]*.py")]:
        assert path.stem in tree, path


def test_every_override_of_the_readme_is_a_key_or_a_file() -> None:
    schema = PretrainConfig()
    for command in COMMANDS:
        for key, value in re.findall(r"(?<![\w-])([a-z_.]+)=([^\s,\\]+)", command):
            if key.startswith("hydra."):
                continue
            if key.startswith("simulate."):  # of tools/simulate.py alone
                assert f"{key}=" in (ROOT / "conf" / "simulate.yaml").read_text(), key
                continue
            if "." not in key and (ROOT / "conf" / key).is_dir():
                assert (ROOT / "conf" / key / f"{value}.yaml").is_file(), (key, value)
                continue
            owner: object = schema
            for part in key.split("."):
                owner = getattr(owner, part)


@pytest.mark.parametrize("tool", sorted({c.split()[1] for c in COMMANDS if c.split()[1].startswith("tools/")}))
def test_every_flag_of_the_readme_is_one_of_the_tool(tool: str) -> None:
    help_text = done(runpy.run_path(str(ROOT / tool))["main"], "--help").stdout
    for command in (c for c in COMMANDS if c.split()[1] == tool):
        for flag in re.findall(r"(--[a-z-]+)", command):
            assert flag in help_text, (tool, flag)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pretrain" in c and " -m " not in c and "data/" not in c])
def test_every_configuration_of_the_readme_passes_the_checks(command: str) -> None:
    overrides = shlex.split(command.replace("\\", " "))[2:]
    checked = done(train.main, *overrides, "launch.dry_run=true", "tracker.wandb.mode=disabled")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_two_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("pretrain", "test", "benchmark"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.M)
