"""Partition: ranges of the forward pass in parts, as lists."""

from dataclasses import replace

import pytest

from megalina.blocks.model import plain_shape
from megalina.step.forward import Shape, plain
from megalina.step.partition import (
    Range,
    in_parts,
    is_part,
    partition,
    ranges_from,
    ranges_of,
    side_by_side,
    widest,
    with_own_counts,
)
from megalina.step.passes import chunk, decides
from megalina.step.plan import Plan
from megalina.step.program import Kind, Op, backward
from megalina.step.strategy import Setting, training_step
from tests.perfmodel.sim.schedules import buckets_of

SHAPES = {
    "moe": plain_shape([True, True, True]),
    "dense between": plain_shape([True, False, True], shared_experts=True),
    "tp": plain_shape([False, True, True], tp=True, shared_experts=True),
    "tp, copied": plain_shape([True, True, True], tp=True, sequence=False),
    "groups": plain_shape([True, True], micro_batch_groups=True),
    "experts choose": plain_shape([True, True, True], experts_choose=True),
}
WHOLE = {name: replace(shape, whole_routers=True) for name, shape in SHAPES.items()}


def lancet(shape: Shape, partition: str, **numbers: object) -> Plan:
    return Plan("lancet", partition=partition, **numbers)  # type: ignore[arg-type]


@pytest.mark.sampled(17)
@pytest.mark.parametrize("backward_order", ["whole", "mirrored"])
@pytest.mark.parametrize("parts", ["2", "4"])
@pytest.mark.parametrize("whole_routers", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_legal_list(name: str, whole_routers: bool, parts: str, backward_order: str) -> None:
    shape = (WHOLE if whole_routers else SHAPES)[name]
    for more in ({}, {"chunks": (2,)}, {"deferred_weights": "all"}, {"deferred_weights": "all", "join_weights": True}):
        plan = lancet(shape, parts, partition_backward=backward_order, **more)
        program = training_step("lancet", Setting(shape, buckets_of(shape), plan, 2))  # which checks it
        cut = [s for s in program if is_part(s)]
        assert {s.share for s in cut if s.op is Op.TOKENS} == {1 / int(parts)}
        assert any(map(decides, cut)) is not whole_routers


def test_the_widest_range_is_of_all_layers_or_lies_between_routers() -> None:
    forward = with_own_counts(plain(SHAPES["moe"]))
    assert widest(forward, 2, whole_routers=False) == (Range("attention.0", "mix.2", 2),)
    between = widest(forward, 4, whole_routers=True)
    assert list(map(str, between)) == ["counts.0..attention.1:4", "counts.1..attention.2:4", "counts.2..mix.2:4"]
    tp = widest(with_own_counts(plain(SHAPES["tp"])), 2, whole_routers=True)
    assert list(map(str, tp)) == ["counts.1..attention_residual.2:2", "counts.2..mix.2:2"]
    assert widest(forward, 1, whole_routers=False) == ()
    assert widest(plain(plain_shape([False, False])), 2, whole_routers=False) == ()


def test_what_is_said_is_read() -> None:
    text = "attention.0..mix.1:2,attention.2..mix.2:4"
    assert ranges_from(text) == (Range("attention.0", "mix.1", 2), Range("attention.2", "mix.2", 4))
    assert ",".join(map(str, ranges_of(text, plain(SHAPES["moe"]), whole_routers=False))) == text
    assert ranges_from("none") == () and ranges_from("4") == 4
    for wrong in ("two", "attention.0..mix.1", "attention.0..mix.1:2;", ""):
        with pytest.raises(ValueError, match="must be none, auto, a number of parts, or ranges such as"):
            ranges_from(wrong)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ("attention.0..mix.9:2", r"attention.0..mix.9:2: this model and layout have no instruction mix.9"),
        ("attention.0..attention.0:2", "has no all-to-all in it"),
        ("attention.1..mix.2:2,attention.0..mix.1:2", "begins before the range before it ends"),
        ("experts.0..mix.1:2", "can't be cut into parts: begin the range elsewhere"),
        ("attention.0..route.1:2", "begins or ends while something is on the wire|of the whole is read after"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(ranges: str, message: str) -> None:
    forward = with_own_counts(plain(SHAPES["moe"]))
    with pytest.raises(ValueError, match=message):
        partition(forward, ranges_of(ranges, forward, whole_routers=False))


def test_a_router_that_needs_the_whole_is_left_whole() -> None:
    forward = with_own_counts(plain(WHOLE["moe"]))
    ranges = ranges_of("attention.0..mix.0:2", forward, whole_routers=True)
    with pytest.raises(ValueError, match="a router would route part by part, and this one must see the whole micro-batch"):
        partition(forward, ranges, whole_routers=True)


def test_outside_of_the_ranges_nothing_changes_and_ranges_meet() -> None:
    forward = with_own_counts(plain(SHAPES["moe"]))
    ranges = ranges_of("attention.0..mix.0:2,attention.1..mix.1:4", forward, whole_routers=False)
    out = partition(forward, ranges)
    assert [s for s in out if not is_part(s) and not s.name.startswith(("cut_", "join_"))] == [
        s for s in forward if s.layer in (-1, 2)
    ]
    made = [s.tag for s in out if s.name.startswith(("cut_", "join_"))]
    assert made == [
        *("F:cut_batch.0.0", "F:cut_tokens.0.0", "F:join_tokens.0.0"),
        *("F:cut_batch.1.0", "F:cut_tokens.1.0", "F:join_tokens.1.0"),
    ]


@pytest.mark.parametrize("backward_order", ["whole", "mirrored"])
def test_ranges_of_as_many_parts_that_meet_go_on_in_parts(backward_order: str) -> None:
    shape = SHAPES["moe"]
    plan = lancet(shape, "attention.0..mix.0:2,attention.1..mix.1:2", partition_backward=backward_order)
    program = training_step("lancet", Setting(shape, buckets_of(shape), plan, 2))  # which checks it
    made = [s.tag for s in program if s.name.startswith(("cut_", "join_")) and s.phase == "F" and s.part == "0"]
    assert made == ["F:cut_batch.0.0", "F:cut_tokens.0.0", "F:join_tokens.1.0"]


def test_parts_that_are_there_are_not_cut_again() -> None:
    forward = with_own_counts(plain(WHOLE["moe"]))
    out = partition(forward, widest(forward, 2, whole_routers=True), whole_routers=True)
    cut = {s.layer: s.reads for s in out if s.name == "cut_tokens"}
    assert cut == {0: ("h.0.0", "weight.0.0"), 1: ("weight.1.0",), 2: ("weight.2.0",)}  # the stream is in parts from there on


def test_side_by_side_what_parts_send_leaves_together() -> None:
    forward = chunk(plain(SHAPES["moe"]), {0: 2, 1: 1, 2: 1})
    both = partition(forward, widest(forward, 2, whole_routers=False))
    whole = side_by_side(backward(both))
    assert sorted(s.tag for s in whole) == sorted(s.tag for s in backward(both))
    starts = [s.tag for s in whole if s.kind is Kind.START and s.op is Op.TOKENS]
    assert starts[:4] == ["B:combine>.2.0p1/2", "B:combine>.2.0p0/2", "B:dispatch>.2.0p1/2", "B:dispatch>.2.0p0/2"]
    assert {s.credit for s in whole if s.op is Op.TOKENS} == {0}
    assert {s.credit for s in both if s.op is Op.TOKENS} == {1}


def test_a_range_alone_reads_and_leaves_the_stream() -> None:
    forward = with_own_counts(plain(SHAPES["moe"]))
    stop = next(i for i, s in enumerate(forward) if s.layer == 1)
    start = next(i for i, s in enumerate(forward) if s.layer == 0)
    out = in_parts(forward[start:stop], forward[stop:], 4)
    assert out[0].writes == tuple(f"#batch.-.0p{i}/4" for i in range(4))
    assert out[1].reads == ("x.0.0",) and out[-1].writes == ("x.1.0",)
