"""The console: a command's standard streams, how the command ends, and a line that says how far it is.

What users typed is printed, whatever encoding their terminal has; and a command whose reader has gone away (`| head`) ends as
other tools do, without a word and with the exit code of SIGPIPE.
"""

import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

READER_GONE = 141  # exit code, as a shell has it of what SIGPIPE ended
INTERRUPTED = 130  # exit code, as a shell has it of what SIGINT ended
LINE_EVERY_S = 10.0


def command(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` as this process's command, with its exit code.  Ctrl-C ends it without a traceback."""
    sys.stdout, sys.stderr = console(sys.stdout), console(sys.stderr)
    try:
        try:
            code = main() or 0
        except SystemExit as error:
            code = error.code  # type: ignore[assignment]  # an argument parser's, a number too
        sys.stdout.flush()  # here, since an error while Python exits is printed as "Exception ignored"
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def console(stream: TextIO) -> TextIO:
    """The same file, to which every text can be written; SystemExit at the first write after its reader went away.

    A character that the encoding lacks becomes "?" (on stderr its number, as Python has it there).  A stream that is no file of
    the system's, as tests have them, is returned as it is."""
    try:
        file = _Pipe(stream.fileno(), "wb", closefd=False)
    except (OSError, ValueError, AttributeError):  # no file behind it; closed; None where the process has none
        return stream
    assert isinstance(stream, io.TextIOWrapper)
    stream.flush()
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # as Python itself does with -u
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "backslashreplace" else "replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Pipe(io.FileIO):
    """Ends the process as SIGPIPE would, with its `finally` blocks run.

    SystemExit is none of the errors that programs put into words.  SIGPIPE would also end a process for a closed socket."""

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]  # typeshed's Buffer is newer than Python 3.11
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what is still said on the way out
            os.close(nowhere)
            raise SystemExit(READER_GONE) from None


def check_text(words: Sequence[str], what: str) -> None:
    """ValueError if one of `words` of the command line isn't UTF-8.  Python hands such bytes on as halves of characters, which
    nothing can encode."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            number = len(word[: error.start].encode())
            raise ValueError(
                f"{what} {word.encode(errors='replace').decode()!r} is not UTF-8 (byte {number + 1} is "
                f"0x{os.fsencode(word)[number]:02x}): convert it, or set your terminal to UTF-8"
            ) from None


class StatusLine:
    """How far a command is, on stderr.

    On a terminal one line that is written over.  Anywhere else, such as in a log, a line of its own every ten seconds, the
    first of them after ten."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`stream`: sys.stderr unless given."""
        self._stream, self._clock = stream or sys.stderr, clock
        self._live, self._shown_s = self._stream.isatty(), clock()
        self._under_way = False

    def show(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps can't be written over
            print(f"\r\x1b[K{text[:width]}", end="", file=self._stream, flush=True)
            self._under_way = True
        elif self._clock() - self._shown_s >= LINE_EVERY_S:
            print(text.rstrip(), file=self._stream, flush=True)
            self._shown_s = self._clock()

    def end(self) -> None:
        """Takes the line away: what is printed next begins a line."""
        if self._under_way:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._under_way = False
