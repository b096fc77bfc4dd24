"""What a host pays for a step's instructions, now and at an earlier commit, in turns.

    python benchmarks/host_time.py --before 8515798 --rounds 3 --json FILE     (nothing else may run; 3 minutes a round)

Both run `tools/measure_cluster.py --host`, each its own, on lists that compute next to nothing: what is left is interpreter,
executor, autograd, operators' own overhead and the handing over to the library, which the host of a GPU pays as well.
Microseconds of CPU time of the program's thread per instruction, by what it does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = ", tiny"  # behind the names of lists that compute next to nothing
GROUPS = ("blocks", "router and permutes", "update", "submit", "arrivals")

Found = Mapping[str, Mapping[str, Any]]  # by list: the fields of `HostTime`


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder)
        if not checked_out(args.before, before):
            print(f"there is no commit {args.before}", file=sys.stderr)
            return 2
        rounds: list[tuple[Found, Found]] = []
        for number in range(args.rounds):
            pair = {where: measured(where, ranks=args.ranks, steps=args.steps) for where in turn(before, number)}
            rounds.append((pair[before], pair[ROOT]))
            print(f"round {number + 1}/{args.rounds}", file=sys.stderr, flush=True)
    print(f"{args.ranks} ranks, {args.rounds} rounds in turns, medians; us of CPU time per instruction: {args.before} > now\n")
    print(table(rounds))
    if args.json:
        args.json.write_text(json.dumps({"rounds": [{"before": b, "now": n} for b, n in rounds]}, indent=1) + "\n")
    return 0


def turn(before: Path, number: int) -> Sequence[Path]:
    """Who is first changes from round to round."""
    return (before, ROOT) if number % 2 == 0 else (ROOT, before)


def checked_out(commit: str, folder: Path) -> bool:
    archive = folder.with_suffix(".tar")
    command = ["git", "-C", str(ROOT), "archive", "-o", str(archive), commit]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return False
    subprocess.run(["tar", "-xf", str(archive), "-C", str(folder)], check=True)
    archive.unlink()
    return True


def measured(where: Path, *, ranks: int, steps: int) -> Found:
    """By the tool of the checkout `where`, with its own library."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "host.json"
        options = ["--host", "--ranks", str(ranks), "--steps", str(steps), "--json", str(out)]
        command = [sys.executable, str(where / "tools" / "measure_cluster.py"), *options]
        subprocess.run(command, cwd=where, env={**os.environ, "PYTHONPATH": str(where)}, check=True, stdout=subprocess.DEVNULL)
        found: Found = json.loads(out.read_text())
        return found


def per_instruction(one: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds by group, the loop between instructions and the whole among them."""
    cpu_s, count = one["cpu_s"], one["instructions"]
    out = {group: cpu_s[group] / count * 1e6 for group in GROUPS}
    out["between"] = (one["thread_s"] - sum(cpu_s.values())) / count * 1e6
    return out | {"all": one["thread_s"] / count * 1e6}


def cells(rounds: Sequence[Sequence[Found]]) -> list[list[str]]:
    """The head and a row for each list, of rounds of (before, now).  The ratio is the median over rounds of now over before, with
    its range."""
    columns = (*GROUPS, "between", "all")
    rows = [["list", "instructions", *columns, "now over before"]]
    for name in (name for name in rounds[0][0] if name.endswith(TINY)):
        pairs = [(per_instruction(before[name]), per_instruction(now[name])) for before, now in rounds]
        medians = [
            f"{statistics.median(b[column] for b, _ in pairs):.0f} > {statistics.median(n[column] for _, n in pairs):.0f}"
            for column in columns
        ]
        ratios = [now["all"] / before["all"] for before, now in pairs]
        last = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        counts = [found[name]["instructions"] for found in rounds[-1]]
        shown = str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} > {counts[1]}"
        rows.append([name.removesuffix(TINY), shown, *medians, last])
    return rows


def table(rounds: Sequence[Sequence[Found]]) -> str:
    """`cells` in Markdown."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells(rounds))
    return "\n".join([head, "|---" * len(cells(rounds)[0]) + "|", *rows])


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--before", required=True, metavar="COMMIT", help="the earlier one")
    out.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    out.add_argument("--ranks", type=int, default=2, metavar="N", help="default: 2")
    out.add_argument("--steps", type=int, default=20, metavar="N", help="of each list in each round (default: 20)")
    out.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    return out


if __name__ == "__main__":
    sys.exit(main())
