"""Every schedule is legal, and its walk gives what its formulas say: bubble and activations."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from megalina.step.pipeline.cell import WEIGHTS_DONE, Pipeline, backward, forward, loop, v_shape
from megalina.step.pipeline.check import check
from megalina.step.pipeline.live import live_peaks
from megalina.step.pipeline.messages import with_messages
from megalina.step.pipeline.schedules.one_f_one_b import in_turn
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.walk import Times, walk

TRIPLES = (
    (1.0, 1.0, 1.0),
    (1.0, 1.25, 0.75),
    (1.0, 1.0, 0.5),
)  # exact in binary: walks equal formulas to the last bit but for thirds
ANY_CHUNKS = (1, 2, 3)


def sizes(name: str, ranks: int, most: int) -> Iterator[Size]:
    """Those that the schedule is made for, in pairs too where it can, with each of the times."""
    schedule = SCHEDULES[name]
    numbers = sorted({1, ranks - 1, ranks, 2 * ranks - 1, 2 * ranks, 3 * ranks, most - most % ranks} - {0})
    chunks = (schedule.chunks,) if schedule.chunks else ANY_CHUNKS
    for of_chunks, micro_batches, paired in product(chunks, numbers, (False, True)):
        size = Size(ranks, of_chunks, micro_batches, paired=paired)
        try:
            schedule.refuse(size)
        except ValueError:
            continue
        yield from (replace(size, times=Times(*triple)) for triple in TRIPLES)


def held(name: str, ranks: int, most: int) -> None:
    schedule, seen = SCHEDULES[name], 0
    for size in sizes(name, ranks, most):
        pipeline = schedule.pipeline(size)
        if size.times == Times(*TRIPLES[0]):
            check(pipeline)
        walked, bubble = walk(pipeline, size.times), schedule.bubble(size)
        if bubble is not None:
            seen += 1
            found = max(walked.idle)
            assert found <= bubble + 1e-9 if schedule.bubble_is_bound else found == pytest.approx(bubble, abs=1e-9), (size, found)
        peaks = live_peaks(pipeline)
        for rank in range(ranks):
            assert schedule.peak(size, rank) in (None, pytest.approx(peaks[rank])), (size, rank)
    assert seen or name == "greedy"


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_walks_give_what_formulas_say(name: str, ranks: int) -> None:
    held(name, ranks, 8)


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(2, 17))
@pytest.mark.parametrize("name", SCHEDULES)
def test_walks_give_what_formulas_say_for_many_ranks(name: str, ranks: int) -> None:
    held(name, ranks, 64 if name != "greedy" else 32)


def test_dualpipev_is_as_good_as_its_formula_where_forward_takes_as_long_as_the_gradients_of_inputs() -> None:
    """Elsewhere the formula of DualPipe's README is a bound: 4.35 where the list takes 3.90."""
    schedule = SCHEDULES["dualpipev"]
    for weights in (1.0, 0.5):
        size = Size(4, 2, 16, Times(1.0, 1.0, weights, pair=1.0), paired=True)
        assert max(walk(schedule.pipeline(size), size.times).idle) == pytest.approx(schedule.bubble(size))
    size = Size(4, 2, 16, Times(1.0, 1.3, 0.7), paired=True)
    assert (schedule.bubble(size), max(walk(schedule.pipeline(size), size.times).idle)) == pytest.approx((4.35, 3.90))


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("interleaved", 1), ("interleaved", 2), ("interleaved", 3)])
def test_pairs_cost_a_ranks_room_and_save_what_a_pair_saves(name: str, chunks: int) -> None:
    """The last rank has most of them: all its forwards but those in front."""
    for ranks, micro_batches in product((2, 4, 8), (16, 32)):
        plain, paired = (Size(ranks, chunks, micro_batches, Times(pair=0.75), paired=of) for of in (False, True))
        lists = [SCHEDULES[name].pipeline(size) for size in (plain, paired)]
        check(with_messages(lists[1], paired.times))
        pairs = sum(len(entry) > 1 for entry in lists[1].lists[-1])
        assert pairs == chunks * micro_batches - (chunks - 1) * ranks - 1
        saved = walk(lists[0], plain.times).makespan - walk(lists[1], paired.times).makespan
        assert saved == pytest.approx(0.25 * 3 * pairs / chunks)
        assert live_peaks(lists[0])[0] < live_peaks(lists[1])[0] <= min(micro_batches, 2 * ranks)


@pytest.mark.parametrize(("in_front", "error"), [((2, 1, 0), "2B0: it takes what 2F0 gives"), ((2, 1, 1), "the lists never end")])
def test_with_1f1bs_own_forwards_in_front_pairs_close_a_circle(in_front: tuple[int, ...], error: str) -> None:
    forwards, backwards = ([[cell(r, i) for i in range(6)] for r in range(3)] for cell in (forward, backward))
    own = [in_turn(forwards[r], backwards[r], warm_up=in_front[r], paired=True) for r in range(3)]
    with pytest.raises(ValueError, match=error):
        check(Pipeline(tuple(own), loop(3, 1), 6))


def test_zbv_has_no_bubble_between_a_ranks_first_cell_and_its_last_where_all_three_take_as_long() -> None:
    walked = walk(SCHEDULES["zbv"].pipeline(Size(4, 2, 8)))
    assert max(walked.shifted_idle) == 0 and max(walked.idle) == 1.5


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_what_is_kept_until_weights_are_done(ranks: int) -> None:
    """As docs/pipelines.md has it."""
    m = 2 * ranks
    for chunks in ANY_CHUNKS:
        assert set(live_peaks(SCHEDULES["zb_h1"].pipeline(Size(ranks, chunks, m)), WEIGHTS_DONE)) == {float(ranks)}
    assert set(live_peaks(SCHEDULES["zbv"].pipeline(Size(ranks, 2, m)), WEIGHTS_DONE)) == {float(ranks)}
    assert set(live_peaks(SCHEDULES["dualpipev"].pipeline(Size(ranks, 2, m)), WEIGHTS_DONE)) == {ranks + 0.5}
    for name in ("gpipe", "1f1b", "interleaved"):
        pipeline = SCHEDULES[name].pipeline(Size(ranks, 1, m))
        assert live_peaks(pipeline, WEIGHTS_DONE) == live_peaks(pipeline)


@pytest.mark.parametrize("room", [1.0, 1.5, 2.0, 4.0])
def test_greedy_keeps_to_its_room_and_is_the_faster_the_more_it_has(room: float) -> None:
    made = {r: SCHEDULES["greedy"].pipeline(Size(4, 2, 8, Times(1, 1.3, 0.8), most_live=r)) for r in (room, 8.0)}
    check(made[room], most_live=room)
    assert walk(made[8.0], Times(1, 1.3, 0.8)).makespan <= walk(made[room], Times(1, 1.3, 0.8)).makespan


def test_greedy_goes_by_what_each_stage_takes() -> None:
    """A last stage that takes three times as long, as one with a large head."""
    shares = (0.8, 0.8, 0.8, 1.6)
    even, uneven = Times(), Times(shares=shares)
    schedule = SCHEDULES["greedy"]
    blind = walk(schedule.pipeline(Size(4, 1, 8, even)), uneven).makespan
    assert walk(schedule.pipeline(Size(4, 1, 8, uneven)), uneven).makespan <= blind


def test_greedy_is_zb_h1_where_all_three_take_as_long() -> None:
    for ranks in (2, 4, 8):
        size = Size(ranks, 1, 2 * ranks)
        assert walk(SCHEDULES["greedy"].pipeline(size)).makespan == walk(SCHEDULES["zb_h1"].pipeline(size)).makespan


def test_messages_that_take_time_lengthen_a_step_by_the_hops_on_its_way() -> None:
    size = Size(4, 1, 8, Times(message=0.125))
    pipeline = SCHEDULES["gpipe"].pipeline(size)
    assert walk(pipeline, size.times).makespan == walk(pipeline).makespan + 2 * 3 * 0.125
    assert walk(with_messages(pipeline, size.times), size.times).makespan == walk(pipeline, size.times).makespan


def test_stages_lie_on_a_loop_or_on_a_v() -> None:
    assert loop(3, 2) == (0, 1, 2, 0, 1, 2)
    assert v_shape(3, 2) == (0, 1, 2, 2, 1, 0) and v_shape(3, 3) == (0, 1, 2, 2, 1, 0, 0, 1, 2) and v_shape(3, 1) == loop(3, 1)


@pytest.mark.parametrize(
    ("name", "size", "error"),
    [
        ("1f1b", Size(4, 2, 8), "1f1b has one chunk on each rank, not 2: set chunks to 1"),
        ("zbv", Size(4, 1, 8), "zbv has 2 chunks on each rank, not 1: set chunks to 2"),
        ("interleaved", Size(4, 2, 10), "10 of them must be a multiple of 4 ranks: take 8 or 12"),
        ("interleaved", Size(4, 2, 3), "3 of them must be a multiple of 4 ranks: take 4"),
        ("zb_h1", Size(4, 2, 6), "6 of them must be a multiple of 4 ranks: take 4 or 8"),
        ("dualpipev", Size(4, 2, 7), "8, to fill both halves of its V, and there are 7: take 8 or more, or at most 3 ranks"),
        ("greedy", Size(4, 2, 7, most_live=0.5), "room for 0.5 micro-batches of activations on a rank: .* give 1 or more"),
        ("gpipe", Size(2, 1, 7, Times(shares=(1.0,))), "times have shares of 1 stages, and there are 2: give one for each"),
        (
            "gpipe",
            Size(2, 1, 7, paired=True),
            "no pairs of a forward and a backward, as backwards begin when all",
        ),
        ("zb_h1", Size(2, 1, 7, paired=True), "as few forwards in front as 1f1b has, .* take 1f1b, interleaved or dualpipev"),
        ("zbv", Size(2, 2, 7, paired=True), "no pairs of a forward and a backward, as its backwards follow forwards without"),
        ("greedy", Size(2, 2, 7, paired=True), "no pairs of a forward and a backward, as it takes one cell after another"),
        ("gpipe", Size(0, 1, 7), "ranks 0, chunks 1, micro-batches 7: each must be at least 1"),
    ],
)
def test_numbers_that_a_schedule_is_not_made_for_are_refused(name: str, size: Size, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        SCHEDULES[name].pipeline(size)
