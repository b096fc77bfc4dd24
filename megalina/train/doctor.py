"""The doctor: a thread beside each rank that notices when the job makes no progress, says why, and ends it.

It uses no process group, which may be what is stuck, but the job's store.  Between suspicions a beat is one small call.
A rank that has stood in one instruction for the time-out claims a round: every doctor posts its rank's state, the claimer
collects them.  If any rank has moved since, the job is slow and not stuck.  Else the claimer says what it sees, each rank
writes its file, and all end.
"""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch.distributed import Store

from megalina.collective_log import CollectiveLog, read_mirror
from megalina.data.prefetch import PREFETCH, Prefetch
from megalina.rank_files import STOOD_STILL, collectives_path, hang_path, position_path, traceback_path
from megalina.train import flight_recorder
from megalina.train.board import ASK_S, Board, FolderBoard, Silent, StoreBoard, job_store
from megalina.train.diagnosis import State, differences, report, summary

BEAT_S = 0.5
POLL_S = 0.05
IN_NEED = ".board"  # the folder that takes the store's place
GRACE_S = 3.0  # for a rank that isn't where it should be
LONGEST_ANSWER_S = 10.0
ENTRIES = 200_000  # that one rank takes from all others together


class Doctor:
    """One a rank; `start` before the first step, `stop` when all is over."""

    def __init__(
        self,
        log: CollectiveLog,
        *,
        world: int,
        rank: int,
        timeout_s: float,
        folder: Path,
        connect: Callable[[], Store] = job_store,
    ):
        """`timeout_s`: an instruction in which a rank stands for so long is looked into; 0: never.  `folder`: RUN/logs."""
        self._log, self._world, self._rank, self._timeout_s, self._folder = log, world, rank, timeout_s, folder
        self._answer_s = min(LONGEST_ANSWER_S, max(2.0, timeout_s))  # a rank whose doctor is silent for so long is lost
        self._connect = connect
        self._board: Board | None = None
        self._main = threading.main_thread().ident
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._wake = threading.Event()
        self._round, self._not_before_s = 0, 0.0
        self._asks, self._text, self._answered = False, "", threading.Event()

    def start(self) -> None:
        """Mirror the rank's position and collectives into its files, and watch from now on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            shutil.rmtree(self._folder / IN_NEED, ignore_errors=True)  # of an earlier job in this run folder
        self._log.position.mirror(position_path(self._folder, self._rank))
        if self._world > 1:
            self._log.mirror(collectives_path(self._folder, self._rank))
        if self._timeout_s > 0:
            self._watch()

    def stop(self, error: BaseException | None = None) -> None:
        """Watch no more; tell the others that this rank is done, or what it failed of: it may take long to end."""
        self._stopping = True
        self._wake.set()
        if self._thread is None:
            return
        self._thread.join(2 * ASK_S)
        finished, self._thread = not self._thread.is_alive(), None
        if finished and isinstance(self._board, StoreBoard):
            failed = "".join(traceback.format_exception(error)) if error is not None else ""
            with suppress(Silent):
                self._board.post(f"left/{self._rank}", failed)
            self._board.close()

    def explain(self) -> str:
        """How the ranks' collectives differ.  Called by the main threads of all ranks, when they know that they do.

        Logs travel over the store.  A rank that does not come here, as it is stuck in a mixed-up collective, is ended."""
        unknown = f"the ranks did not submit the same collectives in step {self._log.position.step}"
        if self._world == 1:
            return unknown
        self._asks = True
        self._watch()
        self._wake.set()
        answered = self._answered.wait(self._answer_s + GRACE_S + 2 * ASK_S)
        self._asks = False
        return self._text if answered else f"{unknown}; the job's store did not say how they differ"

    def _watch(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="doctor", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        if self._world > 1:
            self._board = StoreBoard(self._connect)
        while not self._stopping:
            try:
                self._beat()
            except Silent:
                if self._alarmed:
                    self._change_board()
            self._wake.wait(BEAT_S)
            self._wake.clear()

    def _beat(self) -> None:
        board = self._board
        if board is None:
            if self._alarmed:
                state = self._state()
                self._end(state, summary({self._rank: state}, {}, self._timeout_s, str(self._folder)))
            return
        number = board.announced()
        if number > self._round:
            self._attend(board, number, collects=False)
        elif self._alarmed and board.claim(number + 1):
            self._attend(board, number + 1, collects=True)

    def _change_board(self) -> None:
        """The store is silent, and so is the job: its host, rank 0 or an agent, is stopped or gone."""
        if isinstance(self._board, StoreBoard):
            self._board, self._round = FolderBoard(self._folder / IN_NEED), 0

    @property
    def _alarmed(self) -> bool:
        if self._asks:
            return True
        position, now_s = self._log.position, time.monotonic()
        stands = self._timeout_s > 0 and position.tag != "" and now_s - position.since_s > self._timeout_s
        return stands and now_s >= self._not_before_s

    def _state(self) -> State:
        position = self._log.position
        kept = max(64, ENTRIES // self._world)
        return State(
            rank=self._rank,
            step=position.step,
            tag=position.tag,
            waits=position.waits,
            idle_s=time.monotonic() - position.since_s,
            asks=self._asks,
            stack=self._stack(),
            entries=tuple(sorted(self._log.entries(), key=lambda e: (e.step, e.number)))[-kept:],
        )

    def _stack(self) -> tuple[str, ...]:
        """The main thread's; where it waits for a batch that another thread makes, it goes on with that thread's."""
        frames = sys._current_frames()
        main = frames.get(self._main or 0)
        stack = [] if main is None else traceback.format_stack(main)
        if main is not None and any(frame.f_code is Prefetch.take.__code__ for frame, _ in traceback.walk_stack(main)):
            makers = [t.ident for t in threading.enumerate() if t.name.startswith(PREFETCH)]
            stack += [line for ident in makers if ident in frames for line in traceback.format_stack(frames[ident])]
        return tuple(stack)

    def _attend(self, board: Board, number: int, *, collects: bool) -> None:
        """Round `number`: this rank's state against a verdict, on which it acts."""
        self._round = number
        state = self._state()
        board.post(f"{number}/{self._rank}", state.to_json())
        if collects:
            verdict = self._collect(board, number)
            if verdict["kind"] == "hang":  # before the others read it: the first that ends may take the others along
                self._say(verdict["text"])
            board.post(f"{number}/verdict", json.dumps(verdict))
        else:
            found = self._await(board, number)
            if found is None:
                return
            verdict = found
        if verdict["kind"] == "slow":
            self._not_before_s = time.monotonic() + verdict["again_s"]
            return
        self._write(state)
        self._take_leave(board, number, waits=collects or self._rank == 0)
        if verdict["kind"] == "differ":
            self._answer(state, verdict["text"])
        else:
            os._exit(STOOD_STILL)  # the main thread may never come back from where it is

    def _collect(self, board: Board, number: int) -> dict:
        """The verdict over all states that arrive in time."""
        states: dict[int, State] = {}
        deadline_s = time.monotonic() + self._answer_s
        while True:
            missing = [rank for rank in range(self._world) if rank not in states]
            texts = board.read([f"{number}/{rank}" for rank in missing])
            states |= {rank: State.from_json(texts[f"{number}/{rank}"]) for rank in missing if f"{number}/{rank}" in texts}
            asked = any(s.asks for s in states.values())
            moved_s = [self._timeout_s - s.idle_s for s in states.values() if s.idle_s < self._timeout_s]
            if moved_s and not asked:
                return {"kind": "slow", "again_s": max(moved_s)}
            if len(states) == self._world or time.monotonic() > deadline_s:
                break
            time.sleep(POLL_S)
        states = dict(sorted(states.items()))
        if asked:
            step = max(s.step for s in states.values())
            text = f"the ranks did not submit the same collectives in step {step}; nothing was updated"
            return {"kind": "differ", "text": f"{text}\n{differences(states)}".rstrip()}
        left = board.read([f"left/{rank}" for rank in range(self._world) if rank not in states])
        absent = {r: self._absence(r, left.get(f"left/{r}")) for r in range(self._world) if r not in states}
        return {"kind": "hang", "text": summary(states, absent, self._timeout_s, str(self._folder))}

    def _absence(self, rank: int, left: str | None) -> str:
        if left is not None:
            return f"has left the run, and waits for nobody{': ' if left else ''}{left}".rstrip()
        text = "does not answer: its process is stopped, or its host is gone"
        place = read_mirror(position_path(self._folder, rank))
        return f"{text}; it was last in {place}" if place else text

    def _await(self, board: Board, number: int) -> dict | None:
        """The verdict; None if nobody gives one: a rank that still waits will claim the next round."""
        deadline_s = time.monotonic() + self._answer_s + GRACE_S
        while time.monotonic() < deadline_s:
            if found := board.read([f"{number}/verdict"]):
                return json.loads(found[f"{number}/verdict"])
            time.sleep(POLL_S)
        return None

    def _answer(self, state: State, text: str) -> None:
        """The main thread gets its explanation, and raises; if it isn't there to hear it, that was the end."""
        self._text = text
        self._answered.set()
        self._stopping = True
        deadline_s = time.monotonic() + GRACE_S
        while not self._asks and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        if not self._asks:
            os._exit(STOOD_STILL)

    def _end(self, state: State, text: str) -> None:
        self._say(text)
        self._write(state)
        os._exit(STOOD_STILL)

    def _say(self, text: str) -> None:
        """On stderr, and where a launcher that doesn't show this rank's stderr finds it."""
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())  # not through sys.stderr, whose lock the main thread may hold
        if self._rank > 0:
            with suppress(OSError):
                traceback_path(self._folder, self._rank).write_text(f"{text}\n")

    def _write(self, state: State) -> None:
        names = {t.ident: t.name for t in threading.enumerate()}
        others = {
            names.get(ident, str(ident)): traceback.format_stack(frame)
            for ident, frame in sys._current_frames().items()
            if ident not in (self._main, threading.get_ident())
        }
        with suppress(OSError):
            hang_path(self._folder, self._rank).write_text(report(state, others))
            flight_recorder.dump(self._folder / f"nccl_trace_{self._rank}")

    def _take_leave(self, board: Board, number: int, *, waits: bool) -> None:
        """The claimer and rank 0, with which the store may end, wait a little until all know the verdict."""
        with suppress(Silent, OSError):
            board.post(f"{number}/seen/{self._rank}", "")
            deadline_s = time.monotonic() + (1.0 if waits else 0.0)
            there = board.read([f"{number}/{rank}" for rank in range(self._world)])
            keys = [f"{number}/seen/{rank}" for rank in range(self._world) if f"{number}/{rank}" in there]
            while time.monotonic() < deadline_s and len(board.read(keys)) < len(keys):
                time.sleep(POLL_S)
