"""A bounded process: code with a limit of memory and time; a bomb or a crash in it is an outcome, not the end of the tests."""

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# Each attempt prints "ok", or the type of what it raised and its message; then the most memory that it took on top.
_START = """
import resource, sys
def attempt(name, call):
    try:
        call()
        print(f"{name}\\tok\\t")
    except BaseException as error:
        print(f"{name}\\t{type(error).__name__}\\t{ascii(str(error))[1:-1]}", flush=True)
def limit(extra_mb):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_mb * 2**20,) * 2)
"""


def outcomes(code: str, *arguments: str, timeout_s: float = 60) -> dict[str, tuple[str, str]]:
    """{name: (what was raised or "ok", its message)} of each `attempt(name, call)` in `code`.

    `code` calls `limit(extra_mb)` after its imports; `arguments` are its sys.argv[1:].  A process that crashes fails."""
    done = subprocess.run(
        [sys.executable, "-c", _START + code, *arguments],
        cwd=_ROOT, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: (kind, message) for name, kind, message in lines}


def spoiled(data: bytes, edits: list[tuple[int, int]], cut: int) -> bytes:
    """The bytes with some replaced (place, value) and, where `cut` is not 0, the last ones left out; places are taken modulo."""
    changed = bytearray(data)
    for place, value in edits:
        changed[place % len(changed)] = value
    return bytes(changed[: len(changed) - cut % len(changed)])
