"""The order of the modules, what they take, hypothesis's profiles, and which megalina the processes of tests import."""

import gc
import math
import os
import sys
from pathlib import Path

import pytest

import tests.profiles  # noqa: F401  (registers them)
from tests.durations import FILE, Durations, recorded

LONG_IN_FULL = ("tests/perfmodel/sim/test_virtual.py", "tests/parallel/test_random_delays.py")  # half an hour each

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = str(ROOT)  # this one, from whatever folder, also where another clone is installed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"write what each module takes to tests/{FILE.name}")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # while modules are imported, all of which stay
    config.pluginmanager.register(Durations())


class FailuresAtOnce:
    """Names a test as soon as it has failed, with the first line of the reason: `make test-full` runs for more than an hour."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else report.longreprtext).strip().partition("\n")[0]
            self.terminal.ensure_newline()
            self.terminal.write_line(f"{report.nodeid} failed after {report.duration:.0f} s: {reason}")


@pytest.hookimpl(trylast=True)  # when there is a terminal; workers have none
def pytest_sessionstart(session: pytest.Session) -> None:
    if terminal := session.config.pluginmanager.get_plugin("terminalreporter"):
        session.config.pluginmanager.register(FailuresAtOnce(terminal))


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection needs to walk through it again and again.

    And whichever test starts the server that forks ranks: it imports what the ranks of all tests need."""
    if rank_pool := sys.modules.get("megalina.rank_pool"):
        from tests.parallel.ranks import PRELOAD  # torch, of which the process that hands out the tests has no need

        rank_pool.FOR_ALL = (*rank_pool.FOR_ALL, *PRELOAD)  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    gc.enable()


def pytest_runtest_teardown() -> None:
    gc.enable()  # which a trainer that was never closed has not


@pytest.hookimpl(tryfirst=True)  # before those that are full are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long modules first, and those that aren't recorded: workers take one after another, and the last ones should be short."""
    _leave_a_sample(items)
    known_s = recorded() | (dict.fromkeys(LONG_IN_FULL, math.inf) if not config.option.markexpr else {})
    items.sort(key=lambda item: -known_s.get(item.nodeid.split("::")[0], math.inf))


def _leave_a_sample(items: list[pytest.Item]) -> None:
    """Of a test that is `sampled(n)`: n of its cases, evenly spread; the others are full."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("full"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for of_one in cases.values():
        (number,) = of_one[0].get_closest_marker("sampled").args  # type: ignore[union-attr]
        kept = {i * len(of_one) // number for i in range(number)}
        for i, item in enumerate(of_one):
            if i not in kept:
                item.add_marker(pytest.mark.full)
