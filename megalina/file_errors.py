"""Errors of files, with the file's name: Python gives one to errors of opening a file, and none to those of writing to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError of the block, which writes to `path`, gets that name unless it has one, such as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
