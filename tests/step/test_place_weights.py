"""Deferred weight gradients: where Lancet's rule puts them, whatever they take, and what it never does."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from megalina.blocks.model import plain_shape
from megalina.step.forward import Shape, plain
from megalina.step.passes import chunk, defer_weights, step
from megalina.step.place_weights import place_weights
from megalina.step.plan import Plan
from megalina.step.program import MOVABLE, BucketSpec, Instruction, Kind, Op, Program, check, parts_of
from megalina.step.strategy import Setting, given, training_step

SHAPES = {
    "moe": plain_shape([True, True, True]),
    "tp": plain_shape([False, True, True], tp=True, shared_experts=True),
    "dense": plain_shape([False, False]),
}


def deferred(shape: Shape, micro_batches: int = 1, mode: str = "all") -> Program:
    return step(defer_weights(plain(shape), shape.deferred(mode)), micro_batches)


def covered(program: Program) -> dict[str, list[str]]:
    """Tags of weight gradients by the exchange of tokens between whose START and WAIT they stand; "": the others."""
    out: dict[str, list[str]] = {"": []}
    last = ""
    for instruction in program:
        if instruction.kind is Kind.START and instruction.op is Op.TOKENS:
            last = instruction.tag
            out[last] = []
        elif instruction.kind is Kind.WAIT and instruction.op is Op.TOKENS:
            last = ""
        elif instruction.phase == "W":
            out[last].append(instruction.tag)
    return out


def taking(times: dict[str, float], otherwise: float = 0.0):
    return lambda instruction: times.get(instruction.tag, otherwise)


def test_every_product_with_weights_can_leave_its_gradients_behind() -> None:
    names = {s.name for s in deferred(SHAPES["tp"]) if s.phase == "W"}
    assert names == {"attention_heads", "mlp_hidden", "score", "shared", "experts", "logits"}
    assert {s.name for s in deferred(SHAPES["moe"]) if s.phase == "W"} == {"attention", "route", "experts", "loss"}
    assert {s.name for s in deferred(SHAPES["moe"], mode="experts") if s.phase == "W"} == {"experts"}
    assert not [s for s in deferred(SHAPES["moe"], mode="none") if s.phase == "W"]


def test_the_best_fit_comes_first_and_what_is_far_too_long_not_at_all() -> None:
    program = deferred(SHAPES["moe"])
    long, short = "W:loss.-.0", "W:experts.2.0"
    # combine of layer 2 waits for 1 s: the head's takes 0.9 of it, and nothing else is there
    found = covered(place_weights(program, taking({"B:combine>.2.0": 1.0, "B:dispatch>.2.0": 1.0, long: 0.9, short: 1.0})))
    assert found["B:combine>.2.0"] == [long] and found["B:dispatch>.2.0"] == [short]
    # what is placed first may be too long; afterwards what takes more than twice the rest is left
    found = covered(place_weights(program, taking({"B:combine>.2.0": 0.1, "B:dispatch>.2.0": 1.0, long: 5.0, short: 0.9})))
    assert found["B:combine>.2.0"] == [long] and found["B:dispatch>.2.0"] == [short]
    times = {"B:dispatch>.2.0": 1.0, long: 0.5, short: 0.9}
    assert covered(place_weights(program, taking(times)))["B:dispatch>.2.0"] == [short]  # 0.1 s left, and 0.5 is too long


def test_what_is_computed_anyway_covers_first() -> None:
    """With parts in turn, one's compute is under the other's tokens."""
    forward = defer_weights(plain(SHAPES["moe"]), {"experts"})
    program = step(forward, 2, together=2)
    starts = [s.tag for s in program if s.kind is Kind.START and s.op is Op.TOKENS and s.phase == "B"]
    times = dict.fromkeys(starts, 1.0) | {s.tag: 0.5 for s in program if s.phase == "W"}
    busy = {s.tag: 2.0 for s in program if s.phase == "B" and s.kind is Kind.COMPUTE}
    last = starts[-1]
    found = covered(place_weights(program, taking(times | busy)))
    assert all(not tags for start, tags in found.items() if start != last and start != starts[-2])


def test_without_times_each_goes_under_the_next_exchange() -> None:
    found = covered(training_step("lancet", setting_of(SHAPES["moe"], Plan("lancet", deferred_weights="all"))))
    assert found["B:combine>.2.0"] == ["W:loss.-.0"] and found["B:dispatch>.2.0"] == ["W:experts.2.0"]
    assert set(found["B:combine>.1.0"]) == {"W:route.2.0", "W:attention.2.0"}


def test_a_model_without_exchanges_computes_them_at_once() -> None:
    program = place_weights(deferred(SHAPES["dense"]), taking({}, 1.0))
    late = [i for i, s in enumerate(program) if s.phase == "B" and s.late]
    assert len(late) == 5 and all(program[i + 1].phase == "W" for i in late)


def test_no_more_than_one_micro_batchs_wait() -> None:
    """Those of one are placed by the end of the next one's forward pass, however many there are."""
    for number in (2, 3, 8):
        program = place_weights(deferred(SHAPES["moe"], number), taking({}))  # exchanges take no time: nothing is covered
        most, waiting = 0, 0
        for instruction in program:
            waiting += (instruction.phase == "B" and instruction.late) - (instruction.phase == "W")
            most = max(most, waiting)
        assert most == 10, number  # attention, router and experts of three layers, the head


def test_a_cap_on_bytes_places_the_oldest() -> None:
    program = deferred(SHAPES["moe"])
    never = taking({})  # exchanges take no time: nothing is covered
    most, waiting = 0, 0
    for instruction in place_weights(program, never, kept_bytes=lambda s: 10, most_bytes=20):
        waiting += (instruction.phase == "B" and instruction.late) - (instruction.phase == "W")
        most = max(most, waiting)
    assert most == 3  # two are kept back, and one that has just come
    assert max_waiting(place_weights(program, never)) > 3


def joined(shape: Shape, parts: int, *, chunks: int = 1) -> Program:
    """Parts that walk together, with one instruction for the gradients of the same weights."""
    forward = chunk(plain(shape), dict.fromkeys(shape.moe_layers, chunks))
    return step(defer_weights(forward, shape.deferred("all")), 2 * parts, together=parts, join_weights=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_parts_and_chunks_are_joined_group_by_group(shape: str) -> None:
    program = joined(SHAPES[shape], 2, chunks=3)
    found = [s for s in program if s.phase == "W"]
    late = [s for s in program if s.phase == "B" and s.late]
    assert len({(s.name, s.layer) for s in late}) * 2 == len(found)  # two groups of two parts
    assert sorted(v for s in found for v in s.reads) == sorted(v for s in late for v in s.writes if v.startswith("#late"))
    assert all(abs(s.share - 2) < 1e-12 and s.chunk == (0, 1) for s in found)
    assert {frozenset(int(p.partition("c")[0]) for p in parts_of(s)) for s in found} == {frozenset({0, 1}), frozenset({2, 3})}


def test_joined_weights_are_placed_once_all_their_mirrors_have_run() -> None:
    program = joined(SHAPES["moe"], 2)
    placed = place_weights(program, lambda s: 10.0 if s.op is Op.TOKENS else 1.0)
    assert sorted(s.tag for s in placed) == sorted(s.tag for s in program)
    written: set[str] = set()
    for instruction in placed:
        assert instruction.phase != "W" or written.issuperset(instruction.reads)
        written.update(instruction.writes)
    under = [s for s, after in zip(placed, placed[1:], strict=False) if s.kind is Kind.START and after.phase == "W"]
    assert len(under) > 6  # they are not all at the end


def test_a_cap_counts_what_waits_for_the_last_part() -> None:
    """One part's mirrors keep back as much before the other part's have run."""
    program, most = joined(SHAPES["moe"], 2), []
    for limit in (float("inf"), 20):
        left, numbers = set[str](), []
        for instruction in place_weights(program, taking({}), kept_bytes=lambda s: 10, most_bytes=limit):
            left |= {v for v in instruction.writes if v.startswith("#late")}
            left -= set(instruction.reads)
            numbers.append(len(left))
        most.append(max(numbers))
    assert most[1] == 3 < most[0]  # two are kept back, and one that has just come


@pytest.mark.parametrize("wrong", ["lost", "part lost", "part twice", "another share", "another layer's"])
def test_the_check_sees_what_is_not_joined_right(wrong: str) -> None:
    setting = setting_of(SHAPES["moe"], Plan("flow", parts=2, deferred_weights="all", join_weights=True), 2)
    program = training_step("flow", setting)
    weight = next(s for s in program if s.phase == "W" and s.layer == 1)
    changed = {
        "lost": (),
        "part lost": (replace(weight, part=weight.part[0], reads=weight.reads[:1]),),
        "part twice": (weight, replace(weight, part=weight.part[0], reads=weight.reads[:1], share=1.0)),
        "another share": (replace(weight, share=1.0),),
        "another layer's": (replace(weight, layer=2),),
    }[wrong]
    broken = tuple(t for s in program for t in (changed if s == weight else (s,)))
    with pytest.raises(
        ValueError, match="isn't what backward leaves out|no instruction computes|before it is written|written by|occurs twice"
    ):
        check(broken, given(broken, setting), setting.buckets)


def max_waiting(program: Program) -> int:
    waiting = most = 0
    for instruction in program:
        waiting += (instruction.phase == "B" and instruction.late) - (instruction.phase == "W")
        most = max(most, waiting)
    return most


@drawn(st.lists(st.floats(0, 3), min_size=4, max_size=4), st.integers(1, 3))
def test_contributions_to_one_weight_keep_their_order(times_s: list[float], micro_batches: int) -> None:
    by_name = dict(zip(("experts", "attention", "route", "loss"), times_s, strict=True))

    def seconds(instruction: Instruction) -> float:
        return 1.0 if instruction.op is Op.TOKENS else by_name.get(instruction.name, 0.0)

    program = deferred(SHAPES["moe"], micro_batches)
    placed = place_weights(program, seconds)
    assert sorted(s.tag for s in placed) == sorted(s.tag for s in program)
    for name, layer in product(by_name, (-1, 0, 1, 2)):
        parts = [s.part for s in placed if s.phase == "W" and (s.name, s.layer) == (name, layer)]
        assert parts == sorted(parts)


@drawn(st.lists(st.integers(1, 9), min_size=9, max_size=9), st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_greedy_covers_at_least_half_of_what_the_best_assignment_does(weights: list[int], exchanges: list[int]) -> None:
    """Algorithm 1 against all assignments (equation 1)."""
    program = deferred(plain_shape([True, True]))
    base = [s for s in program if s.phase != "W"]
    starts = [s for s in base if s.kind is Kind.START and s.op is Op.TOKENS and s.phase == "B"]
    late = [s for s in base if s.phase == "B" and s.late]
    times = {s.tag: float(t) for s, t in zip(starts, exchanges, strict=True)}
    times |= {s.tag.replace("B:", "W:"): float(t) for s, t in zip(late, weights, strict=False)}
    found = covered(place_weights(program, taking(times)))
    got = sum(min(times[start], sum(times[w] for w in ws)) for start, ws in found.items() if start in times)
    places = [[i for i, a in enumerate(starts) if base.index(a) > base.index(w)] or [-1] for w in late]
    best = 0.0
    for choice in product(*places):
        sums = [0.0] * len(starts)
        for w, i in zip(late, choice, strict=True):
            if i >= 0:
                sums[i] += times[w.tag.replace("B:", "W:")]
        best = max(best, sum(min(times[a.tag], s) for a, s in zip(starts, sums, strict=True)))
    assert best / 2 <= got <= best


def setting_of(shape: Shape, plan: Plan, micro_batches: int = 1) -> Setting:
    groups = dict.fromkeys(u for s in plain(shape) for u in s.uses)
    return Setting(shape, {g: BucketSpec(16, "copies" if g.startswith("experts") else "dp") for g in groups}, plan, micro_batches)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_list_is_checked_and_reductions_follow_their_weights(shape: str) -> None:
    for micro_batches in (1, 3):
        program = training_step("lancet", setting_of(SHAPES[shape], Plan("lancet", deferred_weights="all"), micro_batches))
        for i, instruction in enumerate(program):
            if instruction.op is Op.GRADS and instruction.kind is Kind.START:
                later = [s for s in program[i:] if instruction.name in s.uses and s.phase in "BW"]
                assert not later


@pytest.mark.parametrize("deferred", ["none", "experts", "all"])
def test_late_layers_weights_come_after_backward_whatever_else_is_deferred(deferred: str) -> None:
    plan = Plan("flow", parts=2, late_layers=2, deferred_weights=deferred, join_weights=True)
    program = training_step("flow", setting_of(SHAPES["moe"], plan, 2))
    end = max(i for i, s in enumerate(program) if s.phase == "B" and s.op not in MOVABLE)
    last = [s.layer for s in program[end:] if s.phase == "W" and s.name == "experts"]
    assert sorted(last) == [0, 1]
    before = {s.name for s in program[:end] if s.phase == "W"}
    assert before == {"none": set(), "experts": {"experts"}, "all": {"attention", "experts", "loss", "route"}}[deferred]
