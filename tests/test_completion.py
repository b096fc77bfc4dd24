"""megalina completion: bash completes commands, settings and values, and takes the script as it is."""

import shutil
import subprocess

import pytest

from megalina.cli import completion
from megalina.cli.main import COMMANDS
from tests.commands import done

BASH = shutil.which("bash")


def completed(*words: str) -> list[str]:
    """What bash offers for the last of these words, which bash has split at = ."""
    assert BASH is not None
    script = completion.script(list(COMMANDS))
    listed = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _megalina; printf "%s\\n" "${{COMPREPLY[@]}}"'
    run = subprocess.run([BASH, "--norc", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout.split()


@pytest.mark.skipif(BASH is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("megalina", "tr"), ["train"]),
        (("megalina", "train", "parallel.redu"), ["parallel.reduce="]),
        (("megalina", "train", "parallel.reduce", "=", "by"), ["by_node"]),
        (("megalina", "train", "experiment", "="), ["gpt2_moe_cluster", "ladder", "laptop"]),
        (("megalina", "plan", "train.ledger=t"), ["train.ledger=true"]),  # zsh, and bash without = in COMP_WORDBREAKS
        (("megalina", "generate", "runs"), []),  # files
    ],
)
def test_bash_completes(words: tuple[str, ...], expected: list[str]) -> None:
    assert completed(*words) == expected


def test_every_command_is_offered_and_the_script_is_what_is_printed() -> None:
    assert set(completion.OVERRIDDEN) <= set(COMMANDS)
    assert done(completion.main).stdout == completion.script(list(COMMANDS))
