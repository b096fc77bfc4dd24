"""Directions of whole matrices in the list: at the end or under tokens, never before their gradients; what `check` refuses."""

from dataclasses import replace

import pytest

from megalina.blocks.model import plain_shape
from megalina.layout import axis_of_group
from megalina.step.forward import plain
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Instruction, Kind, Matrices, Op, Program, check
from megalina.step.strategy import STRATEGIES, Setting, given, training_step

MATRICES = (Matrices(0, 2, 4, 4), Matrices(32, 1, 4, 4, cut=0))
SHARES = ((0, 16), (16, 32), (32, 32), (32, 64))


def setting_of(*, tp: bool, sharded: bool, after: int, logits: bool = False) -> Setting:
    shape = replace(plain_shape((False, True, True), tp=tp), head_logits=logits)
    names = dict.fromkeys(u for s in plain(shape) for u in s.uses)

    def spec(name: str) -> BucketSpec:
        if not name.startswith(("dense", "experts")):
            return BucketSpec(64, axis_of_group(name), sharded)
        matrices = MATRICES if tp and name.startswith("dense") else (Matrices(0, 3, 4, 4),)
        return BucketSpec(64, axis_of_group(name), sharded, 24, matrices, SHARES if sharded else ())

    return Setting(shape, {name: spec(name) for name in names}, Plan(newton_schulz_after=after), micro_batches=2)


def place(program: Program, phase: str, name: str, kind: Kind = Kind.COMPUTE) -> int:
    return next(i for i, s in enumerate(program) if (s.phase, s.name, s.kind) == (phase, name, kind))


@pytest.mark.sampled(45)
@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("after", [0, 1, 3, 100])
@pytest.mark.parametrize("tp", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_makes_directions_of_summed_gradients(name: str, tp: bool, after: int, logits: bool) -> None:
    setting = setting_of(tp=tp, sharded=name == "lina_zero", after=after, logits=logits)
    program = training_step(
        name, replace(setting, plan=replace(setting.plan, strategy=name, merge_bytes=4 * 100 * (name == "ddp")))
    )
    verdict = place(program, "U", "verdict")
    for bucket, spec in setting.buckets.items():
        if not spec.matrices:
            continue
        made = place(program, "U", f"newton_schulz {bucket}")
        summed = max(i for i, s in enumerate(program) if s.op is Op.GRADS and s.kind is Kind.WAIT and bucket in s.buckets)
        assert summed < made < place(program, "U", f"update {bucket}")
        assert (made > verdict) == (after == 0)
        if spec.is_gathered:
            sent, whole = (place(program, "U", f"momentum {bucket}", kind) for kind in (Kind.START, Kind.WAIT))
            assert summed < sent < whole < made
    if logits:
        forward = max(i for i, s in enumerate(program) if any(v.startswith("#logit.") for v in s.writes))
        assert forward < place(program, "U", "head_logits", Kind.START) < place(program, "U", "head_logits", Kind.WAIT) < verdict
        assert "#logits.-.0" in program[verdict].reads


def test_directions_lie_under_the_all_to_all_that_was_asked_for() -> None:
    for after in (1, 2, 3):
        program = training_step("eager", setting_of(tp=False, sharded=False, after=after))
        starts = [i for i, s in enumerate(program) if s.kind is Kind.START and s.carries_tokens]
        sent = max(i for i, s in enumerate(program) if s.op is Op.GRADS and s.kind is Kind.START and s.name == "experts.2")
        made = place(program, "U", "newton_schulz experts.2")
        assert sum(sent < i < made for i in starts) == after
        before = [i for i in starts if i < made][-1]
        assert all(s.name == "experts.2" for s in program[before + 1 : made])  # its gradients are awaited, and nothing else
        # those for which no all-to-all is left: while the next ones' gradients are on the wire
        last = place(program, "U", "newton_schulz dense.0")
        assert program[last - 1].op is Op.GRADS and program[last - 1].name == "dense.0"


def refused(program: Program, setting: Setting, buckets: dict[str, BucketSpec] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        check(program, given(program, setting), buckets or setting.buckets)
    return str(caught.value)


def changed(program: Program, name: str, **to: object) -> Program:
    def of(s: Instruction) -> Instruction:
        return replace(s, **to) if s.name == name and s.kind is Kind.COMPUTE else s  # type: ignore[arg-type]

    return tuple(map(of, program))


def test_lists_without_directions_or_of_unsummed_gradients_are_refused() -> None:
    setting = setting_of(tp=True, sharded=False, after=0)
    program = training_step("eager", setting)
    name = "newton_schulz dense.1"
    made = program[place(program, "U", name)]
    without_gather = tuple(v for v in made.reads if not v.startswith("#whole"))
    assert "nothing makes the directions of dense.1's matrices" in refused(changed(program, name, reads=without_gather), setting)
    unsummed = changed(program, name, reads=tuple(v for v in made.reads if not v.endswith("'sum")))
    assert "nothing makes the directions" in refused(unsummed, setting)
    late = changed(program, "update dense.1", reads=("dense.1'sum", "#verdict.-.0"))
    assert "update of dense.1 does not wait for the directions" in refused(late, setting)
    gone = tuple(s for s in program if s.name != name)
    assert "which nobody writes" in refused(gone, setting)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (((0, 24), (24, 32), (32, 32), (32, 64)), "ends at 24, inside of a matrix of 4 x 4 elements"),
        (((0, 16), (32, 32), (32, 32), (32, 64)), "don't tile it"),
        (((0, 16), (16, 32), (32, 48), (48, 48)), "don't tile it"),
        (((0, 32), (32, 16), (16, 32), (32, 64)), "don't tile it"),
    ],
)
def test_shards_that_cut_a_matrix_or_leave_something_out_are_refused(shares: tuple[tuple[int, int], ...], message: str) -> None:
    setting = setting_of(tp=False, sharded=True, after=0)
    program = training_step("eager", setting)
    buckets = {name: replace(spec, shares=shares) if spec.shares else spec for name, spec in setting.buckets.items()}
    assert message in refused(program, setting, buckets)


def test_matrices_inside_of_a_range() -> None:
    four = Matrices(16, 4, 2, 8)
    assert four.inside(0, 100) == four and four.inside(16, 80) == four
    assert four.inside(32, 64) == replace(four, start=32, count=2)
    assert four.inside(0, 16) is None and four.inside(80, 90) is None
