"""Recipes: experiments that are there, each with the command that runs it.

python tools/examples.py              all of them
python tools/examples.py laptop       one, with its file
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalina.arguments import Parser
from megalina.compose import CONF

HEADER = "# @package"  # Hydra's line
INDENT = "   "  # of commands among comments


@dataclass(frozen=True, slots=True)
class Recipe:
    """`about`: the sentences that its file begins with; `command`: what runs it."""

    name: str
    about: str
    command: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(map(_name, _files())), help="show this one's file")
    name = parser.parse_args(argv).name
    if name:
        print((CONF / "experiment" / f"{name}.yaml").read_text(), end="")
        return 0
    print("\n\n".join(f"{recipe.name}: {recipe.about}\n{recipe.command}" for recipe in map(read, _files())))
    return 0


def read(file: Path) -> Recipe:
    """Of an experiment's file: sentences are its first comments, indented lines among them are the command."""
    comments = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        comments += [] if line.startswith(HEADER) else [line[1:]]
    command = "\n".join(line.rstrip() for line in comments if line.startswith(INDENT))
    about = " ".join(line.strip() for line in comments if not line.startswith(INDENT))
    return Recipe(_name(file), about, command or f"{INDENT}python pretrain_gpt_moe.py experiment={_name(file)}")


def _files() -> list[Path]:
    return sorted((CONF / "experiment").glob("*.yaml"))


def _name(file: Path) -> str:
    return file.stem
