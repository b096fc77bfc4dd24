"""What command lines give: numbers with their ranges, files that can be written; a mistake is one line."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

MOST = 2**63 - 1  # of a whole number without a limit of its own
LARGEST = 1e18  # of another number without one


class Parser(argparse.ArgumentParser):
    """As argparse's, but a mistake is one line, without the usage of all other options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}; see --help\n")


def whole(low: int = 0, high: int = MOST) -> Callable[[str], int]:
    """A type for add_argument: a whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]} must be a whole number from {low} to {high}")
        return value

    return read


def number(low: float = 0.0, high: float = LARGEST, *, above: bool = False) -> Callable[[str], float]:
    """A type for add_argument: a number from `low`, or with `above` from above `low`, to `high`."""

    limits = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text[:40]} must be a number {limits}")
        return value

    return read


def new_file(text: str) -> Path:
    """A type for add_argument: a file whose folder is there.  Told before anything runs, as it is written at the end."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.absolute().parent}")
    return path
