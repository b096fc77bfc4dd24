"""The quick suite stays within five minutes: what is recorded adds up to no more, and what is new or has grown is named."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.durations import BUDGET_S, excess, recorded

ROOT = Path(__file__).resolve().parent.parent
KNOWN_S = {"tests/a.py": 40.0, "tests/b.py": 20.0, "tests/c.py": 0.5}


def test_the_quick_suite_is_within_its_budget() -> None:
    longest = [f"{name} {seconds:.0f}" for name, seconds in recorded().items()][:10]
    assert sum(recorded().values()) <= BUDGET_S, f"make modules quicker, or tests full; the longest: {longest}"


def test_what_is_recorded_is_there_the_longest_first() -> None:
    assert [name for name in recorded() if not (ROOT / name).is_file()] == [], "make durations"
    assert list(recorded().values()) == sorted(recorded().values(), reverse=True)


def test_a_slow_machine_is_no_slow_test() -> None:
    assert excess(KNOWN_S, KNOWN_S) == []
    assert excess({name: 7 * seconds for name, seconds in KNOWN_S.items()}, KNOWN_S) == []
    assert excess({}, {}) == excess({}, KNOWN_S) == []


def test_a_module_that_is_new_and_slow_is_named() -> None:
    assert excess(KNOWN_S | {"tests/new.py": 9.0}, KNOWN_S) == []
    line = "tests/new.py takes 11 s, recorded are 0: make it quicker, or record it: make durations"
    assert excess(KNOWN_S | {"tests/new.py": 11.0}, KNOWN_S) == [line]
    twice_as_slow = {name: 2 * seconds for name, seconds in KNOWN_S.items()}
    assert excess(twice_as_slow | {"tests/new.py": 22.0}, KNOWN_S) == [line]


def test_a_module_that_has_grown_is_named() -> None:
    assert excess(KNOWN_S | {"tests/c.py": 9.0}, KNOWN_S) == []
    (line,) = excess(KNOWN_S | {"tests/c.py": 20.0}, KNOWN_S)
    assert line.startswith("tests/c.py takes 15 s, recorded are 0:")  # the others' pace is 1.3 with it


def test_many_new_modules_that_are_quick_alone_are_too_much_together() -> None:
    known_s = {"tests/a.py": BUDGET_S - 20}
    new_s = {f"tests/new_{i}.py": 6.0 for i in range(4)}
    assert excess(known_s | new_s, known_s) == [
        f"the modules of `make test` take {BUDGET_S + 4:.0f} s together, at most {BUDGET_S:.0f} are allowed"
    ]


@pytest.mark.full
def test_a_run_of_all_modules_is_recorded_and_compared_with_the_record(tmp_path: Path) -> None:
    """The hooks themselves, in a project of two modules."""
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "durations.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    (tmp_path / "tests" / "profiles.py").touch()  # no hypothesis
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    kept = tmp_path / "tests" / "durations.json"
    kept.write_text("{}")
    for name in "ab":
        sleep = "import time\n\ndef test_it(subtests):\n    with subtests.test():\n        time.sleep(0.5)\n"
        (tmp_path / "tests" / f"test_{name}.py").write_text(sleep)

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout + done.stderr

    code, out = run("-n", "1", "--record-durations")
    assert code == 0, out
    found = json.loads(kept.read_text())
    assert set(found) == {"tests/test_a.py", "tests/test_b.py"} and all(0.5 <= s < 1.0 for s in found.values()), found
    kept.write_text('{"tests/test_a.py": 100}')
    code, out = run()
    assert code == 0 and "2 passed" in out
    assert re.search(r"tests/test_b.py takes \d+ s, recorded are 0: make it quicker, or record it: make durations", out), out
