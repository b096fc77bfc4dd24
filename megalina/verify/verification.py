"""A verification: row after row is run on ranks and held to its reference; where they differ, the cause is looked for."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from megalina.config import PretrainConfig
from megalina.rank_pool import RanksFailed
from megalina.verify.compare import compare
from megalina.verify.diagnosis import UNKNOWN, diagnose
from megalina.verify.layouts import Choices, Row, config_of
from megalina.verify.on_ranks import Pool
from megalina.verify.recording import Recording
from megalina.verify.reference import detail, record, reference_config
from megalina.verify.shrink import STEPS
from megalina.verify.start import random_batches

KEPT = 64  # references; a row's is often the last one's


@dataclass(frozen=True, slots=True)
class Result:
    """Of one row."""

    row: Row
    equal: bool
    first_difference: str  # for people; empty where all is equal
    largest_error: float  # relative to the largest magnitude of each quantity; inf where integers differ or nothing came
    largest_share: float  # of what is allowed; below 1 where all is equal
    seconds: float
    failed: str = ""  # why the row could not be run
    named: str = ""  # the cause's name, as far as the numbers tell
    cause: str = ""  # the same for people
    candidates: tuple[str, ...] = ()  # names of all causes that explain it


class References:
    """Recordings of one process, made when they are first asked for."""

    def __init__(self) -> None:
        self._recordings: dict[str, Recording] = {}

    def of(self, config: PretrainConfig, steps: int) -> Recording:
        """For a row's configuration."""
        key = f"{steps} {reference_config(config)}"
        if key in self._recordings:
            self._recordings[key] = self._recordings.pop(key)  # last used, last dropped
        else:
            self._recordings[key] = record(config, random_batches(config, steps))
        if len(self._recordings) > KEPT:
            del self._recordings[next(iter(self._recordings))]
        return self._recordings[key]


def verify(
    choices: Choices,
    rows: Sequence[Row],
    *,
    device: str = "cpu",
    plant: str = "",
    steps: int | Callable[[Row], int] = STEPS,
) -> Generator[Result, None, None]:
    """A result for each row, in order.  Close the iterator (or end it) and no process is left.  `steps`: of all, or of a row."""
    references = References()
    with Pool(device=device) as pool:
        for row in rows:
            started_s = time.perf_counter()
            config, number = config_of(choices, row), steps if isinstance(steps, int) else steps(row)
            batches = random_batches(config, number)
            pool.start_row(config, row.layout, batches, plant)
            reference = references.of(config, number)  # while the ranks work
            try:
                recording = pool.finish_row(config, row.layout, batches)
            except RanksFailed as error:
                yield _failed(row, str(error), time.perf_counter() - started_s)
                continue
            yield result_of(row, reference, recording, started_s)


def result_of(row: Row, reference: Recording, recording: Recording, started_s: float) -> Result:
    """The comparison of a row, and its diagnosis where it differs.  `started_s`: of time.perf_counter."""
    found = compare(reference, recording)
    named, cause, candidates = "", "", tuple[str, ...]()
    if found.first is not None:
        assert recording.layout is not None
        detail(reference, recording.layout)
        diagnosis = diagnose(reference, recording)
        named, cause = diagnosis.named, diagnosis.sentence
        candidates = tuple(dict.fromkeys(c.name for c in diagnosis.candidates))
    return Result(
        row=row,
        equal=found.first is None,
        first_difference=str(found.first or ""),
        largest_error=found.largest_error,
        largest_share=found.largest_share,
        seconds=time.perf_counter() - started_s,
        named=named,
        cause=cause,
        candidates=candidates,
    )


def common_cause(results: Sequence[Result]) -> str:
    """The one name that explains every row that differs; empty where nothing differs, unknown where none does.

    Axes of one size make causes look alike in a row; another row tells them apart.
    """
    different = [r for r in results if not r.equal]
    if not different:
        return ""
    votes: dict[str, int] = {}
    for r in different:
        for name in dict.fromkeys((r.named, *r.candidates)):
            votes[name] = votes.get(name, 0) + 1
    shared = [name for name, count in votes.items() if count == len(different) and name not in ("", UNKNOWN)]
    return max(shared, key=lambda name: sum(r.named == name for r in different), default=UNKNOWN)


def _failed(row: Row, why: str, seconds: float) -> Result:
    first = why.splitlines()[0]
    return Result(row, False, f"failed: {first}", float("inf"), float("inf"), seconds, failed=why)
