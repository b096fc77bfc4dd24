"""docs/results.md: the current figures, from the files in results/, each with its command, date, machine and commit.

    python benchmarks/results_page.py                    write the page anew from what is there
    python benchmarks/results_page.py --check            exit code 1 if the page isn't what the files say
    python benchmarks/results_page.py add FILE --name ladder_4x1_light --kind ladder --machine "O: ..." --command "..." \\
        --date 2026-12-01 --commit 85230de               keep what a command wrote with --json, and write the page

A file holds one command's JSON as it is, but for orders of instructions, which are long, and what is said of it in `about`.
`--kind` says which tables are drawn of it: the names are those in benchmarks/results_tables.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "results", ROOT / "docs" / "results.md"
HEAD = """# Results

Made by `python benchmarks/results_page.py` from the files in `results/`; change those, not this page. Each table names the
command that printed its figures, when, on which machine and at which commit. Negative results and what came before are in the
[log](log.md). Where devices or links are emulated, the table says so; no GPU has run this code yet.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is said of a result beside its figures."""

    kind: str
    title: str
    command: str
    date: str
    machine: str
    commit: str
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.action == "add":
        add(args)
    text = page()
    if args.check:
        if PAGE.read_text() != text:
            print(f"{PAGE.name} isn't what results/ says: run python benchmarks/results_page.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    print(PAGE.relative_to(ROOT))
    return 0


def add(args: argparse.Namespace) -> None:
    """Keep a result.  ValueError for one of another kind."""
    from benchmarks.results_tables import KINDS

    result = without_orders(joined([json.loads(file.read_text()) for file in args.file]))
    about = About(**{name: getattr(args, name) for name in About.__dataclass_fields__})
    try:
        KINDS[about.kind](result)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{args.file[0]} is no result of kind {about.kind}: it lacks {error}") from error
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{args.name}.json").write_text(json.dumps({"about": asdict(about), "result": result}, indent=1) + "\n")


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several files that differ in their settings, one with all settings."""
    return results[0] | ({"settings": [s for r in results for s in r["settings"]]} if len(results) > 1 else {})


def without_orders(value: Any) -> Any:
    """Orders of instructions are most of what there is, and no figures."""
    if isinstance(value, dict):
        return {key: without_orders(of) for key, of in value.items() if key not in ("order", "slowdowns")}
    return [without_orders(of) for of in value] if isinstance(value, list) else value


def page() -> str:
    """The whole of it, results in the order of kinds and names."""
    from benchmarks.results_tables import KINDS

    found = []
    for path in sorted(FOLDER.glob("*.json")):
        held = json.loads(path.read_text())
        found.append((path, About(**held["about"]), held["result"]))
    found.sort(key=lambda one: (list(KINDS).index(one[1].kind), one[0].name))
    return "\n".join([HEAD, *(section(path, about, KINDS[about.kind](result)) for path, about, result in found)])


def section(path: Path, about: About, tables: Sequence[Any]) -> str:
    said = f"{about.date}, machine {about.machine}, commit {about.commit}; [figures](../results/{path.name})"
    lines = [f"## {about.title}", "", *([about.note, ""] if about.note else []), "```sh", about.command, "```", ""]
    for table in tables:
        lines += [*([table.title, ""] if table.title else []), *table.lines(), ""]
    return "\n".join([*lines, said + ".", ""])


def _parser() -> argparse.ArgumentParser:
    from benchmarks.results_tables import KINDS
    from megalina.arguments import Parser

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(action="write", check=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is another one")
    adds = parser.add_subparsers(dest="action", metavar="add").add_parser("add", help="keep what a command wrote with --json")
    adds.add_argument("file", type=Path, nargs="+", metavar="FILE", help="several: each with settings of its own")
    adds.add_argument("--name", required=True, help="of its file in results/")
    adds.add_argument("--kind", required=True, choices=list(KINDS))
    for name in ("title", "command", "date", "machine", "commit"):
        adds.add_argument(f"--{name}", required=True)
    adds.add_argument("--note", default="", help="a sentence or two about it")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # benchmarks
    from megalina.console import command

    command(main)
