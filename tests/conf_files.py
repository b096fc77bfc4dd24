"""The files of conf/, and what choosing one gives: for tests that only read it, composed once."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from megalina.compose import compose
from megalina.config import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("*/*.yaml") if path.parent.name != "infer")
ALONE: dict[str, list[str]] = {}  # by group: files that change nothing else; the default model sets the vocabulary, too
for file in FILES:
    if file.parent.name not in ("model", "experiment", "pipeline"):
        ALONE.setdefault(file.parent.name, []).append(file.stem)
MODELS = [path.stem for path in FILES if path.parent.name == "model"]
ROUTERS = [path.stem for path in FILES if path.parent.name == "router"]


@cache
def with_setting(override: str) -> PretrainConfig:
    """For tests that only read it."""
    group, _, name = override.partition("=")
    names = ALONE.get(group, [])
    return of_several(group, names.index(name)) if name in names else compose([override])


def of_several(group: str, number: int) -> PretrainConfig:
    """What choosing a file of a group gives, without choosing it alone: most of the time of a test would go into that."""
    return replace(composed(-1), **{group: getattr(composed(number), group)})


@cache
def composed(number: int) -> PretrainConfig:
    """With the file of this number in every group, -1: the defaults."""
    return compose([f"{group}={names[number % len(names)]}" for group, names in ALONE.items()] if number >= 0 else [])
