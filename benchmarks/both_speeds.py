"""What the host costs a step on the emulated cluster: the ladder in slow motion and at natural speed, in turns.

    sudo .venv/bin/python benchmarks/both_speeds.py --json FILE    (nothing else may run; a round takes 15 minutes a setting)

In slow motion links and devices are slower by a factor, by which all figures are divided, so that the host's own time shrinks
by it too.  How much longer a step takes at natural speed is therefore what the host adds, real math and TCP of all ranks on
this machine's cores among it.  `tools/compare_strategies.py --suite ladder` runs once for each setting, speed and round; each
run chooses `auto`'s list anew, with the host as it is.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalina.arguments import number, whole
from megalina.compare.ladder import LADDER

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "eager"  # the fastest of those that the tool has run, whose names begin with it

Found = Mapping[str, Any]  # a setting, as in the tool's JSON


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    names = [name.strip() for name in args.only.split(",")]
    known = [setting.name for setting in LADDER]
    if unknown := [name for name in names if name not in known]:
        print(f"--only: the ladder has no {', '.join(unknown)}, only {', '.join(known)}", file=sys.stderr)
        return 2
    rounds: dict[str, list[tuple[Found, Found]]] = {name: [] for name in names}
    for turn in range(args.rounds):
        for name in names:
            speeds = (args.slow_motion, 1.0) if turn % 2 == 0 else (1.0, args.slow_motion)
            found = {speed: measured(name, args.strategies, speed) for speed in speeds}
            rounds[name].append((found[args.slow_motion], found[1.0]))
            print(f"round {turn + 1}/{args.rounds}: {name}", file=sys.stderr, flush=True)
    print(f"{args.slow_motion:g} times in slow motion and at natural speed, {args.rounds} rounds in turns, medians (emulated)\n")
    print(table(rounds))
    if args.json:
        both = {name: [{"slow": slow, "natural": natural} for slow, natural in pairs] for name, pairs in rounds.items()}
        args.json.write_text(json.dumps({"slow_motion": args.slow_motion, "settings": both}, indent=1) + "\n")
    return 0


def measured(setting: str, strategies: str, slow_motion: float) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        options = ["--only", setting, "--strategies", strategies, "--slow-motion", f"{slow_motion:g}", "--json", str(out)]
        command = [sys.executable, str(ROOT / "tools" / "compare_strategies.py"), "--suite", "ladder", *options]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found: Found = json.loads(out.read_text())["settings"][0]
        return found


def cells(rounds: Mapping[str, Sequence[tuple[Found, Found]]]) -> list[list[str]]:
    """The head and a row for each setting and strategy, of its rounds of (in slow motion, at natural speed).  Overrun: the share
    of the devices' time by which real math was late, at natural speed."""
    rows = [
        ["setting", "strategy", "slow motion, ms", "natural, ms", "natural over slow", "longer: compute, waits, ms", "overrun"]
    ]
    for setting, pairs in rounds.items():
        for name in (name for name in pairs[0][0]["strategies"] if not name.startswith(f"{BASELINE} ")):
            both = [(slow["strategies"][name], natural["strategies"][name]) for slow, natural in pairs]
            ratios = [natural["median_step_s"] / slow["median_step_s"] for slow, natural in both]
            longer = [
                statistics.median(natural[what] - slow[what] for slow, natural in both) * 1e3 for what in ("compute_s", "idle_s")
            ]
            rows.append(
                [
                    setting,
                    name,
                    f"{statistics.median(slow['median_step_s'] for slow, _ in both) * 1e3:.0f}",
                    f"{statistics.median(natural['median_step_s'] for _, natural in both) * 1e3:.0f}",
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    ", ".join(f"{ms:+.0f}" for ms in longer),
                    f"{statistics.median(natural['overrun_fraction'] for _, natural in pairs):.1%}",
                ]
            )
    return rows


def table(rounds: Mapping[str, Sequence[tuple[Found, Found]]]) -> str:
    """`cells` in Markdown."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells(rounds))
    return "\n".join([head, "|---" * len(cells(rounds)[0]) + "|", *rows])


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--only", default="4x1 light,4x1 heavy", metavar="A,B", help="settings (default: those of four ranks)")
    out.add_argument("--strategies", default="auto", metavar="A,B", help="default: auto; eager always runs")
    out.add_argument("--slow-motion", type=number(1.0, above=True), default=3.0, metavar="X", help="default: 3")
    out.add_argument("--rounds", type=whole(1, 100), default=2, metavar="N", help="default: 2")
    out.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    return out


if __name__ == "__main__":
    sys.exit(main())
