"""megalina examples: each experiment with the command that its file gives."""

from pathlib import Path

import pytest

from megalina.cli import examples
from megalina.compose import CONF
from tests.commands import done

NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def test_every_experiment_has_a_sentence_and_a_command() -> None:
    said = done(examples.main)
    assert said.returncode == 0
    for name in NAMES:
        recipe = examples.read(CONF / "experiment" / f"{name}.yaml")
        assert recipe.name == name and len(recipe.about) > 20 and "experiment=" + name in recipe.command
        assert recipe.command.startswith("   ") and f"{name}: {recipe.about}\n{recipe.command}" in said.stdout


def test_a_command_of_several_lines_is_whole_and_a_file_without_one_gets_the_usual(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("# @package _global_\n# What it is.\n#   a \\\n#     b\nx: 1\n# no more\n")
    assert examples.read(file) == examples.Recipe("own", "What it is.", "   a \\\n     b")
    file.write_text("# What it is.\n")
    assert examples.read(file).command == "   python pretrain_gpt_moe.py experiment=own"


@pytest.mark.parametrize("name", NAMES)
def test_a_named_one_is_its_file(name: str) -> None:
    assert done(examples.main, name).stdout == (CONF / "experiment" / f"{name}.yaml").read_text()
    assert done(examples.main, "nothing").returncode == 2
