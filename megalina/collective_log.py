"""The log of collectives: what this rank has put on the wire, per axis and in order, and where its program is.

Every rank holds the same list, so on one axis all ranks must submit the same sequence: class, instruction, number, type, size of
a row, and number of elements where that is equal by definition.  An all-to-all's sizes differ by rank, and a message's; there
what i sends to j must be what j receives from i.  (The stages of a pipeline hold lists of their own: there the ranks of one row
of an axis must submit the same.)  Both go into a few numbers that ride on the reduction which closes a step, so a difference is
known on all ranks before anything is updated.  (On gloo a wrong order mixes tensors of equal size without a word.)
"""

import mmap
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

KEPT = 16384  # entries of each axis that can be explained, if the last two steps have so many
NUM_RIDERS = 5  # numbers that ride on a step's reduction
_BITS = 20  # of each half of the hash: its square, summed over 2^13 ranks, is exact in float64
_MIRRORED_BYTES = 256
_RING_BYTES = 2**18  # some 1,500 collectives


@dataclass(frozen=True, slots=True)
class Entry:
    """One collective as this rank submitted it."""

    axis: str
    number: int  # of this axis, from 0
    step: int
    kind: str  # all-to-all | gather | scatter | sum | max | message
    tag: str  # the instruction that started it
    dtype: str
    row: tuple[int, ...]  # shape of a row
    count: int | None  # rows, where all ranks of the axis must have as many; else None
    send: tuple[int, ...]  # rows to each rank of the axis (all-to-all with uneven sizes)
    receive: tuple[int, ...]
    ranks: tuple[int, ...]  # of the axis
    site: str  # FILE:LINE that asked for it

    @property
    def key(self) -> str:
        """What must be equal on all ranks."""
        return _key(self.kind, self.tag, self.dtype, self.row, self.count)

    def describe(self) -> str:
        size = "uneven" if self.count is None else f"{self.count} rows"
        instruction = f"instruction {self.tag} of step {self.step}" if self.tag else f"no instruction, after step {self.step}"
        return f"{self.kind} in {instruction} ({self.dtype}, {size} of {list(self.row)}), at {self.site}"


class Position:
    """Where this rank's program is; the main thread writes it, others read it.

    With `mirror` it is also in a file that outlives a kill."""

    def __init__(self) -> None:
        self.step = 0
        self.tag = ""  # of the instruction that runs; empty between steps
        self.waits = False  # the instruction waits for others
        self.since_s = time.monotonic()  # when it began
        self._file: mmap.mmap | None = None

    def enter(self, tag: str, waits: bool) -> None:
        self.since_s = time.monotonic()  # first: a reader in between must not see a new instruction that is old
        self.tag, self.waits = tag, waits
        if self._file is not None:
            text = f"step {self.step}, instruction {tag}".encode()[: _MIRRORED_BYTES - 1]
            self._file[: len(text) + 1] = text + b"\n"

    def leave(self) -> None:
        """The program is over."""
        self.since_s = time.monotonic()
        self.tag, self.waits = "", False
        if self._file is not None:
            text = f"step {self.step}, between programs\n".encode()
            self._file[: len(text)] = text

    def mirror(self, path: Path) -> None:
        """Keep the position in the file `path` too.  OSError if it can't be written."""
        self._file = _mapped(path, _MIRRORED_BYTES)


def read_mirror(path: Path) -> str:
    """What a rank's file says of where it was: "step 3, instruction F:experts.1.0", or nothing."""
    if not path.is_file():
        return ""
    return path.read_bytes().partition(b"\n")[0].strip(b"\0").decode(errors="replace")


class CollectiveLog:
    """One a rank, shared by the axes of its mesh.  `alike`: all ranks hold one list; else those of a row hold what is the same
    along its axis."""

    def __init__(self, rank: int, *, alike: bool = True):
        self.rank, self.alike = rank, alike
        self._row: dict[str, tuple[int, ...]] = {}  # of each axis: its ranks
        self.position = Position()
        self._hash: dict[str, int] = {}
        self._kept: dict[str, deque[tuple[Any, ...]]] = {}  # fields of entries, which are made when somebody asks
        self._counts: dict[str, int] = {}
        self._checked: dict[str, int] = {}  # numbers at the last riders: what came before has been compared
        self._balance = 0
        self._ring: mmap.mmap | None = None
        self._ring_end = 0
        self._lock = threading.Lock()
        self.here = threading.local()  # `place`: (step, tag) of the instruction on whose behalf this thread submits

    def submit(
        self,
        axis: str,
        ranks: tuple[int, ...],
        kind: str,
        dtype: str,
        row: Sequence[int],
        count: int | None,
        send: Sequence[int] = (),
        receive: Sequence[int] = (),
    ) -> None:
        """Called for each collective by the function that starts it, axis by axis in the order of the program."""
        caller = sys._getframe(1)
        wrapper = caller.f_code.co_filename  # the file of the functions that start collectives: who called those?
        while caller.f_code.co_filename == wrapper and caller.f_back is not None:
            caller = caller.f_back
        step, tag = getattr(self.here, "place", None) or (self.position.step, self.position.tag)
        row, file, line = tuple(row), caller.f_code.co_filename, caller.f_lineno
        code, text = _code(kind, tag, dtype, row, count)
        with self._lock:
            number = self._counts.get(axis, 0)
            self._counts[axis] = number + 1
            if number == 0:
                self._kept[axis], self._row[axis] = deque(maxlen=KEPT), ranks
            self._kept[axis].append((axis, number, step, kind, tag, dtype, row, count, send, receive, ranks, file, line))
            self._hash[axis] = hash((self._hash.get(axis, 0), number, code))
            if count is None:
                me = self.rank
                for other, out, back in zip(ranks, send, receive, strict=True):
                    self._balance += hash((number, me, other, out)) - hash((number, other, me, back))
            if self._ring is not None:
                sizes = f"{send}\t{receive}" if count is None else "\t"
                self._write(f"\nc\t{axis}\t{number}\t{step}\t{text}\t{sizes}\t{_text(ranks)}\t{file}:{line}\t.\n".encode())

    def riders(self) -> list[float]:
        """Numbers to be summed over all ranks; `agree` reads the sums.  What the last ones covered is forgotten."""
        whole = 0
        if self.alike:
            whole = hash(tuple(sorted((crc32(axis.encode()), value) for axis, value in self._hash.items())))
        else:  # what ranks of a row add sums to nothing, if they have submitted the same
            for axis, value in self._hash.items():
                row = self._row[axis]
                self._balance += hash((crc32(axis.encode()), value)) * (len(row) - 1 if self.rank == row[0] else -1)
        low, high = whole & (2**_BITS - 1), (whole >> _BITS) & (2**_BITS - 1)
        balance, self._balance = self._balance & 0xFFFFFFFF, 0
        for axis, kept in self._kept.items():
            before = self._checked.get(axis, 0)
            while kept and kept[0][1] < before:
                kept.popleft()
            self._checked[axis] = self._counts[axis]
        return [float(v) for v in (low, low * low, high, high * high, balance)]

    def entries(self) -> list[Entry]:
        """Those of each axis since the last but one comparison."""
        out = []
        for kept in list(self._kept.values()):
            for fields in kept.copy():
                send, receive, ranks, file, line = fields[-5:]
                out.append(Entry(*(*fields[:-5], tuple(send), tuple(receive), ranks, f"{file}:{line}")))
        return out

    def mirror(self, path: Path) -> None:
        """Keep the last entries in the file `path` too, where they outlive a crash.  OSError if it can't be written."""
        self._ring, self._ring_end = _mapped(path, _RING_BYTES), 0

    def _write(self, line: bytes) -> None:
        assert self._ring is not None
        if len(line) > _RING_BYTES:
            return
        if self._ring_end + len(line) > _RING_BYTES:
            self._ring[self._ring_end :] = bytes(_RING_BYTES - self._ring_end)
            self._ring_end = 0
        self._ring[self._ring_end : self._ring_end + len(line)] = line
        self._ring_end += len(line)


def read_collectives(path: Path) -> list[Entry]:
    """The entries in a rank's mirror; a line that is half overwritten is none."""
    if not path.is_file():
        return []
    out = []
    for line in path.read_bytes().split(b"\n"):
        fields = line.decode(errors="replace").split("\t")
        if len(fields) == 14 and fields[0] == "c" and fields[-1] == ".":
            axis, number, step, kind, tag, dtype, row, count, send, receive, ranks, site = fields[1:-1]
            rows = None if count == "None" else int(count)
            lists = _integers(send), _integers(receive), _integers(ranks)
            out.append(Entry(axis, int(number), int(step), kind, tag, dtype, _integers(row), rows, *lists, site))
    return out


def agree(sums: Sequence[float], world: int) -> bool:
    """Whether all ranks have the same hash (its variance is zero) and all-to-alls' sizes match."""
    if not all(v == v and abs(v) < 2**63 for v in sums):  # other tensors have been mixed in
        return False
    low, low_squares, high, high_squares, balance = (int(v) for v in sums)
    return world * low_squares == low**2 and world * high_squares == high**2 and balance % 2**32 == 0


def first_difference(logs: Mapping[int, Sequence[Entry]]) -> str:
    """What the first collective is that ranks don't agree on, with both sides' instructions and call sites; "" if they do.

    `logs`: rank -> its entries.  A rank that is merely behind does not differ."""
    by_row = any(entry.kind == "message" for entries in logs.values() for entry in entries)  # pipelines: lists differ
    by_place: dict[tuple[str, int, tuple[int, ...]], dict[int, Entry]] = {}
    for rank, entries in sorted(logs.items()):
        for entry in entries:
            by_place.setdefault((entry.axis, entry.number, entry.ranks if by_row else ()), {})[rank] = entry
    found = []
    for (axis, number, _), theirs in by_place.items():
        step = min(e.step for e in theirs.values())
        kinds: dict[str, list[int]] = {}
        for rank, entry in theirs.items():
            kinds.setdefault(entry.key, []).append(rank)
        if len(kinds) > 1:
            lines = [f"  {name_ranks(ranks)}: {theirs[ranks[0]].describe()}" for ranks in kinds.values()]
            found.append((step, number, axis, "is not the same on all ranks", lines))
        elif lines := _unmatched(theirs):
            found.append((step, number, axis, "has sizes that don't match", lines))
    if not found:
        return ""
    _, number, axis, what, lines = min(found)
    return "\n".join([f"collective {number} on axis {axis} {what}:", *lines])


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0, 1, 5" or "ranks 0, 1, 2, 3 and 28 more"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named = ", ".join(map(str, ranks[:8]))
    return f"ranks {named}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _unmatched(theirs: Mapping[int, Entry]) -> list[str]:
    """The first two ranks of an all-to-all of which one sends what the other doesn't expect."""
    for rank, entry in theirs.items():
        for other, sent in zip(entry.ranks, entry.send):
            peer = theirs.get(other)
            if peer is None or rank not in peer.ranks or not peer.receive:
                continue
            expected = peer.receive[peer.ranks.index(rank)]
            if sent != expected:
                return [
                    f"  rank {rank} sends {sent} rows to rank {other}: {entry.describe()}",
                    f"  rank {other} receives {expected} from it: {peer.describe()}",
                ]
    return []


def _key(kind: str, tag: str, dtype: str, row: tuple[int, ...], count: int | None) -> str:
    return f"{kind} {tag} {dtype} {tuple(row)} {count}"


@lru_cache(maxsize=2**16)
def _code(kind: str, tag: str, dtype: str, row: tuple[int, ...], count: int | None) -> tuple[int, str]:
    """What enters the hash, and what a mirror's line holds."""
    return crc32(_key(kind, tag, dtype, row, count).encode()), f"{kind}\t{tag}\t{dtype}\t{row}\t{count}"


@lru_cache(maxsize=256)
def _text(ranks: tuple[int, ...]) -> str:
    return str(ranks)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(v) for v in text.strip("[]()").split(",") if v.strip())


def _mapped(path: Path, num_bytes: int) -> mmap.mmap:
    with open(path, "w+b") as file:
        file.truncate(num_bytes)
        return mmap.mmap(file.fileno(), num_bytes)
