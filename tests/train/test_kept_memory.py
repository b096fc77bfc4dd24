"""Kept memory costs page faults once; what is freed by default costs them each time."""

import subprocess
import sys

import pytest

from megalina.train.kept_memory import keep_memory

SCRIPT = """
import resource, sys
from megalina.train.kept_memory import keep_memory

if sys.argv[1] == "kept":
    assert keep_memory()
faults = []
for _ in range(12):  # a while, until no small block is where a large one could be
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'x' * (64 * 2**20), b'x' * (48 * 2**20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_memory_that_was_freed_is_used_again() -> None:
    pages = (64 + 48) * 2**20 // 4096
    assert faults("kept") < pages / 100 and faults("given back") > pages / 2


def test_a_library_without_the_call_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_memory()
