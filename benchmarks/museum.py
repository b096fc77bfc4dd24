"""The museum of silent bugs, whole: each bug planted and named, each script of torch alone run, and what both take.

    python benchmarks/museum.py --json museum.json
    python benchmarks/museum.py --only norm_without_experts,window_too_wide

A script in museum/ names in its docstring the commands that plant its bug in this project.  Each is a process of its own, as a
user would type it, so its seconds hold imports, the start of four ranks and the reference.  Exit code 1 where a plant isn't
named, takes a minute or more, or a script fails.
"""

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megalina.arguments import Parser, new_file  # noqa: E402
from megalina.console import StatusLine  # noqa: E402

SCRIPTS = {path.stem: path for path in sorted((ROOT / "museum").glob("*.py"))}
LIMIT_S = 60.0  # of a plant


@dataclass(frozen=True, slots=True)
class Exhibit:
    """What one command that plants a bug found, beside the script that shows it."""

    script: str
    plant: str
    named: str  # the cause that was named; "": none
    named_s: float
    script_code: int
    script_s: float

    @property
    def is_well(self) -> bool:
        return self.named == self.plant and self.named_s < LIMIT_S and self.script_code == 0


def commands_of(script: Path) -> list[tuple[list[str], str]]:
    """Of a script's docstring: the words behind `python tools/verify_layouts.py`, and the plant among them."""
    said = " ".join((ast.get_docstring(ast.parse(script.read_text())) or "").split())
    found = re.findall(r"python tools/verify_layouts\.py (.*? --plant (\w+))", said)
    return [(shlex.split(words), plant) for words, plant in found]


def exhibited(name: str) -> list[Exhibit]:
    """One for each command of a script."""
    shown, script_s = _timed([sys.executable, str(SCRIPTS[name])])
    out = []
    with tempfile.TemporaryDirectory(prefix="megalina_museum_") as folder:
        for words, plant in commands_of(SCRIPTS[name]):
            file = Path(folder) / f"{plant}.json"
            _, named_s = _timed([sys.executable, str(ROOT / "tools" / "verify_layouts.py"), *words, "--json", str(file)])
            named = json.loads(file.read_text())["named"] if file.exists() else ""
            out.append(Exhibit(name, plant, named, named_s, shown.returncode, script_s))
    return out


def _timed(command: Sequence[str]) -> tuple["subprocess.CompletedProcess[str]", float]:
    begun_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done, time.monotonic() - begun_s


def line_of(of: Exhibit) -> str:
    script = f"{of.script_s:5.1f} s" if of.script_code == 0 else "fails  "
    named = "named" if of.named == of.plant else f"named {of.named or 'nothing'}"
    return f"{of.plant:<30}  {named:<8} {of.named_s:5.1f} s   script {script}"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    found: list[Exhibit] = []
    status, number = StatusLine(), len(args.only)
    for i, name in enumerate(args.only):
        status.show(f"{i}/{number}  {name}")
        of_script = exhibited(name)
        status.end()
        print("\n".join(map(line_of, of_script)), flush=True)
        found += of_script
    named, ran = sum(of.named == of.plant for of in found), number - len({of.script for of in found if of.script_code})
    slowest_s = max(of.named_s for of in found)
    print(f"{named} of {len(found)} named, the slowest in {slowest_s:.1f} s; {ran} of {number} scripts run")
    if args.json:
        args.json.write_text(json.dumps({"exhibits": [asdict(of) for of in found]}, indent=1) + "\n")
    return 0 if all(of.is_well for of in found) else 1


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SCRIPTS]:
        raise argparse.ArgumentTypeError(f"there is no museum/{unknown[0]}.py")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_names, default=list(SCRIPTS), metavar="A,B", help="scripts in museum/ (default: all)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write what was found")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
