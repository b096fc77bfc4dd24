"""A command run in this process: what a process of its own would print and return, without seconds of imports."""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def done(main: Callable[[Sequence[str]], int], *arguments: object) -> Done:
    """`main` with these arguments.  What its own processes print is not seen."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's way
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
