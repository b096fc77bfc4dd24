"""A file that is there as a whole, or as it was before, whenever its writer is killed; and errors of writing, with its name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when the block ends well, and else is removed.

    `durable`: what is written is on the disk before.  Of two that write at once one wins."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}.new{path.suffix}")  # numpy and matplotlib look at the suffix
    try:
        yield aside
        if durable:
            with aside.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Text is written as UTF-8; what isn't text after all, half of a pair of surrogates, as a question mark."""
    with whole(path, durable=durable) as aside:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError of the block, which writes to `path`, gets that name unless it has one, such as on a full disk: Python names the
    file in errors of opening it, and not in those of writing to it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
