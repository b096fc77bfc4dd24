"""Cells become programs: each legal by itself, all of them together; planted bugs are named."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from megalina.blocks.model import plain_shape
from megalina.step.forward import Shape, plain
from megalina.step.passes import place_gradients
from megalina.step.pipeline.fill import axis_of, ends_of, programs, shared_buckets
from megalina.step.pipeline.messages import with_messages
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.stages import StageLayers, cut, stages_from
from megalina.step.pipeline.together import check_together
from megalina.step.pipeline.torch_table import from_csv
from megalina.step.precedence import Precedence
from megalina.step.program import BucketSpec, Kind, Op, Program

SHAPES = {
    "MoE": plain_shape(moe=(True,) * 8),
    "dense and MoE, tensor parallel": plain_shape(moe=(False, True) * 4, tp=True, shared_experts=True, tied=False),
    "selection biases": plain_shape(moe=(False,) + (True,) * 7, router_state=True),
    "multi-token prediction": plain_shape(moe=(True,) * 7, mtp_layers=1),
    "all experts": plain_shape(moe=(True,) * 8, all_experts=True),
}


PAIRED = ("1f1b in pairs", "interleaved in pairs", "dualpipev in pairs")


def filled(
    name: str,
    shape: Shape,
    stages: Sequence[StageLayers] | None = None,
    *,
    ranks: int = 2,
    micro_batches: int = 4,
    chunks: int = 0,
    paired: bool = False,
) -> tuple[Program, ...]:
    forward = plain(shape)
    buckets = {n: BucketSpec(64, "dp") for n in dict.fromkeys(u for s in forward for u in s.uses)}
    schedule = SCHEDULES[name]
    pipeline = with_messages(schedule.pipeline(Size(ranks, chunks or schedule.chunks or 2, micro_batches, paired=paired)))
    stages = stages or cut([1.0] * len(shape.layers), pipeline.stages)
    return programs(pipeline, stages, forward, buckets, late=shape.deferred("all"), router_state=shape.router_state)


@pytest.mark.sampled(17)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*SCHEDULES, *PAIRED])
def test_programs_are_legal_each_and_together(name: str, shape: str) -> None:
    name, paired = name.removesuffix(" in pairs"), name in PAIRED
    of_ranks = filled(name, SHAPES[shape], paired=paired)
    check_together(of_ranks)
    for program in of_ranks:
        acts = Precedence(program)
        assert acts.legal(acts.acts)
        assert any(s.credit for s in program) == (paired and any(s.carries_tokens for s in program))
        split = name in ("zb_h1", "zbv", "dualpipev", "greedy")
        assert any(s.phase == "W" for s in program) == split


def test_what_is_between_stages_is_sent_there_and_back() -> None:
    first, second = filled("gpipe", SHAPES["MoE"], micro_batches=1, chunks=1)
    sent = [f"{s.tag} {s.op.name} {s.axis}" for s in first if s.op in (Op.SEND, Op.RECV)]
    assert sent == [
        "F:stream>.4.0 SEND pp0-1",
        "B:stream>.4.0 RECV pp0-1",
        "B:stream<.4.0 RECV pp0-1",
        "F:stream<.4.0 SEND pp0-1",
    ]
    there = [s for s in second if s.op in (Op.SEND, Op.RECV)]
    assert [(s.phase, s.kind, s.op) for s in there] == [
        ("F", Kind.START, Op.RECV),
        ("F", Kind.WAIT, Op.RECV),
        ("B", Kind.START, Op.SEND),
        ("B", Kind.WAIT, Op.SEND),
    ]
    assert there[1].writes == ("x.4.0",) and there[2].reads == ("x.4.0'",)
    assert ends_of(axis_of(3, 1)) == (1, 3) and ends_of("dp") == ends_of("pp") == ()


def test_gradients_go_where_a_strategy_puts_them() -> None:
    forward, shape = plain(SHAPES["MoE"]), SHAPES["MoE"]
    buckets = {n: BucketSpec(64, "dp") for n in dict.fromkeys(u for s in forward for u in s.uses)}
    pipeline = with_messages(SCHEDULES["zbv"].pipeline(Size(2, 2, 4)))
    for place, before in (("ready", True), ("tail", False)):
        placed = partial(place_gradients, place=place)
        of_ranks = programs(pipeline, cut([1.0] * 8, 4), forward, buckets, late=shape.deferred("all"), placed=placed)
        for program in of_ranks:
            first = next(i for i, s in enumerate(program) if s.op is Op.GRADS)
            assert (first < max(i for i, s in enumerate(program) if s.phase == "W")) == before


def test_a_rank_of_a_v_hands_over_to_itself_and_no_bucket_is_on_two_ranks() -> None:
    of_ranks = filled("zbv", SHAPES["MoE"])
    assert not any(s.name == "stream" and s.layer == 4 for program in of_ranks for s in program)  # between stages 1 and 2
    assert shared_buckets(of_ranks) == {}
    assert shared_buckets(filled("1f1b", SHAPES["MoE"], chunks=1)) == {"embedding": (0, 1)}


def test_a_pair_takes_turns_that_end_where_tokens_start_to_travel() -> None:
    """Backward of micro-batch 0 in layer 3, and forward of micro-batch 2 in layer 4, as Megatron-LM has them."""
    program = filled("dualpipev", SHAPES["MoE"], paired=True)[1]
    first = next(i for i, s in enumerate(program) if s.credit)
    heavy = ("attention", "experts", "dispatch", "combine")
    assert " ".join(s.tag for s in program[first : first + 20] if s.name in heavy) == (
        "B:combine>.3.0 F:attention.4.2 F:dispatch>.4.2 B:combine<.3.0 B:experts.3.0 B:dispatch>.3.0 F:dispatch<.4.2 "
        "F:experts.4.2 F:combine>.4.2 B:dispatch<.3.0 B:attention.3.0 B:combine>.2.0 F:combine<.4.2 F:attention.5.2"
    )


def test_layers_are_cut_as_they_cost_and_stages_may_hold_an_end_alone() -> None:
    of_ranks = filled("1f1b", SHAPES["MoE"], stages_from("E|t*8L"), chunks=1)
    assert {s.name for s in of_ranks[0] if s.phase == "F" and s.kind is Kind.COMPUTE} == {"embed"}
    check_together(of_ranks)


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        (plain_shape(moe=(True,) * 4, experts_choose=True), "reads #sizes.0.0 of stage 0: only the stream goes"),
        (plain_shape(moe=(True,) * 4, global_balance=True), "in stage 1 reads #load.0.0 of stage 0"),
    ],
)
def test_what_needs_more_than_the_stream_is_refused(shape: Shape, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        filled("1f1b", shape, chunks=1)


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="layers are cut into 3 stages, and the schedule has 2: cut them alike"):
        filled("1f1b", SHAPES["MoE"], cut([1.0] * 8, 3), chunks=1)
    with pytest.raises(ValueError, match="layer 4 is in no stage: stages have 4 layers"):
        filled("1f1b", SHAPES["MoE"], cut([1.0] * 4, 2), chunks=1)


def test_lists_that_programs_are_not_made_of_are_refused() -> None:
    forward, pipeline = plain(SHAPES["MoE"]), SCHEDULES["1f1b"].pipeline(Size(2, 1, 2))
    with pytest.raises(ValueError, match="no SEND and RECV: put them in by with_messages"):
        programs(pipeline, cut([1.0] * 8, 2), forward, {})
    with pytest.raises(ValueError, match="have 0UNSHARD: programs place gathers"):
        programs(from_csv("0UNSHARD,0F0,0B0\n"), cut([1.0] * 8, 1), forward, {})


def moved(program: Program, tag: str, op: Op | None, to: int) -> Program:
    out = list(program)
    place = next(i for i, s in enumerate(out) if s.tag == tag and s.op is op)
    out.insert(to, out.pop(place))
    return tuple(out)


def test_planted_bugs_between_ranks_are_named() -> None:
    first, second = filled("1f1b", SHAPES["MoE"], chunks=1)
    with pytest.raises(
        ValueError, match=r"rank 0 at position \d+, F:stream>.4.1 \(SEND\), meets F:stream>.4.0 \(RECV\) of rank 1"
    ):
        place = next(i for i, s in enumerate(first) if s.tag == "F:stream>.4.0")
        check_together((moved(first, "F:stream>.4.1", Op.SEND, place), second))
    with pytest.raises(ValueError, match=r"rank 0 at position \d+, B:stream>.4.3 \(RECV\): nobody on axis pp0-1 starts the same"):
        check_together((first, tuple(s for s in second if (s.tag, s.op) != ("B:stream>.4.3", Op.SEND))))
    with pytest.raises(ValueError, match=r"U:measured>.-.0 \(SUM\): nobody on axis world starts the same"):
        check_together((first, tuple(s for s in second if s.name != "measured")))


def test_a_circle_through_a_sum_over_all_ranks_is_named() -> None:
    """Rank 0 starts the sum behind the WAIT for its SEND, and rank 1 awaits the sum before its RECV."""
    made = filled("1f1b", SHAPES["MoE"], chunks=1)
    first, second = ([replace(s, axis="world") if s.name == "divisor" else s for s in program] for program in made)
    check_together((tuple(first), tuple(second)))
    started, awaited = (next(s for s in first if s.tag == f"U:divisor{end}.-.0") for end in "><")
    first.insert(first.index(awaited), first.pop(next(i for i, s in enumerate(first) if s.tag == "F:stream<.4.0")))
    first.remove(started)
    first.insert(first.index(awaited), started)
    recv = next(i for i, s in enumerate(second) if s.op is Op.RECV)
    second.insert(recv, second.pop(next(i for i, s in enumerate(second) if s.tag == "U:divisor<.-.0")))
    circle = (
        r"rank 0 at position \d+, F:stream<.4.0 \(SEND\), waits for rank 1; rank 1 at .*U:divisor<.-.0 \(SUM\), waits for rank 0"
    )
    with pytest.raises(ValueError, match=f"the programs never end: {circle}"):
        check_together((tuple(first), tuple(second)))


def test_a_message_behind_the_measurement_of_one_rank_is_refused() -> None:
    """Nothing that the rank measures waits for its last SEND."""
    first, second = filled("1f1b", SHAPES["MoE"], chunks=1)
    start = next(s for s in second if s.tag == "B:stream>.4.3")
    wait = next(s for s in second if s.tag == "B:stream<.4.3")
    left = [s for s in second if s not in (start, wait)]
    place = next(i for i, s in enumerate(left) if s.tag == "U:measure.-.0") + 1
    check_together((first, (*left[: place - 1], start, wait, *left[place - 1 :])))
    with pytest.raises(ValueError, match=r"rank 0 starts 8 things along axis pp0-1 before U:measure\.-\.0, and rank 1 7: there"):
        check_together((first, (*left[:place], start, wait, *left[place:])))


def test_an_axis_of_a_shared_bucket_has_one_order_too() -> None:
    forward, shape = plain(SHAPES["MoE"]), SHAPES["MoE"]
    names = dict.fromkeys(u for s in forward for u in s.uses)
    buckets = {n: BucketSpec(64, "ends" if n == "embedding" else "dp") for n in names}
    pipeline = with_messages(SCHEDULES["1f1b"].pipeline(Size(2, 1, 4)))
    of_ranks = programs(pipeline, cut([1.0] * 8, 2), forward, buckets, late=shape.deferred("all"))
    check_together(of_ranks, {"ends": (0, 1)})
    with pytest.raises(ValueError, match="axis ends has pipeline rank 2, and there are 2 ranks"):
        check_together(of_ranks, {"ends": (0, 2)})
    without = tuple(s for s in of_ranks[1] if s.axis != "ends")
    with pytest.raises(ValueError, match=r"rank 0 at position \d+, B:embedding>.-.0.0:64. \(GRADS\): nobody on axis ends"):
        check_together((of_ranks[0], without), {"ends": (0, 1)})
