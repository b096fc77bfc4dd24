"""Writes docs/config.md: every setting with its type, default and comment, from megalina/config.py and conf/.

python tools/write_config_docs.py
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from megalina.compose import CONF

ROOT = Path(__file__).resolve().parent.parent
HEADER = """# Configuration

Made by `python tools/write_config_docs.py` from `megalina/config.py` and `conf/`; change those, not this file.

A setting is changed on the command line by its dotted name (`train.steps=200`), a whole group by the name of one of its files
(`model=laptop` reads `conf/model/laptop.yaml`). Files hold what differs from the defaults below. An unknown name or a value of
the wrong type is an error before anything starts, with the nearest name suggested. `--cfg job` prints the result, and a run keeps
it in `config.yaml` in its folder.

An experiment (`experiment=laptop`) is a file that picks a file of each group and changes settings on top: copy one in
`conf/experiment/` to keep a recipe. What is given on the command line wins over it.

Of the published models, DeepSeek-V2-Lite has no file: its multi-head latent attention is left out here.
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
    comments = [line.partition("  # ")[2].strip() for line in source.splitlines()]
    parts = [HEADER]
    for group in fields(classes["PretrainConfig"]):
        parts += section(ast.unparse(group.target), ast.unparse(group.annotation), classes, comments)
    parts += section("infer", "InferConfig", classes, comments)
    parts += ["## experiment", "", *options("experiment")]
    return "\n".join(parts).rstrip() + "\n"


def section(group: str, schema: str, classes: dict[str, ast.ClassDef], comments: list[str]) -> list[str]:
    head = [f"## {group}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
    return [*head, *rows(group, schema, classes, comments), "", *options(group)]


def rows(prefix: str, schema: str, classes: dict[str, ast.ClassDef], comments: list[str]) -> list[str]:
    found = []
    for field in fields(classes[schema]):
        name, kind = f"{prefix}.{ast.unparse(field.target)}", ast.unparse(field.annotation)
        if kind in classes:
            found += rows(name, kind, classes, comments)
            continue
        assert field.value is not None
        default = "[]" if "default_factory=list" in ast.unparse(field.value) else written(ast.literal_eval(field.value))
        comment = comments[field.lineno - 1].replace("|", "\\|")
        found.append(f"| `{name}` | {kind} | {f'`{default}`' if default else 'empty'} | {comment} |")
    return found


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
    sys.exit(main())
