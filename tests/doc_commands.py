"""The commands that documents print, as words: of code blocks and of `python ...` within a text."""

import re
import shlex
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "log.md")  # the log has commands of its day
SCRIPT = re.compile(r"(pretrain_gpt_moe|tools/\w+|benchmarks/\w+|docs/examples/\w+)\.py")
START = r"(?:sudo )?(?:\.venv/bin/)?(?:python|torchrun)\b"
# a backslash at a line's end goes on with the next line
COMMAND = re.compile(rf"^ {{0,4}}((?:wandb login && )?{START}(?:[^\n\\]|\\\n|\\.)*)|`({START}[^`]*)`", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Command:
    document: str
    script: str  # pretrain_gpt_moe.py, tools/plan.py, ...
    words: tuple[str, ...]  # what follows it
    world: int  # ranks that something else starts; 0: nothing does

    def __str__(self) -> str:
        return " ".join((self.document, self.script, *self.words))

    @property
    def overrides(self) -> list[str]:
        before = ("", *self.words)  # what these flags are given has equals signs, too
        return [
            word
            for flag, word in zip(before, self.words, strict=False)
            if "=" in word and not word.startswith("-") and flag not in ("--only", "--variant")
        ]

    @property
    def flags(self) -> list[str]:
        return [word.split("=")[0] for word in self.words if re.fullmatch(r"--[a-z].*", word)]

    def jobs(self) -> list[list[str]]:
        """Its overrides; with -m those of each job."""
        if not {"-m", "--multirun"} & {*self.words}:
            return [self.overrides]
        pairs = [word.split("=", 1) for word in self.overrides]
        return [list(job) for job in product(*([f"{k}={v}" for v in values.split(",")] for k, values in pairs))]


def commands_of(path: Path) -> list[Command]:
    return commands_in(path.read_text(), path.name)


def commands_in(text: str, document: str) -> list[Command]:
    found = []
    for match in COMMAND.finditer(text):
        line = (match[1] or match[2]).replace("\\\n", " ").replace("\n", " ")
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a sentence
            continue
        places = [i for i, word in enumerate(words) if SCRIPT.fullmatch(word)]
        for place, end in zip(places, [*places[1:], len(words)]):
            inner = words[place + 1 : end]
            own = inner[: inner.index("--")] if "--" in inner else inner
            found.append(Command(document, words[place], tuple(own), _world(words[:place])))
    return found


def _world(before: list[str]) -> int:
    """Of torchrun or tools/emulate_cluster.py."""
    given = {flag: int(value) for flag, value in zip(before, before[1:]) if value.isdigit()}
    if "torchrun" in before:
        return given.get("--nnodes", 1) * given.get("--nproc-per-node", 1)
    return given["--nodes"] * given.get("--ranks-per-node", 1) if "--nodes" in given else 0
