"""Links: where collectives start, in the program's order, some of them held back.

A lane an axis of the mesh: what is asked for along an axis starts in that order and no other, on every rank, so its ranks
always meet.  The head of a lane may be held until the emulated device has the data (`at_s`), until split sizes are known
(`after`), while instructions that it yields to are under way here, or while its `credit` is used up.  All that delays, none of it
reorders; and as tokens yield to nobody, nobody waits in a circle.

What need not be held starts at once, on the program's own thread; else a thread of the lane starts it.  On CUDA nothing is
held on the host: an instruction that yields starts on a stream of low priority, which waits for the tokens that were sent before
it.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from megalina.collective_log import CollectiveLog
from megalina.comm.device_clock import DeviceClock
from megalina.comm.exchange import Pending
from megalina.comm.urgency import this_thread_is_urgent, urgent_meanwhile
from megalina.step.program import Instruction, Op
from megalina.timeline.recorder import SEND, Recorder


class Sent:
    """One thing that the program has asked for."""

    __slots__ = (
        "after",
        "at_s",
        "begun",
        "end",
        "enqueued_s",
        "error",
        "instruction",
        "launch",
        "pending",
        "place",
        "recorder",
        "started_s",
    )

    def __init__(
        self,
        instruction: Instruction,
        launch: Callable[[], Pending],
        at_s: float,
        after: "Later | None",
        place: tuple[int, str],
        recorder: Recorder | None,
    ):
        self.instruction, self.at_s, self.after, self.place, self.recorder = instruction, at_s, after, place, recorder
        self.launch: Callable[[], Pending] | None = launch
        self.begun: threading.Event | None = None  # where a lane's thread begins it
        self.end: Callable[[], None] | None = None  # notes its end, where nobody but who waits for it can tell
        self.pending: Pending | None = None
        self.error: BaseException | None = None
        self.enqueued_s = time.perf_counter()
        self.started_s = 0.0

    def wait(self) -> Any:
        """What arrived; the error of the lane if it could not be started."""
        if self.begun is not None:
            self.begun.wait()
        if self.error is not None:
            raise self.error
        assert self.pending is not None
        arrived = self.pending.wait()
        if self.end is not None:
            self.end()
            self.end = None
        return arrived


class Later:
    """A value that is still on its way; the first to ask waits for it."""

    __slots__ = ("_lock", "_make", "_value")

    def __init__(self, make: Callable[[], Any]):
        self._make: Callable[[], Any] | None = make
        self._value: Any = None
        self._lock = threading.Lock()

    def get(self) -> Any:
        with self._lock:
            if self._make is not None:
                self._value = self._make()
                self._make = None  # it holds buffers
        return self._value


class _Lane:
    """What waits to be started along one axis."""

    def __init__(self) -> None:
        self.queue: deque[Sent] = deque()
        self.thread: threading.Thread | None = None
        self.under_way = 0


class Links:
    """All lanes of one rank.  `watched`: ends are noted, since some instruction is held back.  `marks`: the clock by which a
    recorder gets what CUDA sends.  `urgent`: lanes go before an emulated device's math."""

    def __init__(self, log: CollectiveLog, *, cuda: bool, marks: DeviceClock | None = None, urgent: bool = False):
        self._log, self._marks = log, marks
        self._low = torch.cuda.Stream() if cuda else None
        self._lanes: dict[str, _Lane] = {}
        self._changed = threading.Condition()
        self._under_way: Counter[Op] = Counter()
        self._tokens: list[Sent] = []  # CUDA: sent and not yet awaited
        self._closed = False
        self._urgent = urgent
        self.watched = False

    def send(
        self,
        instruction: Instruction,
        launch: Callable[[], Pending],
        *,
        at_s: float = 0.0,
        after: Later | None = None,
        recorder: Recorder | None = None,
    ) -> Sent:
        """Ask for a collective, which `launch` starts once its turn has come.  `recorder`: gets its event once it has ended."""
        sent = Sent(instruction, launch, at_s, after, (self._log.position.step, self._log.position.tag), recorder)
        if self._low is not None:
            self._send_on_stream(sent)
            return sent
        lane = self._lanes.get(instruction.axis)
        if lane is None:
            lane = self._lanes[instruction.axis] = _Lane()
        with self._changed:
            at_once = not lane.queue and after is None and at_s <= sent.enqueued_s and not self._held(sent, lane)
            if at_once:
                self._count(sent, lane)
            else:
                sent.begun = threading.Event()
                lane.queue.append(sent)
                if lane.thread is None:
                    lane.thread = threading.Thread(target=self._run, args=(lane,), name=f"lane {instruction.axis}", daemon=True)
                    lane.thread.start()
                self._changed.notify_all()
        if at_once:
            self._begin(sent, lane)
            if sent.error is not None:
                raise sent.error
        return sent

    def close(self) -> None:
        """End the lanes' threads; what was asked for must have been awaited."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self, lane: _Lane) -> None:
        if self._urgent:
            this_thread_is_urgent()
        while True:
            with self._changed:
                while not lane.queue:
                    if self._closed:
                        return
                    self._changed.wait()
                sent = lane.queue[0]
            try:
                if sent.after is not None:
                    sent.after.get()
            except BaseException as error:  # noqa: BLE001  the program's thread raises it at the wait
                sent.error = error
            if (early_s := sent.at_s - time.perf_counter()) > 0:
                time.sleep(early_s)
            with self._changed:
                while self._held(sent, lane) and not self._closed:
                    self._changed.wait(0.05)  # an emulated device is ready without a word to anybody
                self._count(sent, lane)
            self._begin(sent, lane)
            with self._changed:
                lane.queue.popleft()  # not before it has started: the program's thread would overtake it
                self._changed.notify_all()

    def _held(self, sent: Sent, lane: _Lane) -> bool:
        instruction = sent.instruction
        if instruction.credit and lane.under_way >= instruction.credit:
            return True
        if not instruction.yields_to:
            return False
        if any(self._under_way[op] for op in instruction.yields_to):
            return True
        now_s = time.perf_counter()
        heads = (other.queue[0] for other in self._lanes.values() if other is not lane and other.queue)
        return any(head.instruction.traffic in instruction.yields_to and head.at_s <= now_s for head in heads)

    def _count(self, sent: Sent, lane: _Lane) -> None:
        if self.watched or sent.recorder is not None:
            assert sent.instruction.traffic is not None
            self._under_way[sent.instruction.traffic] += 1
            lane.under_way += 1

    def _begin(self, sent: Sent, lane: _Lane) -> None:
        watched = self.watched or sent.recorder is not None
        sent.started_s = time.perf_counter()
        try:
            if sent.error is None:
                assert sent.launch is not None
                self._log.here.place = sent.place
                with urgent_meanwhile() if self._urgent and sent.begun is None and _of_two(sent) else nullcontext():
                    sent.pending = sent.launch()
        except BaseException as error:  # noqa: BLE001
            sent.error = error
        finally:
            self._log.here.place = None
            sent.launch = sent.after = None  # they hold tensors
        work = sent.pending.work if sent.pending is not None else None
        if watched:
            if work is None:  # nobody to talk to: nothing was on the wire
                self._ended(sent, lane, on_wire=False)
            elif _of_two(sent):  # gloo has no future of them
                sent.end = partial(self._ended, sent, lane, on_wire=True)
            else:
                work.get_future().add_done_callback(lambda _: self._ended(sent, lane, on_wire=True))
        if sent.begun is not None:
            sent.begun.set()

    def _ended(self, sent: Sent, lane: _Lane, *, on_wire: bool) -> None:
        instruction, now_s = sent.instruction, time.perf_counter()
        with self._changed:
            assert instruction.traffic is not None
            self._under_way[instruction.traffic] -= 1
            lane.under_way -= 1
            self._changed.notify_all()
        if on_wire and sent.recorder is not None and sent.pending is not None:
            sent.recorder.add(SEND, instruction, sent.pending.num_bytes, sent.enqueued_s, sent.started_s, now_s, 0.0)

    def _send_on_stream(self, sent: Sent) -> None:
        """CUDA: order on the host is the program's; only the device holds back."""
        if sent.after is not None:
            sent.after.get()
        self._tokens = [t for t in self._tokens if t.pending is not None and t.pending.work is not None]
        assert self._low is not None
        if sent.instruction.yields_to:
            self._low.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._low):
                for tokens in self._tokens:
                    assert tokens.pending is not None and tokens.pending.work is not None
                    tokens.pending.work.wait()  # this stream waits, neither the host nor the main stream
                self._launch_on_stream(sent)
        else:
            self._launch_on_stream(sent)
            if sent.instruction.carries_tokens:
                self._tokens.append(sent)
        sent.launch = sent.after = None

    def _launch_on_stream(self, sent: Sent) -> None:
        """Launch on the current stream, and note when the device begins and ends it."""
        assert sent.launch is not None
        marks = self._marks if sent.recorder is not None else None
        enqueued = marks.now() if marks is not None else None
        sent.pending = sent.launch()
        if marks is not None and enqueued is not None and sent.recorder is not None and (work := sent.pending.work) is not None:
            start, end = marks.of_work(work, sent.instruction.axis, enqueued)
            sent.recorder.add(SEND, sent.instruction, sent.pending.num_bytes, enqueued, start, end, 0.0)


def _of_two(sent: Sent) -> bool:
    """Whether it is a message between two ranks, not a collective."""
    return sent.instruction.op in (Op.SEND, Op.RECV)
