"""Writes docs/config.md: every setting with its type, default, bounds and comment, from megalina/config.py and conf/.

python tools/write_config_docs.py
"""

import argparse
import ast
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalina.compose import CONF

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megalina import config  # noqa: E402
from megalina.validate import in_words  # noqa: E402

ABSURD = 1e9
HEADER = """# Configuration

Made by `python tools/write_config_docs.py` from `megalina/config.py` and `conf/`; change those, not this file.

A setting is changed on the command line by its dotted name (`train.steps=200`), a whole group by the name of one of its files
(`model=laptop` reads `conf/model/laptop.yaml`). Files hold what differs from the defaults below. An unknown name or a value of
the wrong type is an error before anything starts, with the nearest name suggested. `--cfg job` prints the result, and a run keeps
it in `config.yaml` in its folder.

An experiment (`experiment=laptop`) is a file that picks a file of each group and changes settings on top: copy one in
`conf/experiment/` to keep a recipe. What is given on the command line wins over it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description="Write docs/config.md from megalina/config.py and conf/.").parse_args(argv)
    path = ROOT / "docs" / "config.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(document())
    print(path.relative_to(ROOT))
    return 0


def document() -> str:
    source = (ROOT / "megalina" / "config.py").read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    lines = source.splitlines()
    parts = [HEADER]
    for group in fields(classes["PretrainConfig"]):
        parts += section(ast.unparse(group.target), ast.unparse(group.annotation), classes, lines)
    parts += section("infer", "InferConfig", classes, lines)
    parts += ["## experiment", "", *options("experiment")]
    return "\n".join(parts).rstrip() + "\n"


def section(group: str, schema: str, classes: dict[str, ast.ClassDef], lines: list[str]) -> list[str]:
    head = [f"## {group}", "", "| setting | type | default | may be | meaning |", "|---|---|---|---|---|"]
    return [*head, *rows(group, schema, classes, lines), "", *options(group)]


def rows(prefix: str, schema: str, classes: dict[str, ast.ClassDef], lines: list[str]) -> list[str]:
    found, allowed = [], {field.name: field.metadata for field in dataclasses.fields(getattr(config, schema))}
    for field in fields(classes[schema]):
        short, kind = ast.unparse(field.target), ast.unparse(field.annotation)
        name = f"{prefix}.{short}"
        if kind in classes:
            found += rows(name, kind, classes, lines)
            continue
        default = getattr(getattr(config, schema)(), short)
        shown = f"`{written(default)}`" if default != "" else "empty"
        comment = comment_of(field, lines).replace("|", "\\|")
        found.append(f"| `{name}` | {kind} | {shown} | {may_be(allowed[short])} | {comment} |")
    return found


def comment_of(field: ast.AnnAssign, lines: list[str]) -> str:
    """After the field, or where that is too long, in the line above."""
    after = lines[field.lineno - 1].partition("  # ")[2].strip()
    above: list[str] = []
    while not after and (line := lines[field.lineno - 2 - len(above)].strip()).startswith("# "):
        above.insert(0, line[2:])
    return after or " ".join(above)


def may_be(allowed: Mapping[str, Any]) -> str:
    """Choices, or bounds; not the upper one where it only keeps out what is absurd."""
    if "choices" in allowed:
        return ", ".join(f"`{choice}`" for choice in allowed["choices"]) + (", or your own" if allowed["own"] else "")
    if "low" not in allowed:
        return ""
    bounds = in_words(allowed["low"], allowed["high"])
    return bounds.partition(" and ")[0] if allowed["high"] >= ABSURD else bounds


def written(value: object) -> str:
    """As on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def options(group: str) -> list[str]:
    """The group's files with their first comment."""
    paths = sorted((CONF / group).glob("*.yaml"))
    if not paths:
        return []
    lines = ["| file | what it is |", "|---|---|"]
    for path in paths:
        comment = next(line for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line)
        lines.append(f"| `{group}={path.stem}` | {comment[2:]} |")
    return [*lines, ""]


def fields(schema: ast.ClassDef) -> list[ast.AnnAssign]:
    return [node for node in schema.body if isinstance(node, ast.AnnAssign)]


if __name__ == "__main__":
    from megalina.console import command

    command(main)
