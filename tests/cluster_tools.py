"""For tests of the emulated cluster: an `ip` that makes nothing, and the tool as a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megalina import namespaces

ROOT = Path(__file__).resolve().parent.parent


class Planted:
    """An `ip` and a `tc` that make nothing, and say yes to everything but what a test has changed.  Namespaces are lines of a
    file, and a command in one runs outside."""

    def __init__(self, folder: Path):
        self.calls_path, self.names_path = folder / "calls", folder / "names"
        self.calls_path.touch()
        self.names_path.touch()
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.change()

    def change(self, *, ip: str = "", tc: str = "") -> None:
        """Shell code that comes first, `case "$*" in` and all."""
        kept = (
            f'case "$*" in\n'
            f'"netns add "*) echo "$3" >> {self.names_path};;\n'
            f'"netns list") cat {self.names_path};;\n'
            f'"netns del "*) sed -i "/^$3\\$/d" {self.names_path};;\n'
            f'"netns exec "*/proc/sys/net/ipv4/*) ;;\n'
            f'"netns exec "*) shift 3; exec "$@";;\n'
            f"esac\n"
        )
        for name, code in (("ip", f"{ip}\n{kept}"), ("tc", tc)):
            script = self.folder / name
            script.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.calls_path}\n{code}\n')
            script.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.calls_path.read_text().splitlines()

    @property
    def names(self) -> list[str]:
        return self.names_path.read_text().split()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Tool:
    """The tool as a process of its own, whose ranks set `traps`, write their numbers to pid.N, and run `script`."""

    def __init__(self, folder: Path, script: str, *arguments: str, traps: str = ":"):
        self.folder = folder
        # Also where we are not root, where our locks are, and with the Ctrl-C that a job in the background doesn't have.
        program = (
            "import os, signal, sys; os.geteuid = lambda: 0; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from pathlib import Path; from megalina import namespaces; from tools.emulate_cluster import main\n"
            f"namespaces.LOCKS = Path({str(namespaces.LOCKS)!r}); sys.exit(main())"
        )
        ready = f"{traps}; echo $$ > {folder}/part.$RANK; mv {folder}/part.$RANK {folder}/pid.$RANK; {script}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "--nodes", "2", *arguments, "--", "sh", "-c", ready],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> list[int]:
        """Of its ranks, once they are there."""
        wait_for(lambda: len(list(self.folder.glob("pid.*"))) == 2, "the ranks don't start")
        return [int(path.read_text()) for path in sorted(self.folder.glob("pid.*"))]

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err
