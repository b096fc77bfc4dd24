"""A table of faults: what a job says and does about each, how soon, and what is left of it.

    python benchmarks/faults.py --json faults.json                  all, some minutes on 2 cores
    python benchmarks/faults.py --only kill_rank swap_buckets       --list: their names

Each fault meets a real job of the public command: a small model on 2 or 4 ranks (ep=2, ZeRO-1), hang.timeout_s=3.  Signals and
damage come from outside, to the command as it is; what can't come from outside is planted in the ranks (fault/plants.py).

"message" is the time from the fault to the last line that its explanation must have, "end" to the end of the last process of the
job.  A damaged checkpoint is met by the next start of the command; its time counts from where the ranks begin to look at it.

Exit code 0: each fault was explained (rank, step, instruction, call site or file, as far as there is one) within 10 s, the job
ended in that time with the exit code that it must have or went on as it must, and no process was left.  Needs Linux: /proc says
which processes belong to a job.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `benchmarks`, of which this is a program

from benchmarks.fault.cases import FAULTS, Fault, Outcome, core, explained, problems, seconds, table
from benchmarks.fault.jobs import Job

SHOWN_COLUMNS = 200


def outcome_of(fault: Fault, folder: Path) -> Outcome:
    """Run the job with its fault.  In the end none of its processes is there, whatever happens."""
    job = Job(fault.name, folder, fault.ranks)
    try:
        command = fault.strike(job)
        command.wait()
        code, left = command.launcher.poll(), command.left()
        end_s = time.time()
        wrong = fault.after(job) if code is not None else []
        left += [number for start in job.starts if not start.running for number in start.left()]
        job.end_all()
    except (RuntimeError, OSError) as error:
        return Outcome(None, None, None, 0, list(fault.must), [], [str(error)])
    finally:
        job.end_all()
    message_s, missing, explanation = explained(command.lines, fault.must)
    begin_s = job.fault_began()
    if begin_s is None:
        wrong.append("the fault never began")
        begin_s = end_s
    return Outcome(
        code,
        message_s - begin_s if message_s is not None and not missing else None,
        end_s - begin_s if code is not None and not fault.goes_on else None,
        len(set(left)),
        missing,
        explanation or [line for _, line in command.lines if fault.must] or command.text.splitlines()[-1:],
        wrong,
        command.text,
    )


def row_of(fault: Fault, outcome: Outcome) -> dict[str, Any]:
    wrong = problems(fault, outcome)
    return {
        "fault": fault.name,
        "planted": fault.what,
        "message": seconds(outcome.message_s),
        "end": "went on" if fault.goes_on and not wrong else seconds(outcome.end_s),
        "code": "-" if outcome.code is None else str(outcome.code),
        "left": str(outcome.left),
        "explained": "no" if outcome.missing else "yes" if fault.must else "(nobody left)",
        "good": "no" if wrong else "yes",
    }


def write_tokens(prefix: Path) -> None:
    import numpy as np

    from megalina.data.indexed import IndexedWriter

    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(400):
            start, count = int(rng.integers(512)), int(rng.integers(20, 200))
            writer.add_document((start + np.arange(count) * 7 + rng.integers(0, 3, count)) % 512)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file, with all that each job said")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS], help="these faults alone")
    parser.add_argument("--list", action="store_true", help="names and what they are; nothing is run")
    parser.add_argument("--verbose", action="store_true", help="whole explanations, not only the lines that they must have")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    if options.list:
        print(table([{"fault": fault.name, "planted": fault.what} for fault in faults]))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # we end what we started; and a shell's background job would ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    begin_s, results, rows = time.monotonic(), [], []
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        folder = Path(name)
        write_tokens(folder / "tokens")
        for fault in faults:
            outcome = outcome_of(fault, folder)
            wrong, row = problems(fault, outcome), row_of(fault, outcome)
            rows.append(row)
            results.append({**row, **vars(outcome), "core": core(outcome.explanation, fault.must), "wrong": wrong})
            print(f"{fault.name}: {'; '.join(wrong) or 'as it must be'}", file=sys.stderr, flush=True)
    print(table(rows))
    for result in results:
        shown = result["explanation"] if options.verbose else result["core"]
        print(f"\n{result['fault']}: {result['planted']}")
        print("\n".join(f"  | {line if options.verbose else line[:SHOWN_COLUMNS]}" for line in shown))
        print("\n".join(f"  WRONG: {line}" for line in result["wrong"]), end="\n" if result["wrong"] else "")
    bad = sum(bool(result["wrong"]) for result in results)
    wall_s = round(time.monotonic() - begin_s, 1)
    print(f"\n{len(results)} faults, {bad} not as they must be; {wall_s:.0f} s in all")
    if options.json:
        machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}
        options.json.write_text(json.dumps({"faults": results, "wall_s": wall_s, **machine, "good": not bad}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
