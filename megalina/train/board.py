"""A board: where the ranks of a job that may be stuck leave words for each other, without any process group.

Normally it is the job's store.  A store that is stopped answers no call, not even one with a time-out, so each call is
made by a thread that may be given up.  Then files in the run folder, which all ranks share, take its place.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from megalina.whole_file import write_whole

T = TypeVar("T")
ASK_S = 2.0  # a store that takes longer for an answer is silent


class Silent(RuntimeError):
    """The board does not answer."""


class Board(Protocol):
    """Rounds are numbered from 1; the one who claims a round collects what the others post."""

    def announced(self) -> int:
        """The number of the last round that somebody has claimed; 0: none yet."""

    def claim(self, number: int) -> bool:
        """Whether this rank is the one that begins round `number`."""

    def post(self, key: str, text: str) -> None:
        """For all to read."""

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """Those that are there."""


def job_store() -> Store:
    """A client of the store that the ranks of this job met at, apart from the one that the process group uses."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=ASK_S),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
    return PrefixStore(f"megalina/doctor/{attempt}", store)


class StoreBoard:
    """Over the job's store.  Every method raises Silent where the store does not answer within ASK_S."""

    def __init__(self, connect: Callable[[], Store]):
        self._connect = connect
        self._asked: queue.SimpleQueue[tuple[Callable[[Store], object], Future] | None] = queue.SimpleQueue()
        self._last: Future | None = None
        threading.Thread(target=self._serve, name="doctor's store", daemon=True).start()

    def announced(self) -> int:
        return self._ask(lambda store: store.add("round", 0))

    def claim(self, number: int) -> bool:
        def first(store: Store) -> bool:
            if store.add(f"claim/{number}", 1) > 1:
                return False
            store.add("round", 1)
            return True

        return self._ask(first)

    def post(self, key: str, text: str) -> None:
        self._ask(lambda store: store.set(key, text))

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        return self._ask(lambda store: {key: store.get(key).decode() for key in keys if store.check([key])})

    def close(self) -> None:
        self._asked.put(None)

    def _ask(self, question: Callable[[Store], T]) -> T:
        try:
            if self._last is not None:  # an answer that came too late is dropped; one that never came has had its time
                with suppress(DistError):
                    self._last.result(0)
            future: Future[T] = Future()
            self._last = future
            self._asked.put((question, future))
            return future.result(ASK_S)
        except TimeoutError as error:
            raise Silent(f"the job's store did not answer within {ASK_S:g} s") from error
        except (DistError, OSError) as error:
            raise Silent(f"the job's store can't be reached: {error}") from error

    def _serve(self) -> None:
        store: Store | None = None
        while (asked := self._asked.get()) is not None:
            question, future = asked
            try:
                store = store or self._connect()
                future.set_result(question(store))
            except BaseException as error:  # noqa: BLE001  handed to the one that asked
                store = None
                future.set_exception(error)


class FolderBoard:
    """Over files of a folder that all ranks share."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def announced(self) -> int:
        return max((int(path.stem) for path in self._folder.glob("*.claim")), default=0)

    def claim(self, number: int) -> bool:
        try:
            (self._folder / f"{number}.claim").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def post(self, key: str, text: str) -> None:
        write_whole(self._path(key), text)

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        return {key: self._path(key).read_text() for key in keys if self._path(key).is_file()}

    def _path(self, key: str) -> Path:
        return self._folder / f"{key.replace('/', '_')}.txt"
