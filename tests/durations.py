"""What each module of the quick suite takes: kept in a file, from which the order of modules and the budget's test follow."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("durations.json")  # {module: seconds}, of `make durations` on an idle machine with two cores
# `make test` shall take 300 s.  Three workers have 900 s then, of which 75 go to imports and collection, and 25 to lint, which
# runs beside them.  Recorded with three, on an idle machine, without lint and with bytecode there (`docs/log.md`, 2026-12-01).
BUDGET_S = 800.0
NEW_S = 10.0  # a module may take so much longer than recorded, and one that isn't recorded so much
GROWN = 3.0  # and so many times as long: others' work on the machine meets some modules more than the rest


def recorded() -> dict[str, float]:
    found: dict[str, float] = json.loads(FILE.read_text())
    return found


def excess(took_s: Mapping[str, float], known_s: Mapping[str, float]) -> list[str]:
    """What is too slow in a run of all modules, one line each; `known_s`: as recorded.

    A busy machine isn't a slow test: the run's seconds are divided by its pace, the sum over recorded modules as they are now
    over the sum as it was recorded."""
    both = took_s.keys() & known_s.keys()
    before_s = sum(known_s[name] for name in both)
    pace = sum(took_s[name] for name in both) / before_s if before_s else 1.0
    lines = []
    for name, seconds in sorted(took_s.items()):
        known, found = known_s.get(name, 0.0), seconds / pace
        if found > GROWN * known + NEW_S:
            lines.append(f"{name} takes {found:.0f} s, recorded are {known:.0f}: make it quicker, or record it: make durations")
    total = sum(known_s.get(name, seconds / pace) for name, seconds in took_s.items())
    if total > BUDGET_S:
        lines.append(f"the modules of `make test` take {total:.0f} s together, at most {BUDGET_S:.0f} are allowed")
    return lines


class Durations:
    """Adds up what modules take; after a run of all quick tests that passed, records it or says what has become slow."""

    def __init__(self) -> None:
        self.took_s = Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not isinstance(report, pytest.SubtestReport):  # its time is in that of its test
            self.took_s[report.nodeid.split("::")[0]] += report.duration  # type: ignore[assignment]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config = session.config
        everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
        quick = config.option.markexpr == "not full"
        if hasattr(config, "workerinput") or session.exitstatus != pytest.ExitCode.OK or not (everything and quick):
            return
        if config.option.record_durations:
            longest_first = sorted(self.took_s.items(), key=lambda item: -item[1])
            FILE.write_text(json.dumps({name: round(seconds, 1) for name, seconds in longest_first}, indent=1) + "\n")
        elif lines := excess(self.took_s, recorded()):  # said and no more: a clock doesn't fail a test
            print("", *lines, sep="\n")
