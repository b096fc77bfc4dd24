"""Bounds by hand: bytes over the links of nodes, and the longest chain of a few instructions."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.compare.results import bounds_of, link_bytes
from megalina.step.program import Instruction, Kind, Op
from megalina.timeline.recorder import Event
from tests.timeline.made import compute, event, grads, tokens, wait

FOUR = {"edp": 1, "ep": 4, "tp": 1}  # four expert-parallel ranks, which are dp too
PACKED = {"edp": 2, "ep": 2, "tp": 1}


def link(events: list[Event], *, shape: dict[str, int] = FOUR, ranks_per_node: int = 2, sharded: bool = False) -> float:
    """Every rank sends the same."""
    return link_bytes([events] * 4, shape, ranks_per_node=ranks_per_node, sharded=sharded)


def params(num_bytes: int) -> Event:
    return event("send", "dense.1", 0, 1, num_bytes=num_bytes, op="params", axis="dp", phase="U")


@pytest.mark.parametrize(
    ("sent", "sharded", "expected"),
    [
        (tokens("dispatch", 0, 1, 300), False, 2 * 200),  # each of a node's two ranks has two of three others outside
        (replace(tokens("counts", 0, 1, 12), op="counts"), False, 2 * 8),
        (grads("dense.1", 0, 1, 800), False, 1200),  # a ring of 4: 2 x 3/4, and one edge leaves each node
        (grads("dense.1", 0, 1, 800), True, 600),  # a reduce-scatter is half of it
        (params(100), True, 300),  # the parts of the three others, or one's own three times
        (event("send", "measured", 0, 1, num_bytes=8, op="sum", axis="world", phase="U"), True, 12),
    ],
)
def test_what_leaves_a_node(sent: Event, sharded: bool, expected: float) -> None:
    assert link([sent], sharded=sharded) == pytest.approx(expected)
    assert link([sent, compute("experts", 0, 1), wait("dispatch", 0, 1, 1.0)], sharded=sharded) == pytest.approx(expected)
    assert link([sent, sent], sharded=sharded) == pytest.approx(2 * expected)
    assert link([sent], ranks_per_node=4, sharded=sharded) == 0  # one node


def test_gradients_by_node_leave_a_node_once() -> None:
    by_rank = [[grads("dense.1", 0, 1, 800)]] * 4
    assert link_bytes(by_rank, FOUR, ranks_per_node=2, sharded=False, by_node=True) == 800  # 2 x 1/2, not 2 x 3/4
    assert link_bytes(by_rank, FOUR, ranks_per_node=2, sharded=True, by_node=True) == 400
    assert link_bytes([[params(100)]] * 4, FOUR, ranks_per_node=2, sharded=True, by_node=True) == 200  # of both ranks
    assert (
        link_bytes(by_rank, FOUR, ranks_per_node=1, sharded=False, by_node=True) == 1200
    )  # a rank a node: nothing to sum inside


def test_packed_groups_may_stay_inside_a_node() -> None:
    sent = replace(tokens("dispatch", 0, 1, 300), axis="ep/2")
    assert link([sent], shape=PACKED) == 0  # ranks 0 and 1, ranks 2 and 3
    assert link([sent], shape=PACKED, ranks_per_node=1) == 300
    replicas = grads("experts.1", 0, 1, 800, axis="edp/2")  # ranks 0 and 2, ranks 1 and 3: both edges of a node
    assert link([replicas], shape=PACKED) == 2 * 800


@given(st.lists(st.integers(0, 10**9), min_size=4, max_size=4))
def test_the_busiest_node_counts(sizes: list[int]) -> None:
    by_rank = [[tokens("dispatch", 0, 1, size)] for size in sizes]
    assert link_bytes(by_rank, FOUR, ranks_per_node=1, sharded=False) == pytest.approx(max(sizes))
    assert link_bytes(by_rank, FOUR, ranks_per_node=2, sharded=False) == pytest.approx(
        max(sizes[0] + sizes[1], sizes[2] + sizes[3]) * 2 / 3
    )


def test_the_longest_chain_is_not_the_sum_of_all_that_is_computed() -> None:
    """attention 1 s -> 300 bytes to three others at 100 bytes a second -> experts 2 s, and beside it shared 4 s."""
    program = (
        Instruction("F", Kind.COMPUTE, "attention", 0, reads=("x",), writes=("a",)),
        Instruction("F", Kind.START, "dispatch", 0, reads=("a",), writes=("a>",), op=Op.TOKENS, axis="ep"),
        Instruction("F", Kind.COMPUTE, "shared", 0, reads=("a",), writes=("s",)),
        Instruction("F", Kind.WAIT, "dispatch", 0, reads=("a>",), writes=("r",), op=Op.TOKENS, axis="ep"),
        Instruction("F", Kind.COMPUTE, "experts", 0, reads=("r",), writes=("e",)),
    )
    seconds = {"attention": 1.0, "shared": 4.0, "experts": 2.0}

    def found(num_bytes: int, link_bytes_per_s: float) -> dict[str, float]:
        events = [tokens("dispatch", 0, 1, num_bytes, layer=0)]
        return bounds_of(
            program,
            events,
            seconds=lambda s: seconds[s.name],
            ranks=4,
            link_bytes_per_s=link_bytes_per_s,
            bytes_of_link={program[1].tag: num_bytes},
        )

    assert found(300, 100) == pytest.approx({"compute_s": 7, "critical_path_s": 6, "in_turn_s": 1 + 3 + 2})
    assert found(600, 100) == pytest.approx({"compute_s": 7, "critical_path_s": 9, "in_turn_s": 1 + 6 + 2})
    assert found(300, float("inf")) == pytest.approx({"compute_s": 7, "critical_path_s": 5, "in_turn_s": 3})  # one node
