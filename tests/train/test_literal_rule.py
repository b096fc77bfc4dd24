"""Lina's rule as the paper has it, decided by each rank alone, hangs on gloo, and the doctor names both sides; ours does not.

Gradients wait while an all-to-all is queued or under way here, and an all-to-all waits while a gradient is under way here
(sections 4.1 and 6.1).  Rank 0 begins a gradient before the all-to-all, rank 1 the all-to-all before the gradient, and then
each waits for the other.  Virtual time says the same: tests/perfmodel/sim/test_virtual.py.
"""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalina.comm.exchange import Pending
from megalina.comm.links import Later, Links, Sent
from megalina.parallel import executor
from megalina.step.program import MOVABLE, Instruction, Op
from megalina.timeline.recorder import Recorder
from tests.train import test_doctor
from tests.train.forked_ranks import Outcome
from tests.train.test_doctor import explained

job, folder = test_doctor.job, test_doctor.folder  # fixtures
LATE_S = 0.3
FIRST = "B:dense.1>"  # the first gradient of a step, while tokens of layer 0 are still to come


class LiteralLinks:
    """Two queues and one thread that decides; all other collectives leave as ever."""

    def __init__(self, log: Any, **options: Any):
        self.watched = False
        self._others, self._log = Links(log, **options), log
        self._changed = threading.Condition()
        self._tokens, self._gradients = deque[Sent](), deque[Sent]()
        self._under_way: Counter[Op] = Counter()
        threading.Thread(target=self._run, name="scheduler", daemon=True).start()

    def send(
        self,
        instruction: Instruction,
        launch: Callable[[], Pending],
        *,
        at_s: float = 0.0,
        after: Later | None = None,
        recorder: Recorder | None = None,
    ) -> Sent:
        if instruction.op is not Op.TOKENS and instruction.op not in MOVABLE:
            return self._others.send(instruction, launch, at_s=at_s, after=after, recorder=recorder)
        sent = Sent(instruction, launch, at_s, after, (self._log.position.step, instruction.tag), recorder)
        sent.begun = threading.Event()
        with self._changed:
            (self._tokens if instruction.op is Op.TOKENS else self._gradients).append(sent)
            self._changed.notify_all()
        return sent

    def close(self) -> None:
        self._others.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                while (queue := self._next()) is None:
                    self._changed.wait(0.01)
                sent = queue.popleft()
                assert sent.instruction.op is not None
                self._under_way[sent.instruction.op] += 1
            if sent.after is not None:
                sent.after.get()
            assert sent.launch is not None
            self._log.here.place = sent.place
            sent.pending = sent.launch()
            if sent.pending.work is None:
                self._ended(sent.instruction.op)
            else:
                sent.pending.work.get_future().add_done_callback(lambda _, op=sent.instruction.op: self._ended(op))
            assert sent.begun is not None
            sent.begun.set()

    def _next(self) -> deque[Sent] | None:
        """The paper's rule, on what this rank knows."""
        if self._tokens:
            return None if any(self._under_way[op] for op in MOVABLE) else self._tokens
        if self._gradients and self._gradients[0].at_s <= time.perf_counter() and not self._under_way.total():
            return self._gradients
        return None

    def _ended(self, op: Op) -> None:
        with self._changed:
            self._under_way[op] -= 1
            self._changed.notify_all()


def late(links: Callable[..., Any], rank: int, mark: Callable[[], None]) -> Callable[..., Any]:
    """Links on which rank 0's program is late after a gradient, and rank 1's device has the gradient late."""

    class Late(links):  # type: ignore[misc, valid-type]
        def send(self, instruction: Instruction, launch: Callable[[], Pending], *, at_s: float = 0.0, **options: Any) -> Sent:
            if instruction.tag.startswith(FIRST) and rank == 1:
                at_s = time.perf_counter() + LATE_S
            sent = super().send(instruction, launch, at_s=at_s, **options)
            if instruction.tag.startswith(FIRST) and rank == 0:
                mark()
                time.sleep(LATE_S)
            return sent

    return Late


def literal_rule(rank: int, mark: Callable[[], None]) -> None:
    executor.Links = late(LiteralLinks, rank, mark)


def our_rule(rank: int, mark: Callable[[], None]) -> None:
    executor.Links = late(Links, rank, mark)


@pytest.mark.full
def test_the_papers_literal_rule_hangs_and_both_collectives_and_ranks_are_named(job: Callable[..., Outcome]) -> None:
    outcome = job(literal_rule, micro_batch_size=4)
    text = explained(
        outcome, "no rank has made progress", "the ranks wait for one another: each has begun what another holds back"
    )
    assert "rank 0 waits in instruction B:combine<.0.0 of step 1" in text and "not submitted: a lane holds it back" in text
    assert "rank 1 waits in instruction B:combine<.0.0 of step 1" in text and "which rank 0 has not submitted" in text
    assert "on axis dp, sum in instruction B:dense.1>.-.0[0:4288] of step 1: rank 0 submitted it, rank 1 did not" in text
    assert "on axis ep, all-to-all in instruction B:combine>.0.0 of step 1: rank 1 submitted it, rank 0 did not" in text


def test_our_rule_ends_with_the_same_delays(job: Callable[..., Outcome], folder: Path) -> None:
    outcome = job(our_rule, micro_batch_size=4, steps=2)
    assert outcome.error == ""
    records = [json.loads(line) for line in (folder / "our_rule" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
