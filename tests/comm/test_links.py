"""Lanes: what is asked for along an axis starts in that order, whoever starts it, and what is held back is held back there."""

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch

from megalina.collective_log import CollectiveLog
from megalina.comm.exchange import Pending
from megalina.comm.links import Later, Links
from megalina.step.program import Instruction, Kind, Op

SOON_S = 0.02  # until an emulated device has what is sent


def instruction(op: Op, name: str, axis: str, yields_to: tuple[Op, ...] = (), credit: int = 0) -> Instruction:
    return Instruction("B", Kind.START, name, op=op, axis=axis, yields_to=yields_to, credit=credit)


def launching(seen: list[str], name: str, before: Callable[[], object] = lambda: None) -> Callable[[], Pending]:
    def launch() -> Pending:
        before()
        seen.append(name)
        return Pending(None, lambda: torch.zeros(0))

    return launch


def test_what_a_lane_is_about_to_start_is_not_overtaken_by_the_program() -> None:
    """The lane's thread stands between taking the first one up and starting it while the program asks for the second."""
    links, seen, taken_up = Links(CollectiveLog(0), cuda=False), list[str](), threading.Event()

    def stand() -> None:
        taken_up.set()
        time.sleep(0.1)

    first = links.send(instruction(Op.GRADS, "first", "dp"), launching(seen, "first", stand), at_s=time.perf_counter() + SOON_S)
    assert taken_up.wait(5.0)
    second = links.send(instruction(Op.GRADS, "second", "dp"), launching(seen, "second"))
    first.wait()
    second.wait()
    links.close()
    assert seen == ["first", "second"]


def test_lanes_of_two_axes_do_not_wait_for_one_another() -> None:
    links, seen = Links(CollectiveLog(0), cuda=False), list[str]()
    late = links.send(instruction(Op.GRADS, "late", "dp"), launching(seen, "late"), at_s=time.perf_counter() + 10 * SOON_S)
    links.send(instruction(Op.TOKENS, "tokens", "ep"), launching(seen, "tokens")).wait()
    assert seen == ["tokens"]
    late.wait()
    links.close()
    assert seen == ["tokens", "late"]


def test_gradients_that_yield_wait_for_tokens_whose_sizes_are_on_their_way() -> None:
    links, seen, sizes = Links(CollectiveLog(0), cuda=False), list[str](), threading.Event()
    links.watched = True
    tokens = links.send(instruction(Op.TOKENS, "tokens", "ep"), launching(seen, "tokens"), after=Later(lambda: sizes.wait(5.0)))
    gradients = links.send(instruction(Op.GRADS, "gradients", "dp", yields_to=(Op.TOKENS,)), launching(seen, "gradients"))
    time.sleep(SOON_S)
    assert seen == []
    sizes.set()
    tokens.wait()
    gradients.wait()
    links.close()
    assert seen == ["tokens", "gradients"]


def test_gradients_that_yield_wait_for_tokens_that_are_gathered_or_summed_along_ep_alone() -> None:
    for op, axis, held in ((Op.GATHER, "ep", True), (Op.SCATTER, "ep", True), (Op.GATHER, "tp", False)):
        links, seen, sizes = Links(CollectiveLog(0), cuda=False), list[str](), threading.Event()
        links.watched = True
        tokens = links.send(instruction(op, "tokens", axis), launching(seen, "tokens"), after=Later(lambda: sizes.wait(5.0)))  # noqa: B023
        gradients = links.send(instruction(Op.GRADS, "gradients", "dp", yields_to=(Op.TOKENS,)), launching(seen, "gradients"))
        time.sleep(SOON_S)
        assert seen == ([] if held else ["gradients"])
        sizes.set()
        tokens.wait()
        gradients.wait()
        links.close()


def test_an_error_of_a_lane_is_raised_where_the_program_waits() -> None:
    links = Links(CollectiveLog(0), cuda=False)

    def broken() -> Pending:
        raise RuntimeError("the wire is cut")

    sent = links.send(instruction(Op.GRADS, "gradients", "dp"), broken, at_s=time.perf_counter() + SOON_S)
    try:
        sent.wait()
    except RuntimeError as error:
        assert str(error) == "the wire is cut"
    else:
        raise AssertionError("nothing was raised")
    finally:
        links.close()


@pytest.mark.parametrize("urgent", [False, True])
def test_the_program_is_urgent_while_it_hands_over_a_message(urgent: bool) -> None:
    """Not with a collective, which gloo's own threads start; and only beside an emulated device."""
    links, seen, policies = Links(CollectiveLog(0), cuda=False, urgent=urgent), list[str](), list[int]()

    def look() -> None:
        policies.append(os.sched_getscheduler(0))

    for op, axis in ((Op.SEND, "pp0-1"), (Op.RECV, "pp0-1"), (Op.TOKENS, "ep")):
        links.send(instruction(op, op.name, axis), launching(seen, op.name, look)).wait()
    links.close()
    message = os.SCHED_RR if urgent and os.geteuid() == 0 else os.SCHED_OTHER
    assert policies == [message, message, os.SCHED_OTHER] and os.sched_getscheduler(0) == os.SCHED_OTHER
