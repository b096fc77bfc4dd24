"""Pairs: backward of a micro-batch in turns with forward of the next one; which lists they give, and that no bit changes."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from megalina.batch import Batch
from megalina.blocks.model import plain_shape, step_shape
from megalina.compose import compose
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.sim.memory import peak_of
from megalina.plan_settings import plan_of
from megalina.step.forward import plain
from megalina.step.order import order_of
from megalina.step.passes import defer_weights, rename_part, step
from megalina.step.place_weights import place_weights
from megalina.step.plan import Plan
from megalina.step.program import MOVABLE, Instruction, Kind, Op, Program, backward, check
from megalina.step.strategy import Setting, given, training_step
from megalina.step.turns import paired, sends_tokens, side_with_side
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.validate import check_config
from tests.perfmodel.sim.schedules import SHAPES, buckets_of
from tests.perfmodel.sim.schedules import order_of as another_order

TWO_LAYERS = SHAPES["experts in every layer"]
HEAVY = ("attention", "experts", "dispatch", "combine")


def setting_of(micro_batches: int, **numbers: object) -> Setting:
    plan = Plan("pair", **numbers)  # type: ignore[arg-type]
    return Setting(TWO_LAYERS, buckets_of(TWO_LAYERS), plan, micro_batches=micro_batches)


def tags(program: Sequence[Instruction], *names: str) -> str:
    return " ".join(s.tag for s in program if s.name in (names or HEAVY) and s.phase in "FBW")


def test_layers_meet_from_both_ends_as_megatron_has_them() -> None:
    forward = plain(TWO_LAYERS)
    alone = tags(forward), tags(backward(rename_part(forward, "1")))
    found = tags(training_step("pair", setting_of(2)))
    assert found.startswith(alone[0]) and found.endswith(alone[1])
    assert found.removeprefix(alone[0]).removesuffix(alone[1]).strip() == (
        "B:combine>.1.0 F:attention.0.1 F:dispatch>.0.1 "
        "B:combine<.1.0 B:experts.1.0 B:dispatch>.1.0 F:dispatch<.0.1 F:experts.0.1 F:combine>.0.1 "
        "B:dispatch<.1.0 B:attention.1.0 B:combine>.0.0 F:combine<.0.1 F:attention.1.1 F:dispatch>.1.1 "
        "B:combine<.0.0 B:experts.0.0 B:dispatch>.0.0 F:dispatch<.1.1 F:experts.1.1 F:combine>.1.1 "
        "B:dispatch<.0.0 B:attention.0.0 F:combine<.1.1"
    )


def test_one_micro_batch_goes_with_nobody() -> None:
    for parts in (1, 2):
        plan = Plan("pair", parts=parts)
        assert training_step("pair", setting_of(1, parts=parts)) == training_step("flow", setting_of(1).under(plan))


def test_what_is_left_of_the_longer_side_comes_last() -> None:
    """Three layers forward with one layer backward, and the other way round."""
    three, one = (plain(plain_shape(moe=(True,) * n)) for n in (3, 1))
    woven = tags(side_with_side(backward(one), three))
    assert woven.startswith("B:combine>.0.0 F:attention.0.0 F:dispatch>.0.0 B:combine<.0.0")
    assert woven.endswith(tags([s for s in three if s.layer == 2]))
    woven = tags(side_with_side(backward(three), one))
    assert woven.startswith("B:combine>.2.0 F:attention.0.0") and woven.endswith(tags(backward(three))[-60:])
    assert sorted(woven.split()) == sorted((tags(backward(three)) + " " + tags(one)).split())


def test_turns_end_where_tokens_start_to_travel_and_there_alone() -> None:
    """Not at sums over tensor-parallel ranks, of which attention has some; but for the last turn of each backward pass."""
    shape = SHAPES["tensor parallel, copied activations"]
    program = training_step("pair", Setting(shape, buckets_of(shape), Plan("pair"), micro_batches=3))
    passes = [s for s in program if s.phase in "FB" and s.op not in MOVABLE]
    ends = [s for s, following in pairwise(passes) if s.part != following.part]
    assert sum(not sends_tokens(s) for s in ends) == 2 and sum(map(sends_tokens, ends)) == 2 * 2 * 2
    assert any(s.kind is Kind.START and s.axis == "tp" for s in passes)


numbers = st.fixed_dictionaries(
    {
        "parts": st.sampled_from([1, 1, 2, 3]),
        "chunks": st.sampled_from([(1,), (1,), (2,), (3,)]),
        "yields": st.booleans(),
        "late_layers": st.sampled_from([0, 0, 1]),
        "deferred_weights": st.sampled_from(["none", "experts", "all"]),
        "join_weights": st.booleans(),
        "gap_bytes": st.sampled_from([(), (("experts", 200), ("attention", 360))]),
    }
)


@drawn(
    kind=st.sampled_from(list(SHAPES)),
    numbers=numbers,
    micro_batches=st.integers(2, 4),
    recompute=st.sampled_from(["none", "selective", "full"]),
    sharded=st.booleans(),
    piece=st.sampled_from([None, 40]),
    grouped=st.booleans(),
)
def test_any_numbers_give_a_legal_list_with_every_sum_in_its_order(
    kind: str, numbers: dict, micro_batches: int, recompute: str, sharded: bool, piece: int | None, grouped: bool
) -> None:
    """`training_step` checks it; beside that each side keeps its order, and so do contributions to each weight."""
    shape = replace(SHAPES[kind], micro_batch_groups=grouped and "all ranks" not in kind)
    base = Setting(shape, buckets_of(shape, sharded=sharded, piece=piece), micro_batches=micro_batches, recompute_mode=recompute)
    setting = base.under(Plan("pair", **numbers))
    program = training_step("pair", setting)
    # the same instructions under flow, which walks the same parts
    apart = setting.under(replace(setting.plan, strategy="flow"))
    if apart.cut == setting.cut:
        other = training_step("flow", apart)
        assert sorted(s.tag for s in program) == sorted(s.tag for s in other)
        for phase in ("F", "B"):
            of_phase = [[s.tag for s in p if s.phase == phase and s.op not in MOVABLE] for p in (program, other)]
            assert of_phase[0] == of_phase[1]
        adding = [s for s in other if s.uses and s.phase in "BW"]
        for phase, name, layer in {(s.phase, s.name, s.layer) for s in adding}:
            parts = [[s.part for s in p if (s.phase, s.name, s.layer) == (phase, name, layer)] for p in (program, other)]
            assert parts[0] == parts[1], (phase, name, layer)
    sent = [i for i, s in enumerate(program) if s.op is Op.GRADS and s.kind is Kind.START]
    assert min(sent) > max(i for i, s in enumerate(program) if s.phase == "F")  # while one micro-batch is left


def test_a_pair_that_comes_too_early_is_refused() -> None:
    """Backward of a micro-batch with its own forward, or an instruction that runs ahead of its side."""
    setting = setting_of(1)
    program = training_step("pair", setting)
    own = [tuple(s for s in program if (s.phase == "F") == forward) for forward in (False, True)]
    with pytest.raises(ValueError, match="U:seed.-.0 reads .* before it is written by F:"):
        check(side_with_side(*own), given(program, setting), setting.buckets)
    setting = setting_of(3)
    program = training_step("pair", setting)
    early = next(i for i, s in enumerate(program) if s.tag == "B:combine>.1.1")
    moved = (*program[:2], program[early], *program[2:early], *program[early + 1 :])
    with pytest.raises(ValueError, match=r"B:combine>.1.1 reads .* before it is written by B:"):
        check(moved, given(program, setting), setting.buckets)


@pytest.mark.parametrize("seconds", [lambda s: 0.0, lambda s: float("inf") if s.carries_tokens else 0.0], ids=["covered", "not"])
def test_weights_gradients_wait_for_no_more_than_one_micro_batch(seconds) -> None:
    """Of three layers: attention, router and experts of each, and the head; whatever tokens leave uncovered."""
    shape = plain_shape([True, True, True])
    for number in (2, 3, 8):
        program = place_weights(paired(step(defer_weights(plain(shape), shape.deferred("all")), number)), seconds)
        waiting = most = 0
        for instruction in program:
            waiting += (instruction.phase == "B" and instruction.late) - (instruction.phase == "W")
            most = max(most, waiting)
        assert most <= 10 and waiting == 0


def test_weights_gradients_are_computed_under_the_tokens_of_both_sides() -> None:
    """Where no times are known: under the next tokens of its own side, while the other's are on the wire too."""
    program = training_step("pair", setting_of(3, deferred_weights="all"))
    on_wire: dict[str, str] = {}
    found = []
    for instruction in program:
        if sends_tokens(instruction):
            on_wire[instruction.writes[0]] = instruction.phase
        elif instruction.kind is Kind.WAIT and instruction.carries_tokens:
            del on_wire[instruction.reads[0]]
        elif instruction.phase == "W":
            found.append((instruction.part, "".join(sorted(on_wire.values()))))
    assert [under for part, under in found if part != "2"].count("BF") == 8
    assert {under for part, under in found if part == "2"} == {"B", ""}  # goes with nobody; the first layer's last


# numbers


def steps_of(strategy: str, *overrides: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Losses and norms of two steps of three micro-batches, and weights after them, to the last bit."""
    words = ("model=tiny", "model.num_layers=3", "model.dense_layers_first=1", f"strategy={strategy}", *overrides)
    config = compose([*words, "train.global_batch_size=6", "train.micro_batch_size=2"])
    trainable = Trainable(config, build_mesh(), vocab_size=512, device=torch.device("cpu"), wish_to_stop=lambda: False)
    tokens = torch.randint(512, (6, 17), generator=torch.Generator().manual_seed(1))
    every, places = torch.ones(6, 16).bool(), torch.arange(16).expand(6, 16)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], every, every, places, None, torch.arange(6))
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    results = [trainable.step(batch, optimizer.update, directions=optimizer) for _ in range(2)]
    return [(r.loss, r.grad_norm) for r in results], {n: p.detach().clone() for n, p in trainable.gpt.named_parameters()}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.tie_embeddings=false", "strategy.deferred_weights=all", "strategy.late_layers=1", "train.recompute=full"),
        pytest.param(("strategy.chunks=2", "model.mtp_layers=1", "router=sigmoid"), marks=pytest.mark.full),
        pytest.param(("optim=muon", "strategy.newton_schulz_after=2", "router.group=micro_batch"), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_every_bit_is_that_of_eager(overrides: tuple[str, ...]) -> None:
    same = tuple(o for o in overrides if not o.startswith(("strategy.deferred", "strategy.late", "strategy.newton")))
    results, weights = steps_of("pair", *overrides)
    eager_results, eager_weights = steps_of("eager", *same)
    assert results == eager_results and results[0] != results[1]
    assert [name for name, weight in weights.items() if not torch.equal(weight, eager_weights[name])] == []


# memory


def above_state(strategy: str, layers: int, micro_batches: int, *overrides: str) -> int:
    """Bytes at the peak, beside what is there throughout."""
    shape = ("model=tiny", f"model.num_layers={layers}", "model.d_model=256", "train.seq_len=256")
    batch = (f"train.global_batch_size={2 * micro_batches}", "train.micro_batch_size=2")
    config = compose([*shape, *batch, f"strategy={strategy}", *overrides])
    held = InstructionBytes(config, 1, vocab_size=512)
    setting = Setting(step_shape(config), held.buckets, micro_batches=micro_batches, kept_bytes=held.kept_back)
    program = training_step(strategy, setting.under(plan_of(config.strategy)))
    return peak_of(held, program)[0] - sum(held.state.values())


def test_a_pair_holds_a_layer_more_and_not_a_micro_batch() -> None:
    """Backward lets go of a layer where forward takes one.  Two micro-batches that walk at once hold all of both."""
    more = {}
    for layers in (4, 8):
        eager, pair, flow = (above_state(name, layers, 4) for name in ("eager", "pair", "flow"))
        assert pair < 1.5 * eager and flow > 1.8 * eager
        more[layers] = pair - eager
    assert more[8] == pytest.approx(more[4], rel=0.05)


@pytest.mark.parametrize("deferred", ["none", "all"])
def test_three_rounds_hold_as_much_as_many(deferred: str) -> None:
    few, many = (above_state("pair", 4, m, f"strategy.deferred_weights={deferred}") for m in (3, 7))
    assert few == many


# what is refused


def refusal(*overrides: str) -> str:
    config = compose(["model=tiny", "strategy=pair", *overrides])
    with pytest.raises(ValueError) as error:
        check_config(config, 1)
    return str(error.value)


def test_one_micro_batch_is_refused_with_what_to_change() -> None:
    said = refusal("train.global_batch_size=4", "train.micro_batch_size=4")
    assert said.startswith("strategy=pair lets backward of a micro-batch go with forward of the next one, and a step has one")
    assert "raise train.global_batch_size (4) to 8, lower train.micro_batch_size (4), or take strategy=flow" in said
    check_config(compose(["model=tiny", "strategy=pair", "train.global_batch_size=4", "train.micro_batch_size=2"]), 1)


def test_parts_cut_each_micro_batch_however_many_there_are() -> None:
    assert setting_of(4, parts=2).num_parts == 8 and setting_of(4).under(Plan("flow", parts=2)).num_parts == 4
    said = refusal("strategy.parts=2", "train.global_batch_size=4", "train.micro_batch_size=1")
    assert said == (
        "strategy.parts (2) must divide train.micro_batch_size (1): parts are whole sequences; raise train.micro_batch_size, "
        "or leave strategy.parts at 1"
    )
    said = refusal(
        *("strategy.parts=2", "train.global_batch_size=4", "train.micro_batch_size=2", "router=expert_choice"),
        "router.group=micro_batch",
    )
    assert "route a whole micro-batch at once, so it can't be cut into strategy.parts=2" in said


def test_an_order_of_a_pairs_list_goes_through_a_plan() -> None:
    """As of any strategy: what a search has found is a list of pair's instructions."""
    setting = setting_of(3, deferred_weights="all")
    program: Program = another_order(training_step("pair", setting), Random(1))
    plan = replace(setting.plan, order=order_of(program))
    assert training_step("pair", setting.under(Plan.from_json(plan.as_json()))) == program
