"""Types a page of docs/ as a reader would, in a copy of the repository: Python blocks in one interpreter, shell blocks in bash,
YAML into the file that the text before it names.  Output isn't compared.  Left out: setting up, and what is for a cluster.

    python tests/typed_page.py tutorial-own-router.md ...     prints what each page took; exit code 1: a block failed
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".venv", ".git", "runs", "site", "wandb", "__pycache__", ".*_cache", ".hypothesis", "multirun", "outputs"
)
BLOCK = re.compile(r"^```(python|sh|bash|yaml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_TYPED = ("make .venv", "data.prefix=PREFIX")
NAMED = re.compile(r"`(conf/[\w/]+\.yaml)`")


def type_page(page: Path) -> None:
    """In the current folder.  CalledProcessError, or what Python raises, for a block that fails."""
    text, names = page.read_text(), dict[str, Any](__name__="__main__")
    for found in BLOCK.finditer(text):
        kind, block = found.groups()
        line = text.count("\n", 0, found.start()) + 1
        if kind == "python":
            exec(compile("\n" * line + block, str(page), "exec"), names)
        elif kind in ("sh", "bash"):
            if any(words in block for words in NOT_TYPED):
                continue
            subprocess.run(["bash", "-e", "-o", "pipefail", "-c", block], check=True)
        else:
            named = NAMED.findall(text[: found.start()])
            Path(named[-1]).write_text(block)


def typed(name: str) -> tuple[float, str]:
    """Seconds, and what a page printed if a block failed, in a copy of the repository and a process of its own."""
    with tempfile.TemporaryDirectory(prefix="megalina_typed_") as folder:
        copy = Path(folder) / "megalina"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT, symlinks=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(copy)}
        words = [sys.executable, str(copy / "tests" / "typed_page.py"), "--here", name]
        began_s = time.perf_counter()
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
        return time.perf_counter() - began_s, "" if not done.returncode else (done.stdout + done.stderr)[-3000:]


def main(words: list[str]) -> int:
    if words[:1] == ["--here"]:
        sys.path.insert(0, str(Path.cwd()))  # what the page writes, as where `python` was started
        type_page(Path("docs", words[1]))
        return 0
    failed = 0
    for name in words or sorted(path.name for path in (ROOT / "docs").glob("tutorial-*.md")):
        seconds, said = typed(name)
        print(f"{name:<32}{seconds:5.0f} s  {'FAILED' if said else 'every block ran'}\n{said}".rstrip(), flush=True)
        failed += bool(said)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
