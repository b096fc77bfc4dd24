"""The check over all lists finds planted bugs and names them; it accepts what trains, and nothing else."""

import random
from collections.abc import Callable

import pytest

from megalina.step.pipeline.cell import (
    COMPUTED,
    RECEIVES,
    SENDS,
    Cell,
    CellList,
    Entry,
    Pipeline,
    Work,
    backward,
    forward,
    input_gradients,
    weight_gradients,
)
from megalina.step.pipeline.check import check
from megalina.step.pipeline.messages import with_messages, without_messages
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.torch_table import from_csv, to_csv
from megalina.step.pipeline.walk import Stuck, Times, walk
from tests.step.pipeline.real_messages import trains


def made(name: str, ranks: int = 3, micro_batches: int = 6) -> Pipeline:
    return SCHEDULES[name].pipeline(Size(ranks, SCHEDULES[name].chunks or 2, micro_batches))


def changed(pipeline: Pipeline, rank: int, change: Callable[[list[Entry]], object]) -> Pipeline:
    cells = list(pipeline.lists[rank])
    change(cells)
    lists: list[CellList] = list(pipeline.lists)
    lists[rank] = tuple(cells)
    return Pipeline(tuple(lists), pipeline.rank_of, pipeline.micro_batches)


def place(pipeline: Pipeline, rank: int, text: str) -> int:
    return next(position for position, cell in pipeline.cells(rank) if str(cell) == text)


def refused(pipeline: Pipeline, *, meet: bool = True) -> str:
    with pytest.raises(ValueError) as error:
        check(pipeline, meet=meet)
    return str(error.value)


def test_a_missing_cell_of_weights_is_named() -> None:
    pipeline = made("zb_h1")
    at = place(pipeline, 1, "4W2")
    assert refused(changed(pipeline, 1, lambda cells: cells.pop(at))) == (
        f"rank 1 has no 4W2: nobody adds the gradients of weights that 4I2 at position {place(pipeline, 1, '4I2')} leaves"
    )


def test_missing_forwards_and_backwards_are_named() -> None:
    pipeline = SCHEDULES["1f1b"].pipeline(Size(3, 1, 6))
    assert "rank 2 has no 2F1: stage 2 leaves out micro-batch 1" in refused(
        changed(pipeline, 2, lambda c: c.remove(forward(2, 1)))
    )
    found = refused(changed(pipeline, 2, lambda cells: cells.remove(backward(2, 1))))
    assert found == "rank 2 has neither 2B1 nor 2I1: micro-batch 1 has no backward there"


def test_what_comes_twice_or_in_the_wrong_order_is_named() -> None:
    pipeline = made("zbv")
    last = len(pipeline.lists[0])
    assert refused(changed(pipeline, 0, lambda cells: cells.append(forward(0, 0)))) == (
        f"rank 0 at position {last}, 0F0: it is at position 0 already"
    )
    assert "5B0: it is at" not in refused(changed(pipeline, 0, lambda cells: cells.append(backward(5, 0))))
    assert "5B0 at position" in refused(changed(pipeline, 0, lambda cells: cells.append(backward(5, 0))))

    def weights_first(cells: list[Entry]) -> None:
        a, b = cells.index(input_gradients(5, 0)), cells.index(weight_gradients(5, 0))
        cells[a], cells[b] = cells[b], cells[a]

    a, b = place(pipeline, 0, "5I0"), place(pipeline, 0, "5W0")
    assert (
        refused(changed(pipeline, 0, weights_first)) == f"rank 0 at position {a}, 5W0: it takes what 5I0 gives, at position {b}"
    )


def test_cells_of_another_rank_stage_or_micro_batch_are_named() -> None:
    pipeline = SCHEDULES["gpipe"].pipeline(Size(3, 1, 2))
    assert refused(changed(pipeline, 0, lambda cells: cells.append(forward(1, 0)))) == (
        "rank 0 at position 4, 1F0: stage 1 is on rank 1"
    )
    assert "9F0: there are stages 0 to 2" in refused(changed(pipeline, 0, lambda cells: cells.append(forward(9, 0))))
    assert "0F2: there are micro-batches 0 to 1" in refused(changed(pipeline, 0, lambda cells: cells.append(forward(0, 2))))


def test_a_swapped_send_is_named_with_what_it_meets() -> None:
    pipeline = with_messages(SCHEDULES["gpipe"].pipeline(Size(3, 1, 3)))

    lists = [list(cells) for cells in pipeline.lists]
    sends = [i for i, entry in enumerate(lists[0]) if entry[0].work is Work.SEND_ACTIVATIONS]
    late = lists[0].pop(sends[0])
    lists[0].insert(sends[1], late)  # 0SEND_F0 behind 0SEND_F1
    found = refused(Pipeline(tuple(map(tuple, lists)), pipeline.rank_of, 3))
    assert "0SEND_F1 meets rank 1 at position 0, 1RECV_F0: rank 1 receives in another order than rank 0 sends" in found


def naive(pipeline: Pipeline) -> Pipeline:
    """Each SEND behind its cell and each RECV right before its reader, by themselves."""
    placed = with_messages(pipeline)
    lists = []
    for rank in range(placed.ranks):
        sent = {str(cell) for _, cell in placed.cells(rank) if cell.work in SENDS}
        received = {str(cell) for _, cell in placed.cells(rank) if cell.work in RECEIVES}
        out: list[Entry] = []
        for entry in pipeline.lists[rank]:
            (cell,) = entry
            kind = "F" if cell.work is Work.FORWARD else "B"
            recv, send = f"{cell.stage}RECV_{kind}{cell.micro_batch}", f"{cell.stage}SEND_{kind}{cell.micro_batch}"
            if recv in received:
                out.append((Cell(Work(f"RECV_{kind}"), cell.stage, cell.micro_batch),))
            out.append(entry)
            if send in sent:
                out.append((Cell(Work(f"SEND_{kind}"), cell.stage, cell.micro_batch),))
        lists.append(tuple(out))
    return Pipeline(tuple(lists), pipeline.rank_of, pipeline.micro_batches)


def test_two_neighbours_that_both_send_first_are_a_circle_where_a_send_waits_for_its_recv() -> None:
    pipeline = naive(SCHEDULES["1f1b"].pipeline(Size(2, 1, 4)))
    assert refused(pipeline) == (
        "the lists never end: rank 0 at position 3, 0SEND_F1, waits for 1RECV_F1, which rank 1 has at position 4 behind 1SEND_B0"
        "; rank 1 at position 3, 1SEND_B0, waits for 0RECV_B0, which rank 0 has at position 4 behind 0SEND_F1"
    )
    check(pipeline, meet=False)
    check(with_messages(without_messages(pipeline)))


def test_two_neighbours_that_both_receive_first_are_a_circle() -> None:
    rows = "0F0,0RECV_B0,0SEND_F0,0B0", "1RECV_F0,1F0,1B0,1SEND_B0"
    assert refused(from_csv("\n".join(rows))) == (
        "the lists never end: rank 0 at position 1, 0RECV_B0, waits for 1SEND_B0, which rank 1 has at position 3 behind 1RECV_F0"
        "; rank 1 at position 0, 1RECV_F0, waits for 0SEND_F0, which rank 0 has at position 2 behind 0RECV_B0"
    )


def test_a_message_that_is_missing_or_that_nobody_asked_for_is_named() -> None:
    pipeline = with_messages(SCHEDULES["gpipe"].pipeline(Size(3, 1, 2)))
    at = place(pipeline, 1, "1SEND_F0")
    assert refused(changed(pipeline, 1, lambda c: c.pop(at))).startswith("rank 1 has no 1SEND_F0: what 1F0 at position")
    at = place(pipeline, 2, "2RECV_F1")
    assert refused(changed(pipeline, 2, lambda c: c.pop(at))).startswith("rank 2 has no 2RECV_F1, which 2F1 at position")
    extra = (Cell(Work.SEND_GRADIENTS, 0, 0),)
    assert refused(changed(pipeline, 0, lambda c: c.append(extra))).endswith("0SEND_B0: there is nothing to send")
    assert "only messages as a batch" in refused(changed(pipeline, 0, lambda c: c.append((extra[0], *forward(0, 0)))))


def test_a_send_before_its_cell_and_a_recv_behind_its_reader_are_named() -> None:
    pipeline = with_messages(SCHEDULES["gpipe"].pipeline(Size(2, 1, 1)))
    assert "0SEND_F0: it sends what 0F0 gives, at position 1" in refused(changed(pipeline, 0, lambda c: c.insert(0, c.pop(1))))
    assert "1F0: it needs 1RECV_F0, at position 1" in refused(changed(pipeline, 1, lambda c: c.insert(1, c.pop(0))))


def test_pairing_the_neighbours_of_1f1b_is_a_circle() -> None:
    """A rank holds the forward that is to be sent behind the backward that is to come."""
    m = 4

    def pair(stage: int, i: int) -> Entry:
        return (*forward(stage, i + 1), *backward(stage, i)) if i + 1 < m else backward(stage, i)

    lists = tuple((forward(rank, 0), *(pair(rank, i) for i in range(m))) for rank in range(2))
    pipeline = Pipeline(lists, (0, 1), m)
    with pytest.raises(Stuck, match=r"never end: .*rank 0 at position 1, \(0F1;0B0\), waits for 1B0"):
        walk(pipeline)


def test_too_many_activations_are_named() -> None:
    with pytest.raises(ValueError, match="rank 0 holds 6 micro-batches of activations at once, and has room for 5"):
        check(SCHEDULES["gpipe"].pipeline(Size(2, 1, 6)), most_live=5)


def test_weights_of_fsdp_are_there_when_a_stage_computes() -> None:
    rows = "0UNSHARD,0F0,0RESHARD,{}0B0,0REDUCE_GRAD\n"
    check(from_csv(rows.format("0UNSHARD,")))
    assert refused(from_csv(rows.format(""))) == "rank 0 at position 3, 0B0: the weights of stage 0 are not gathered then"
    early = refused(from_csv("0F0,0REDUCE_GRAD,0B0\n"))
    assert early == "rank 0 at position 1, 0REDUCE_GRAD: gradients of weights still come, at position 2"


def test_messages_need_lists_without_any_and_cells_that_take_time() -> None:
    pipeline = SCHEDULES["gpipe"].pipeline(Size(2, 1, 1))
    with pytest.raises(ValueError, match="have SEND and RECV already"):
        with_messages(with_messages(pipeline))
    with pytest.raises(ValueError, match="each must take some time"):
        with_messages(pipeline, Times(weights=0.0))


@pytest.mark.parametrize("name", SCHEDULES)
def test_messages_between_two_ranks_have_one_order_and_go_one_by_one_too(name: str) -> None:
    pipeline = with_messages(made(name, 4, 8), Times(1.0, 1.3, 0.7))
    check(pipeline)
    alone = from_csv(to_csv(pipeline))  # as torch has them: no batches
    check(alone)
    assert trains(pipeline) and trains(alone)
    for a in range(4):
        for b in range(a):
            ways = [
                [str(c) for _, c in alone.cells(x) if c.work not in COMPUTED and alone.peer(c) == y] for x, y in ((a, b), (b, a))
            ]
            met = [str(c.other_end) for _, c in alone.cells(b) if c.work not in COMPUTED and alone.peer(c) == a]
            assert ways[0] == met and len(ways[0]) == len(ways[1])


def mutated(pipeline: Pipeline, rng: random.Random) -> Pipeline:
    """Something small is wrong, or merely otherwise."""
    lists = [list(cells) for cells in pipeline.lists]
    for _ in range(rng.choice((1, 1, 2))):
        cells = rng.choice([own for own in lists if len(own) > 1])
        i = rng.randrange(len(cells))
        j = min(max(0, i + rng.choice((-3, -2, -1, 1, 2, 3))), len(cells) - 1)
        match rng.randrange(8):
            case 0:
                cells.pop(i)
            case 1:
                cells.insert(j, cells[i])
            case 2:
                rng.choice(lists).append(cells.pop(i))
            case 3:
                one = cells[i][0]
                number = rng.randrange(pipeline.micro_batches)
                cells[i] = (Cell(one.work, one.stage, number), *cells[i][1:])
            case 4 if len(cells[i]) > 1:
                cells[i : i + 1] = [(cell,) for cell in rng.sample(cells[i], len(cells[i]))]
            case _:
                cells.insert(j, cells.pop(i))
    return Pipeline(tuple(map(tuple, lists)), pipeline.rank_of, pipeline.micro_batches)


def agreed(name: str, seeds: range) -> tuple[int, int]:
    """How many changed lists were accepted and refused, in each case as what really happens wants it."""
    pipeline, counts = with_messages(made(name)), [0, 0]
    for seed in seeds:
        other = mutated(pipeline, random.Random(seed))
        try:
            check(other)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == trains(other), (name, seed)
        counts[accepted] += 1
    return counts[1], counts[0]


@pytest.mark.parametrize("name", ["interleaved", "dualpipev"])
def test_what_is_accepted_trains_and_what_is_refused_does_not(name: str) -> None:
    accepted, refused_ = agreed(name, range(60))
    assert accepted > 5 and refused_ > 20


@pytest.mark.full
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_accepted_trains_and_what_is_refused_does_not_for_many_lists(name: str) -> None:
    agreed(name, range(60, 3000))


def uneven(seed: int) -> tuple[str, Pipeline, Times]:
    """A schedule with times of its own for every kind of cell and every stage."""
    rng = random.Random(seed)
    name, ranks = rng.choice(list(SCHEDULES)), rng.choice((1, 2, 3, 4, 6))
    schedule, micro_batches = SCHEDULES[name], ranks * rng.choice((2, 3))
    chunks = schedule.chunks or rng.choice((1, 2, 3))
    shares = tuple(rng.choice((0.1, 0.3, 0.7, 1.1)) for _ in range(ranks * chunks))
    forward_, inputs, weights, message = (rng.choice((0.1, 0.3, 0.7, 1.0, 1.3)) for _ in range(4))
    times = Times(forward_, inputs, weights, rng.choice((0.0, message)), rng.choice((0.7, 1.0)), shares)
    room = rng.choice((0.0, 1.0, 1.5, 2.0))
    paired = name in ("1f1b", "interleaved", "dualpipev") and rng.random() < 0.5
    return f"{name} {seed}", schedule.pipeline(Size(ranks, chunks, micro_batches, times, room, paired)), times


def placed_well(seed: int) -> None:
    what, pipeline, times = uneven(seed)
    sent = with_messages(pipeline, times)
    check(sent)
    assert trains(sent), what
    check(from_csv(to_csv(sent)))
    assert walk(sent, times).makespan == pytest.approx(walk(pipeline, times).makespan), what
    assert walk(sent, times, meet=True).makespan >= walk(pipeline, times).makespan - 1e-9, what


def test_messages_hold_up_nobody_whatever_stages_take() -> None:
    for seed in range(12):
        placed_well(seed)


@pytest.mark.full
@pytest.mark.parametrize("seeds", [range(i, i + 100) for i in range(12, 512, 100)], ids=str)
def test_messages_hold_up_nobody_in_many_cases(seeds: range) -> None:
    for seed in seeds:
        placed_well(seed)
