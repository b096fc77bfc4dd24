"""Virtual time is what a hand-made trace and a simpler simulation say; no list that the checker accepts can deadlock.

.venv/bin/python -m pytest tests/perfmodel/sim -m 'full or not full' -rP     # prints how many schedules were tried
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from math import prod
from random import Random

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from megalina.perfmodel.sim.lanes import OURS, Rule
from megalina.perfmodel.sim.lower_bound import lower_bound
from megalina.perfmodel.sim.network import Loads, one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import Deadlock, Timeline, simulate
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Op, Program, check
from megalina.step.strategy import STRATEGIES, Setting, given, training_step
from tests.perfmodel.sim.schedules import (
    DELAYS_S,
    LAYOUTS,
    LITERAL,
    NAMED,
    OF_OTHER_PASSES,
    SHAPES,
    WALKING,
    buckets_of,
    compute,
    delays,
    order_of,
    ranks_of,
    reduced,
    setting_of,
    start,
    wait,
)
from tests.profiles import examples

every_strategy = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in OF_OTHER_PASSES)) for name in STRATEGIES]
)

C, START, WAIT = Kind.COMPUTE, Kind.START, Kind.WAIT
SMALL = [layout for layout in LAYOUTS if layout != (2, 2, 2)]


# hand-made traces: two ranks, 100 bytes a second, and instructions that are named after what they take


def play(
    *programs: Program,
    ranks: int = 2,
    lag: dict[str, float] | None = None,
    latency_s: float = 0.0,
    rule: Rule = OURS,
    at_once: int = 0,
) -> Timeline:
    """Instruction "a 3" computes for 3 s, "b 200" sends 200 bytes; `lag`: by instruction name, until it can leave."""

    def seconds(rank: int, instruction: Instruction) -> float:
        return (
            float(instruction.name.split()[1]) if instruction.kind is C else (lag or {}).get(f"{instruction.name} on {rank}", 0.0)
        )

    lists = programs if len(programs) > 1 else programs * ranks
    return simulate(
        lists,
        ranks_of=lambda axis, rank: tuple(range(ranks)) if axis != "tp" else (rank,),
        seconds=seconds,
        network=replace(one_level(100.0, latency_s), at_once=at_once),
        sizes=NAMED,
        rule=rule,
    )


def link_bytes(sizes: Sizes, instruction: Instruction) -> float:
    """What four ranks put on each of their links."""
    what, num_bytes, _ = sizes.sent(instruction, (0, 1, 2, 3))
    (load,) = Loads(one_level(1.0, 0.0), 4).of(instruction.axis, what, (0, 1, 2, 3))
    out_bytes, in_bytes = load.bytes_on(16)[8:].reshape(2, 4) * num_bytes
    assert set(out_bytes) == set(in_bytes) == {out_bytes[0]}
    return float(out_bytes[0])


def sent_s(timeline: Timeline, rank: int = 0) -> dict[str, tuple[float, float]]:
    """From when to when each was on the wire."""
    return {e.name: (e.start_s, e.end_s) for e in timeline.events(rank) if e.kind == "send"}


def test_a_collective_begins_with_the_last_rank_and_the_others_stand_still() -> None:
    common = (start("sum 100", Op.SUM), wait("sum 100", Op.SUM))
    timeline = play((compute("x 1"), *common), (compute("x 3"), *common))
    assert timeline.step_s == 4  # an all-reduce of 100 bytes over two ranks puts 100 on each link
    assert [e.exposed_s for rank in range(2) for e in timeline.events(rank) if e.kind == "wait"] == [3, 1]
    assert [sent_s(timeline, rank)["sum 100"] for rank in range(2)] == [(1, 4), (3, 4)]


def test_what_is_on_a_link_at_once_shares_it() -> None:
    both = (start("a 200"), start("b 100", axis="dp"), wait("a 200"), wait("b 100"))  # 100 and 50 bytes on each link
    assert sent_s(play(both)) == {"a 200": (0, 1.5), "b 100": (0, 1)}
    assert sent_s(play(both, latency_s=0.25)) == {"a 200": (0, 1.75), "b 100": (0, 1.25)}


def test_a_collective_is_as_fast_as_on_its_fullest_link() -> None:
    """Ranks 0 and 1 share a second collective; 2 and 3 have room, but must keep pace in the first."""
    one = (start("a 400", axis="world"), wait("a 400"))
    two = (start("b 200", axis="dp"), wait("b 200"))
    timeline = simulate(
        [one + two] * 2 + [one] * 2,
        ranks_of=lambda axis, rank: (0, 1, 2, 3) if axis == "world" else (0, 1),
        seconds=lambda rank, instruction: 0.0,
        network=one_level(100.0, 0.0),
        sizes=NAMED,
    )
    assert sent_s(timeline, 3) == {"a 400": (0, 3)}
    together = (start("a 400", axis="world"), start("b 200", axis="dp"), wait("a 400"), wait("b 200"))
    timeline = simulate(
        [together] * 2 + [one] * 2,
        ranks_of=lambda axis, rank: (0, 1, 2, 3) if axis == "world" else (0, 1),
        seconds=lambda rank, instruction: 0.0,
        network=one_level(100.0, 0.0),
        sizes=NAMED,
    )
    assert sent_s(timeline, 3) == {"a 400": (0, 4)}  # 300 bytes: 100 in 2 s, while b sends its 100, then 200 in 2 s


def test_alone_on_an_axis_nothing_is_sent() -> None:
    timeline = play((start("a 200", axis="tp"), compute("x 1"), wait("a 200")), latency_s=9)
    assert timeline.step_s == 1
    assert (sent_s(timeline), timeline.ledger) == ({}, {})


def test_gradients_wait_for_tokens_and_tokens_never_for_gradients() -> None:
    piece = {"op": Op.GRADS, "axis": "dp", "yields_to": (Op.TOKENS,)}
    first = (start("t 200"), start("g 100", **piece), wait("t 200"), wait("g 100"))
    assert sent_s(play(first)) == {"t 200": (0, 1), "g 100": (1, 2)}
    second = (start("g 100", **piece), start("t 200"), wait("t 200"), wait("g 100"))
    assert sent_s(play(second)) == {"t 200": (0, 2), "g 100": (0, 2)}  # what is under way is not called back


def test_a_credit_of_one_sends_one_after_another() -> None:
    chunks = tuple(start(f"{c} 200", credit=1) for c in "abc")
    assert sent_s(play(chunks + tuple(wait(f"{c} 200") for c in "abc"))) == {"a 200": (0, 1), "b 200": (1, 2), "c 200": (2, 3)}
    free = tuple(start(f"{c} 200") for c in "abc")
    assert set(sent_s(play(free + tuple(wait(f"{c} 200") for c in "abc"))).values()) == {(0, 3)}


def test_a_library_carries_so_many_of_an_axis_at_once() -> None:
    three, waits = tuple(start(f"{c} 200") for c in "abc"), tuple(wait(f"{c} 200") for c in "abc")
    assert sent_s(play(three + waits, at_once=2)) == {"a 200": (0, 2), "b 200": (0, 2), "c 200": (2, 3)}
    assert sent_s(play(three + waits, at_once=1)) == {"a 200": (0, 1), "b 200": (1, 2), "c 200": (2, 3)}
    other = start("d 200", Op.SUM, axis="dp")  # a lane of its own
    assert sent_s(play((*three[:1], other, *waits[:1], wait("d 200", Op.SUM, axis="dp")), at_once=1))["d 200"] == (0, 3)


def test_a_lane_keeps_its_order_where_the_first_is_not_ready() -> None:
    both = (start("a 200"), start("b 200"), compute("x 5"), wait("a 200"), wait("b 200"))
    assert sent_s(play(both, lag={"a 200 on 1": 2.0})) == {"a 200": (0, 4), "b 200": (0, 4)}
    assert sent_s(play(both, lag={"a 200 on 1": 2.0}), 1) == {"a 200": (2, 4), "b 200": (2, 4)}


def test_split_sizes_hold_the_tokens_and_not_the_program() -> None:
    program = (
        start("sizes 400", Op.COUNTS, axis="counts"),
        wait("sizes 400", Op.COUNTS, writes="#sizes"),
        start("t 200", reads="#sizes"),
        compute("x 1"),
        wait("t 200"),
    )
    timeline = play(program)
    assert sent_s(timeline) == {"sizes 400": (0, 2), "t 200": (2, 3)}
    assert [(e.start_s, e.end_s) for e in timeline.events(0) if e.kind == "compute"] == [(0, 1)]
    needs_them = (*program[:2], compute("x 1", reads="#sizes"))
    assert play(needs_them).step_s == 3


def test_a_reduce_scatter_sends_half_of_an_all_reduce() -> None:
    instruction = start("dense.0", Op.GRADS)
    assert link_bytes(Sizes(lambda s: 400.0), instruction) == 600
    assert link_bytes(Sizes(lambda s: 400.0, scattered=["dense.0"]), instruction) == 300


# deadlocks


def test_each_waiting_for_the_other_is_a_deadlock_that_names_both() -> None:
    """Lina's rule as written: rank 0 has begun a sum when tokens come, rank 1 has tokens when the sum comes."""
    program = (start("g 100", Op.GRADS, axis="dp"), start("t 100"), wait("t 100"), wait("g 100", Op.GRADS))
    lag = {"g 100 on 1": 0.1, "t 100 on 0": 0.1}
    assert play(program, lag=lag).step_s == pytest.approx(0.1 + 1.5, abs=0.2)
    with pytest.raises(Deadlock) as found:
        play(program, lag=lag, rule=LITERAL)
    assert str(found.value).splitlines() == [
        "no rank can go on at 0.1 s",
        "in a circle: rank 0 holds F:t 100>.-.0 back for F:g 100>.-.0",
        "  rank 0 has started F:g 100>.-.0 and waits for rank 1 to",
        "  rank 1 holds F:g 100>.-.0 back for F:t 100>.-.0",
        "  rank 1 has started F:t 100>.-.0 and waits for rank 0 to",
        "rank 0 stands at F:t 100<.-.0; lane gradients: F:g 100>.-.0 has left, rank 1 has not started it; "
        "lane ep: F:t 100>.-.0 is held back by F:g 100>.-.0",
        "rank 1 stands at F:t 100<.-.0; lane gradients: F:g 100>.-.0 is held back by F:t 100>.-.0; "
        "lane ep: F:t 100>.-.0 has left, rank 0 has not started it",
    ]


def test_lists_in_other_orders_deadlock_or_show_in_the_ledger() -> None:
    a, b = (start("a 100"), wait("a 100")), (start("b 100", axis="dp"), wait("b 100"))
    with pytest.raises(Deadlock, match="rank 1 stands at F:b 100<"):
        play(a + b, b + a)
    c = (start("c 100"), wait("c 100"))
    ledger = play(a + c, c + a).ledger  # one axis: sizes match, and what is summed is a mixture
    assert ledger == {("ep", (0, 1)): {0: ["F:a 100>.-.0", "F:c 100>.-.0"], 1: ["F:c 100>.-.0", "F:a 100>.-.0"]}}


def test_a_list_in_which_tokens_yield_too_is_refused_and_would_deadlock() -> None:
    shape = SHAPES["dense first, shared experts"]
    setting = Setting(shape, buckets_of(shape, piece=40), Plan(yields=True))
    program = training_step("priority", setting)
    wrong = tuple(replace(s, yields_to=(Op.GRADS,)) if s.op is Op.TOKENS and s.kind is START else s for s in program)
    with pytest.raises(ValueError, match="may not be held back"):
        check(wrong, given(wrong, setting), setting.buckets)
    assert deadlocks(program, OURS) == 0
    assert deadlocks(wrong, OURS) > 0


def test_what_yields_to_sums_that_share_its_lane_is_refused_and_would_deadlock() -> None:
    """Two lanes, in each a piece that yields to sums, and behind it a sum: each rank starts one lane and holds the other."""
    piece = {"op": Op.GRADS, "yields_to": (Op.SUM,)}
    starts = (
        start("g 100", axis="dp", **piece),
        start("a 100", Op.SUM, axis="dp"),
        start("h 100", axis="world", **piece),
        start("b 100", Op.SUM, axis="world"),
    )
    program = starts + tuple(replace(s, kind=WAIT, reads=s.writes, writes=(f"{s.name}.",), yields_to=()) for s in starts)
    with pytest.raises(Deadlock, match="lane world: F:h 100>.-.0 is held back by F:a 100>.-.0"):
        play(program, lag={"g 100 on 1": 0.1})
    with pytest.raises(ValueError, match="may not be held back: F:g 100>.-.0, F:h 100>.-.0"):
        check(program, (), {})
    check(tuple(replace(s, yields_to=()) for s in program), (), {})


def deadlocks(program: Program, rule: Rule, schedules: int = 40) -> int:
    """Of so many schedules on 2 x 2 ranks, how many have no end."""
    count = 0
    for seed in range(schedules):
        what = {"network": one_level(1e6, 1e-5), "sizes": Sizes(lambda instruction: 1000.0), "rule": rule}
        try:
            simulate([program] * 4, ranks_of=ranks_of((2, 2, 1)), seconds=delays(Random(seed)), **what)
        except Deadlock:
            count += 1
    return count


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["priority_partition", "lina", pytest.param("flow", marks=pytest.mark.full)])
def test_the_papers_literal_rule_deadlocks_under_some_delays_and_ours_under_none(name: str) -> None:
    shape = SHAPES["experts in every layer"]
    setting = Setting(
        shape,
        buckets_of(shape, piece=40),
        Plan(name, yields=True, parts=2 if name in WALKING else 1, chunks=(2,) if name == "lina" else (1,)),
    )
    program = training_step(name, setting)
    assert deadlocks(program, OURS) == 0
    assert deadlocks(program, LITERAL) >= 4


# every strategy: random delays, random legal orders


@pytest.fixture(scope="module")
def tried() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    yield counts
    print(f"\nschedules in virtual time: {counts.total()}, none deadlocked {dict(counts)}")


def explore(name: str, tried: Counter[str], *, times: float, schedules: int, layouts: list[tuple[int, int, int]]) -> None:
    @examples(times)
    @drawn(shape=st.sampled_from(list(SHAPES)), seed=st.integers(0, 2**32), shuffled=st.booleans())
    def explored(shape: str, seed: int, shuffled: bool) -> None:
        random = Random(seed)
        setting = setting_of(name, SHAPES[shape], random)
        program = training_step(name, setting)
        if shuffled:
            program = order_of(program, random)
            check(program, given(program, setting), setting.buckets)
        layout = random.choice([place for place in layouts if (place[2] > 1) == SHAPES[shape].tp])
        assert set(chain(*reduced(program, setting.buckets).values())) == {1}
        starts = {s.tag: s for s in program if s.kind is START}
        asked = [{t for t, s in starts.items() if len(ranks_of(layout)(s.axis, rank)) > 1} for rank in range(prod(layout))]
        for i in range(schedules):
            programs, what = (
                [program] * len(asked),
                {
                    "network": one_level(10 ** random.uniform(5, 9), random.choice((0.0, 1e-4))),
                    "sizes": Sizes(lambda s: 4.0 * max(10, s.piece[1] - s.piece[0])),
                    "ranks_of": ranks_of(layout),
                    "seconds": delays(random),
                },
            )
            timeline = simulate(programs, **what)
            ends_with_one_ledger(timeline, asked)
            yields_are_kept(timeline, starts, rank=random.randrange(len(asked)))
            if i == 0:
                bound = lower_bound(programs, **what)
                assert timeline.step_s >= bound["bound_s"] * (1 - 1e-9)
            tried[name] += 1

    explored()


def ends_with_one_ledger(timeline: Timeline, asked: list[set[str]]) -> None:
    """All ranks of a group started the same in the same order, and each rank what its list asks for, once."""
    for group in timeline.ledger.values():
        assert len({tuple(tags) for tags in group.values()}) == 1
    for rank, tags in enumerate(asked):
        assert sorted(chain(*(group.get(rank, ()) for group in timeline.ledger.values()))) == sorted(tags)


def yields_are_kept(timeline: Timeline, starts: dict[str, Instruction], rank: int) -> None:
    """Nothing that yields starts while tokens are under way here, and no more than its credit is under way."""
    sends = [e for e in timeline.events(rank) if e.kind == "send"]
    for e in sends:
        instruction = starts[e.tag]
        if instruction.yields_to or instruction.credit:
            under_way = [o for o in sends if o.start_s < e.start_s < o.end_s]
            assert not [o.tag for o in under_way if starts[o.tag].op in instruction.yields_to]
            assert not instruction.credit or sum(o.axis == e.axis for o in under_way) < instruction.credit


@pytest.mark.sampled(3)
@every_strategy
def test_no_delays_and_no_legal_order_deadlock_and_ranks_agree(name: str, tried: Counter[str]) -> None:
    explore(name, tried, times=0.4, schedules=4, layouts=SMALL)


@pytest.mark.full
@pytest.mark.parametrize("name", STRATEGIES)
def test_none_of_thousands_of_schedules_deadlocks(name: str, tried: Counter[str]) -> None:
    explore(name, tried, times=1.5, schedules=10, layouts=list(LAYOUTS))


def test_the_same_delays_give_the_same_timeline() -> None:
    shape = SHAPES["tensor parallel, shared experts"]
    program = training_step("flow", Setting(shape, buckets_of(shape, piece=40), Plan(yields=True, parts=2)))
    what = {"network": one_level(1e6, 1e-5), "sizes": Sizes(lambda instruction: 1000.0), "ranks_of": ranks_of((2, 2, 2))}
    first, second = (simulate([program] * 8, seconds=delays(Random(3)), **what) for _ in range(2))
    assert first.step_s == second.step_s
    assert [first.events(rank) for rank in range(8)] == [second.events(rank) for rank in range(8)]


# against something simpler


def fluid(program: Program, seconds: dict[Instruction, float], bytes_of: dict[Instruction, float], rate: float) -> float:
    """Step time of ranks that are all alike, with one link and nothing held back but for sizes, by short steps from change to
    change: no heap, no ranks, no groups."""
    now_s = busy_s = 0.0
    at, on_wire, queued, arrived = 0, dict[Instruction, float](), list[Instruction](), set[str]()
    sizes: dict[str, str] = {}
    while True:
        for instruction in queued.copy():
            behind = any(s.axis == instruction.axis for s in queued[: queued.index(instruction)])
            if not behind and all(sizes.get(v, v) in arrived for v in instruction.reads if v in sizes):
                queued.remove(instruction)
                on_wire[instruction] = bytes_of[instruction]
        if busy_s <= now_s:
            if at == len(program):
                return now_s
            instruction = program[at]
            awaited = [sizes.get(v, v) for v in instruction.reads if v in sizes or (instruction.kind is WAIT and ">" in v)]
            if instruction.kind is WAIT and instruction.op is Op.COUNTS:
                sizes[instruction.writes[0]] = instruction.reads[0]
                at += 1
                continue
            if instruction.kind is START:
                queued.append(instruction)
                at += 1
                continue
            if all(v in arrived for v in awaited):
                busy_s, at = now_s + seconds.get(instruction, 0.0), at + 1
                continue
        speed = rate / max(len(on_wire), 1)
        next_s = min([now_s + left / speed for left in on_wire.values()] + ([busy_s] if busy_s > now_s else []))
        for instruction in list(on_wire):
            on_wire[instruction] -= (next_s - now_s) * speed
            if on_wire[instruction] <= 1e-9 * bytes_of[instruction]:
                del on_wire[instruction]
                arrived.add(instruction.writes[0])
        now_s = next_s


@every_strategy
def test_ranks_that_are_alike_take_as_long_as_one_with_one_link(name: str) -> None:
    for seed in range(10):
        random = Random(seed)
        shape = SHAPES["dense first, shared experts"]
        setting = setting_of(name, shape, random)
        setting = replace(setting, plan=replace(setting.plan, parts=1, yields=False, chunks=(1,)))
        program = tuple(replace(s, yields_to=(), credit=0) for s in training_step(name, setting))
        took_s = {s: random.choice(DELAYS_S) for s in program if s.kind is C}
        size = {s: random.choice((1.0, 100.0, 3000.0)) for s in program if s.kind is START}
        sizes = Sizes(size.__getitem__, scattered=[b for b, spec in setting.buckets.items() if spec.sharded])
        found = simulate(
            [program] * 4,
            ranks_of=lambda axis, rank: (0, 1, 2, 3),
            seconds=lambda rank, s, took_s=took_s: took_s.get(s, 0.0),
            network=one_level(1e5, 0.0),
            sizes=sizes,
        )
        bytes_of = {s: link_bytes(sizes, s) for s in size}
        assert found.step_s == pytest.approx(fluid(program, took_s, bytes_of, 1e5), rel=1e-9)
