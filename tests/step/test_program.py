"""The checker refuses what is wrong and accepts what is right; the builder's lists hold what they should."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megalina.blocks.model import plain_shape
from megalina.step.forward import Shape, plain
from megalina.step.passes import cuts, losses_of
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Instruction, Kind, Op, Program, check, reads_of, writes_of
from megalina.step.strategy import STRATEGIES, Setting, evaluation, given, scoring, training_step

SHAPES = {
    "one device": plain_shape(moe=(True, True)),
    "dense first, shared experts": plain_shape(moe=(False, True), shared_experts=True),
    "tensor parallel": plain_shape(moe=(False, True), tp=True, shared_experts=True),
    "tensor parallel, copied activations": plain_shape(moe=(True, False), tp=True, sequence=False, tied=False),
    "global balance": plain_shape(moe=(True, True), global_balance=True),
    "equal counts": plain_shape(moe=(True, False, True), experts_choose=True),
    "all experts": plain_shape(moe=(False, True, True), all_experts=True, shared_experts=True),
    "all experts, tensor parallel": plain_shape(moe=(True, True), all_experts=True, tp=True, sequence=False),
    "selection biases": plain_shape(moe=(True, True), router_state=True),
    "multi-token prediction": plain_shape(moe=(True,), mtp_layers=2),
    "multi-token prediction, tensor parallel": plain_shape(moe=(True, False), mtp_layers=1, tp=True, global_balance=True),
}


def buckets_of(shape: Shape, *, sharded: bool = True, piece: int | None = 40) -> dict[str, BucketSpec]:
    names = dict.fromkeys(u for s in plain(shape) for u in s.uses)
    return {n: BucketSpec(64, "dp", sharded, piece) for n in names}


def example(name: str = "dense first, shared experts", micro_batches: int = 1) -> tuple[Program, set[str], dict[str, BucketSpec]]:
    shape = SHAPES[name]
    buckets = buckets_of(shape)
    program = training_step("eager", Setting(shape, buckets, micro_batches=micro_batches, recompute_mode="none"))
    return program, given(program, Setting(shape, buckets, micro_batches=micro_batches)), buckets


def refused(program: Program, have: set[str], buckets: dict[str, BucketSpec]) -> bool:
    try:
        check(program, have, buckets)
    except ValueError:
        return True
    return False


def legal_orders(program: Program, count: int) -> Iterator[Program]:
    """Other orders of the same instructions that respect every read."""
    writers: dict[str, set[int]] = {}
    for i, instruction in enumerate(program):
        for value in writes_of(instruction):
            writers.setdefault(value, set()).add(i)
    needs = [set().union(*(writers.get(v, set()) for v in reads_of(s))) for s in program]
    for seed in range(count):
        rng, done, left, out = random.Random(seed), set[int](), list(range(len(program))), []
        while left:
            i = rng.choice([i for i in left if needs[i] <= done])
            left.remove(i)
            done.add(i)
            out.append(program[i])
        yield tuple(out)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_shape_has_a_complete_program(name: str, micro_batches: int, recompute: str) -> None:
    shape = SHAPES[name]
    buckets = buckets_of(shape)
    program = training_step("eager", Setting(shape, buckets, micro_batches=micro_batches, recompute_mode=recompute))
    assert sum(s.name == "seed" for s in program) == micro_batches
    assert (recompute == "none") == (not any(s.recompute for s in program))
    evaluation(shape, buckets)
    (losses,) = (s for s in scoring(shape, buckets) if "#losses.-.0" in s.writes)
    assert losses.name == "sequence_losses" and not any(s.name == "loss" for s in scoring(shape, buckets))


def test_each_dropped_instruction_is_refused() -> None:
    program, have, buckets = example()
    assert not refused(program, have, buckets)
    assert [s.tag for i, s in enumerate(program) if not refused(program[:i] + program[i + 1 :], have, buckets)] == []


def test_each_doubled_instruction_is_refused() -> None:
    program, have, buckets = example()
    assert [s.tag for i, s in enumerate(program) if not refused(program[:i] + (s,) + program[i:], have, buckets)] == []


def test_neighbours_may_swap_exactly_if_neither_needs_the_other() -> None:
    program, have, buckets = example("tensor parallel")
    needed = 0
    for i, (first, second) in enumerate(zip(program, program[1:], strict=False)):
        swapped = program[:i] + (second, first) + program[i + 2 :]
        depends = bool(set(writes_of(first)) & set(reads_of(second)))
        assert refused(swapped, have, buckets) == depends, (first.tag, second.tag)
        needed += depends
    assert needed > len(program) // 3


def test_legal_orders_are_accepted() -> None:
    program, have, buckets = example("tensor parallel", micro_batches=2)
    for order in legal_orders(program, 20):
        assert order != program
        check(order, have, buckets)


def test_a_bucket_waits_for_the_last_use_of_a_tied_embedding() -> None:
    program, _, _ = example()
    uses = [i for i, s in enumerate(program) if s.phase == "B" and "embedding" in s.uses]
    start = next(i for i, s in enumerate(program) if s.op is Op.GRADS and s.name == "embedding")
    assert len(uses) == 2 and uses[-1] < start


def test_accumulation_reduces_each_bucket_once_after_the_last_micro_batch() -> None:
    program, _, buckets = example("one device", micro_batches=3)
    first_start = min(i for i, s in enumerate(program) if s.op is Op.GRADS)
    assert all(s.part == "2" for s in program[first_start:] if s.phase == "B" and s.kind is Kind.COMPUTE)
    starts = [s for s in program if s.op is Op.GRADS and s.kind is Kind.START]
    assert len(starts) == sum(len(cuts(b.numel, b.piece)) for b in buckets.values())


def test_exchanges_are_never_recomputed() -> None:
    shape = SHAPES["tensor parallel"]
    program = training_step("eager", Setting(shape, buckets_of(shape), recompute_mode="full"))
    assert not any(s.recompute for s in program if s.kind is not Kind.COMPUTE)
    plain_starts = [
        s.tag for s in training_step("eager", Setting(shape, buckets_of(shape), recompute_mode="none")) if s.kind is Kind.START
    ]
    assert [s.tag for s in program if s.kind is Kind.START] == plain_starts


def test_shared_experts_run_under_the_dispatch() -> None:
    tags = [s.tag for s in plain(SHAPES["dense first, shared experts"]) if s.layer == 1]
    assert tags.index("F:dispatch>.1.0") < tags.index("F:shared.1.0") < tags.index("F:dispatch<.1.0")


def test_every_loss_is_seeded() -> None:
    forward = plain(SHAPES["global balance"])
    assert losses_of(forward, forward) == ("z.0.0", "z.1.0", "global_aux.-.0", "loss.-.0")


def routed_in_parts(name: str, *, micro_batches: int, parts: int) -> tuple[Program, set[str], dict[str, BucketSpec]]:
    """Flow of micro-batches that are groups of their routers."""
    shape = replace(SHAPES[name], micro_batch_groups=True)
    setting = Setting(shape, buckets_of(shape), Plan(parts=parts), micro_batches=micro_batches, recompute_mode="full")
    program = training_step("flow", setting)
    return program, given(program, setting), setting.buckets


# whose routers decide where tokens go, from no more than a micro-batch
WITHOUT_STATISTICS_OF_ALL = [name for name in SHAPES if name != "global balance" and not name.startswith("all experts")]


@pytest.mark.parametrize("name", WITHOUT_STATISTICS_OF_ALL)
@pytest.mark.parametrize(("micro_batches", "parts"), [(1, 2), (1, 3), (3, 2)])
def test_parts_of_a_group_are_routed_one_after_another(name: str, micro_batches: int, parts: int) -> None:
    program, _, _ = routed_in_parts(name, micro_batches=micro_batches, parts=parts)
    for layer in (i for i, moe in enumerate(SHAPES[name].moe) if moe):
        routed = [s for s in program if s.phase == "F" and s.name in ("route", "select") and s.layer == layer]
        assert [s.part for s in routed] == [str(i) for i in range(micro_batches * parts)]
        for i, instruction in enumerate(routed):
            before = f"{layer}.{i - 1}" if i % parts else f"-.{i}"
            known = [v for v in (*instruction.reads, *instruction.writes) if v.startswith("#group")]
            assert known == [f"#group.{before}", f"#group.{layer}.{i}"]
            assert f"prob.{layer}.{i}" in instruction.writes and f"aux.{layer}.{i}" not in instruction.writes
    balances = [s for s in program if s.phase == "F" and s.name == "balance_of_group"]
    assert [s.part for s in balances] == [str(i) for i in range(parts - 1, micro_batches * parts, parts)]
    seeded = {v for s in program if s.name == "seed" for v in s.writes}
    assert {f"aux.-.{s.part}'" for s in balances} == {v for v in seeded if v.startswith("aux")}


@pytest.mark.parametrize("name", WITHOUT_STATISTICS_OF_ALL)
def test_a_part_is_not_routed_before_the_parts_before_it(name: str) -> None:
    program, have, buckets = routed_in_parts(name, micro_batches=1, parts=2)
    assert not refused(program, have, buckets)
    for i, j in itertools.combinations([i for i, s in enumerate(program) if s.phase == "F" and s.name in ("route", "select")], 2):
        swapped = list(program)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        assert refused(tuple(swapped), have, buckets)
    apart = [s for s in program if s.name not in ("sizes_of_group", "balance_of_group")]
    assert len(program) - len(apart) == 3 and refused(tuple(apart), have, buckets)


def test_whole_micro_batches_tell_one_another_nothing() -> None:
    program, _, _ = routed_in_parts("one device", micro_batches=4, parts=2)
    assert not any(v.startswith("#group") for s in program for v in (*s.reads, *s.writes))
    assert not any(s.name == "balance_of_group" for s in program)


def test_parts_of_a_model_without_experts_share_nothing() -> None:
    shape = plain_shape(moe=(False,), micro_batch_groups=True)
    program = training_step("flow", Setting(shape, buckets_of(shape), Plan(parts=2)))
    assert not any("group" in s.name for s in program)


def test_an_unknown_strategy_is_named() -> None:
    shape = SHAPES["one device"]
    with pytest.raises(ValueError, match="'lyna': choose one of eager, ddp"):
        training_step("lyna", Setting(shape, buckets_of(shape)))


def test_a_start_that_nobody_awaits_is_named() -> None:
    program, have, buckets = example()
    lost = Instruction("F", Kind.START, "gossip", reads=("x.0.0",), writes=("x>.0.0",), op=Op.TOKENS, axis="ep")
    at = next(i for i, s in enumerate(program) if "x.0.0" in s.writes) + 1
    with pytest.raises(ValueError, match="nobody waits for F:gossip>"):
        check(program[:at] + (lost,) + program[at:], have, buckets)


def test_ddp_fills_a_bucket_of_each_axis_the_first_one_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dense groups of 64 fill a bucket, one the first; experts of another axis in between don't end it."""
    shape = plain_shape(moe=(True,) * 4)
    buckets = {
        name: BucketSpec(64, "copies" if name.startswith("experts") else "dp", piece=None)
        for name in dict.fromkeys(u for s in plain(shape) for u in s.uses)
    }
    monkeypatch.setattr("megalina.step.strategy.DDP_FIRST_BYTES", 4 * 64)
    program = training_step("ddp", Setting(shape, buckets, Plan(merge_bytes=4 * 128)))
    starts = [s for s in program if s.op is Op.GRADS and s.kind is Kind.START]
    sent = {axis: [s.name for s in starts if s.axis == axis] for axis in ("dp", "copies")}
    assert sent["copies"] == ["experts.3", "experts.2+experts.1", "experts.0"]
    assert sent["dp"][0].count("+") == 0 and all(name.count("+") == 1 for name in sent["dp"][1:-1])
    assert {b for names in sent.values() for name in names for b in name.split("+")} == set(buckets)


def test_one_exchange_of_counts_a_part_is_enough_where_all_layers_have_equal_ones() -> None:
    shape = plain_shape(moe=(False, True, True, True), experts_choose=True)
    buckets = buckets_of(shape)
    for name, setting in {
        "eager": Setting(shape, buckets, micro_batches=2),
        "lina": Setting(shape, buckets, Plan(chunks=(2, 4, 1)), micro_batches=2),
        "flow": Setting(shape, buckets, Plan(parts=2)),
    }.items():
        program = training_step(name, setting)  # which checks it
        counted = [s.layer for s in program if s.op is Op.COUNTS and s.kind is Kind.START]
        assert counted == [1] * setting.num_parts, name
        tokens = [s for s in program if s.op is Op.TOKENS and s.kind is Kind.START]
        assert {s.layer for s in tokens} == {1, 2, 3}
        assert all(sum(v.startswith("#sizes.1.") for v in s.reads) == 1 for s in tokens)


@pytest.mark.parametrize("name", STRATEGIES)
def test_selection_biases_follow_the_result_of_a_step(name: str) -> None:
    """One instruction more, right behind the verdict; without it, or before the loads are known, the list is refused."""
    shape = SHAPES["selection biases"]
    setting = Setting(shape, buckets_of(shape))
    program, plain_program = (training_step(name, replace(setting, shape=s)) for s in (shape, replace(shape, router_state=False)))
    at = next(i for i, s in enumerate(program) if s.name == "router_state")
    assert program[at].tag == "U:router_state.-.0" and program[at - 1].name == "verdict"
    without = program[:at] + program[at + 1 :]
    assert without == plain_program
    have = given(program, setting)
    with pytest.raises(ValueError, match="nobody reads router_state: part of the step's data, or of its parameters"):
        check(without, have, setting.buckets)
    with pytest.raises(ValueError, match="U:router_state.-.0 reads #verdict.-.0 before it is written by U:verdict.-.0"):
        check((*program[: at - 1], program[at], program[at - 1], *program[at + 1 :]), have, setting.buckets)
    assert not any(s.name == "router_state" for s in evaluation(shape, setting.buckets))


def test_where_all_experts_get_all_tokens_gathers_and_sums_along_ep_are_tokens() -> None:
    """Chunks cut tokens with their weights, parts take turns, and gradients yield to what is gathered and summed."""
    shape = SHAPES["all experts"]
    setting = Setting(shape, buckets_of(shape), Plan("lina", chunks=(2,), yields=True))
    program = training_step("lina", setting)
    tokens = [s for s in program if s.carries_tokens and s.kind is Kind.START]
    assert {s.op for s in tokens} == {Op.GATHER, Op.SCATTER} and {s.axis for s in tokens} == {"ep"}
    assert len(tokens) == 2 * 2 * 2 * 3  # layers, chunks, forward and backward; tokens, weights, sums
    assert all(s.traffic is Op.TOKENS and s.credit == 1 for s in tokens)
    assert any(s.yields_to == (Op.TOKENS,) for s in program)
    cut = next(s for s in program if s.name == "cut" and s.phase == "F")
    assert cut.reads == ("rows.1.0", "weight.1.0")
    assert cut.writes == ("rows.1.0c0", "rows.1.0c1", "weight.1.0c0", "weight.1.0c1")
    others = [s for s in plain(SHAPES["tensor parallel"]) if s.op is Op.GATHER]
    assert others and not any(s.carries_tokens for s in others)
    wrong = tuple(
        replace(s, axis="ep") if s.op is Op.GRADS else replace(s, axis="ep") if s.op is Op.PARAMS else s for s in program
    )
    with pytest.raises(ValueError, match="may not be held back"):  # tokens would stand behind what yields to them
        check(wrong, given(wrong, setting), {n: replace(b, axis="ep") for n, b in setting.buckets.items()})
