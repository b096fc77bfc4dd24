"""The log of collectives tells orders and sizes apart that ranks must share, and a late rank from a different one."""

from pathlib import Path

import pytest

from megalina.collective_log import CollectiveLog, agree, first_difference, read_collectives, read_mirror

RANKS = (0, 1)
Call = tuple[str, str, int | None, tuple[int, ...], tuple[int, ...]]
SUM_A: Call = ("sum", "B:dense.0>.-.0", 8, (), ())
SUM_B: Call = ("sum", "B:dense.1>.-.0", 8, (), ())


def moved(send: tuple[int, ...], receive: tuple[int, ...]) -> Call:
    return "all-to-all", "F:dispatch>.0.0", None, send, receive


def logs_of(*calls: list[Call]) -> list[CollectiveLog]:
    """A log for each rank, which submits its list of calls."""
    logs = []
    for rank, own in enumerate(calls):
        log = CollectiveLog(rank)
        log.position.step = 1
        for kind, tag, count, send, receive in own:
            log.position.enter(tag, waits=False)
            log.submit("dp", RANKS, kind, "torch.float32", (4,), count, send, receive)
        logs.append(log)
    return logs


def agreed(logs: list[CollectiveLog]) -> bool:
    return agree([sum(values) for values in zip(*(log.riders() for log in logs), strict=True)], len(logs))


def difference(logs: list[CollectiveLog]) -> str:
    return first_difference({log.rank: log.entries() for log in logs})


def test_equal_orders_agree_and_have_no_difference() -> None:
    logs = logs_of([SUM_A, SUM_B, moved((1, 2), (1, 5))], [SUM_A, SUM_B, moved((5, 3), (2, 3))])
    assert difference(logs) == ""
    assert agreed(logs)


@pytest.mark.parametrize(
    ("other", "number"),
    [
        ([SUM_B, SUM_A], 0),
        ([SUM_A, ("gather", *SUM_B[1:])], 1),
        ([SUM_A, ("sum", SUM_B[1], 9, (), ())], 1),
    ],
)
def test_another_order_class_or_size_is_found_with_both_sides_and_their_call_sites(other: list[Call], number: int) -> None:
    logs = logs_of([SUM_A, SUM_B], other)
    found = difference(logs)
    assert found.startswith(f"collective {number} on axis dp is not the same on all ranks:\n  rank 0: sum in instruction ")
    assert "\n  rank 1: " in found
    assert not agreed(logs)


@pytest.mark.parametrize(("send", "receive"), [((5, 3), (3, 3)), ((4, 3), (2, 3)), ((6, 3), (3, 3))])
def test_split_sizes_that_do_not_match_are_found_also_where_totals_do(send: tuple[int, ...], receive: tuple[int, ...]) -> None:
    logs = logs_of([moved((1, 2), (1, 5))], [moved(send, receive)])
    assert "collective 0 on axis dp has sizes that don't match" in difference(logs)
    assert not agreed(logs)


def test_a_rank_that_is_behind_does_not_differ() -> None:
    assert difference(logs_of([SUM_A, SUM_B], [SUM_A])) == ""


def test_a_collective_more_on_one_rank_is_noticed() -> None:
    assert not agreed(logs_of([SUM_A, SUM_B], [SUM_A]))


def test_garbage_in_place_of_the_riders_is_no_agreement() -> None:
    assert not agree([float("nan")] * 5, 2)
    assert not agree([float("inf"), 1.0, 1.0, 1.0, 0.0], 2)
    assert not agree([0.3, 1.7, 2.0, 9.0, 0.0], 2)


def test_what_two_comparisons_have_covered_is_forgotten() -> None:
    (log,) = logs_of([SUM_A])
    for step in range(2, 5):
        log.riders()
        log.position.step = step
        log.submit("dp", RANKS, "sum", "torch.float32", (4,), 8)
    assert [entry.step for entry in log.entries()] == [3, 4]
    assert [entry.number for entry in log.entries()] == [2, 3]


def test_a_mirror_reads_as_the_log_after_it_has_gone_round(tmp_path: Path) -> None:
    (log,) = logs_of([])
    log.mirror(tmp_path / "mirror")
    for i in range(6000):
        uneven = i % 2 == 0
        row, count, send = (4, i % 7), None if uneven else 3, [i, 1] if uneven else ()
        log.submit("ep", RANKS, "all-to-all", "torch.float32", row, count, send, [2, i])
    mirrored, whole = read_collectives(tmp_path / "mirror"), log.entries()
    assert 1000 < len(mirrored) < 6000
    last = sorted(mirrored, key=lambda entry: entry.number)
    assert [e.number for e in last] == list(range(6000 - len(last), 6000))
    for entry, kept in zip(last[-20:], whole[-20:], strict=True):
        assert entry.key == kept.key and entry.site == kept.site and entry.ranks == kept.ranks
        if entry.count is None:
            assert (entry.send, entry.receive) == (kept.send, kept.receive)


def test_a_position_can_be_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "position"
    assert read_mirror(path) == ""
    log = CollectiveLog(0)
    log.position.mirror(path)
    assert read_mirror(path) == ""
    log.position.step = 12
    log.position.enter("F:attention_residual.10.3", waits=False)
    log.position.enter("F:mix.0.0", waits=False)
    assert read_mirror(path) == "step 12, instruction F:mix.0.0"
    log.position.leave()
    assert read_mirror(path) == "step 12, between programs"
