"""The list of an inference step: complete, in order, for any layers; what may be hidden is."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.blocks.model import plain_shape
from megalina.step.inference import given_of, inference_step
from megalina.step.program import Kind, Op, Program, check


@given(moe=st.lists(st.booleans(), min_size=1, max_size=6), shared=st.booleans(), learns=st.booleans(), chunks=st.integers(1, 4))
def test_every_model_has_a_complete_list(moe: list[bool], shared: bool, learns: bool, chunks: int) -> None:
    shape = plain_shape(moe=tuple(moe), shared_experts=shared)
    program = inference_step(shape, learns=learns, chunks=chunks)
    check(program, given_of(shape), {})
    tags = [s.tag for s in program]
    layers = [i for i, is_moe in enumerate(moe) if is_moe]
    assert [s.layer for s in program if s.name == "foresee"] == layers  # each MoE layer is planned, once, in order
    for before, after in zip(layers, layers[1:], strict=False):
        plan = tags.index(f"F:foresee.{after}.0")
        assert tags.index(f"F:dispatch>.{before}.0") < plan < tags.index(f"F:dispatch<.{before}.0")  # rows are on the wire
    for layer in layers:  # no rank decides before it has heard all others
        assert tags.index(f"F:told<.{layer}.0") < tags.index(f"F:assign.{layer}.0") < tags.index(f"F:dispatch>.{layer}.0")
    assert any(s.name == "learn" for s in program) == (learns and bool(layers))
    assert tags[-1] == ("F:learn.-.0" if learns and layers else "F:final.-.0")


def moved(program: Program, tag: str, after: str) -> Program:
    """The program with one instruction put behind another."""
    (instruction,) = (s for s in program if s.tag == tag)
    rest = [s for s in program if s is not instruction]
    at = next(i for i, s in enumerate(rest) if s.tag == after)
    return (*rest[: at + 1], instruction, *rest[at + 1 :])


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    ("tag", "after", "said"),
    [  # a rank would tell others of a plan that it doesn't have yet, and await no fetch
        ("F:foresee.1.0", "F:score.1.0", "F:score.1.0 reads #plan.1.0 before it is written by F:foresee.1.0"),
        ("F:foresee.2.0", "F:told>.2.0", "F:score.2.0 reads #plan.2.0 before it is written by F:foresee.2.0"),
        # nobody has said yet what the plan follows from
        ("F:foresee.2.0", "F:score.1.0", "F:foresee.2.0 reads #heard.1.0 before it is written by F:told<.1.0"),
    ],
)
def test_an_order_in_which_something_is_foreseen_too_late_or_too_early_is_refused(
    tag: str, after: str, said: str, learns: bool
) -> None:
    shape = plain_shape(moe=(True, True, True))
    planted = moved(inference_step(shape, learns=learns), tag, after)
    with pytest.raises(ValueError, match="before it is written") as error:
        check(planted, given_of(shape), {})
    assert said in str(error.value)


def test_what_is_learned_is_what_was_foreseen_and_heard() -> None:
    program = inference_step(plain_shape(moe=(True, False, True)), learns=True)
    assert program[-1].reads == tuple(f"#{name}.{layer}.0" for layer in (0, 2) for name in ("heard", "evidence", "plan"))
    left = {v for s in program for v in s.writes} - {v for s in program for v in s.reads}
    assert left == {"#out.-.0", "#seen.2.0", "#outcome.0.0", "#outcome.2.0", "#learned.-.0"}


def test_exchanges_are_one_of_counts_and_two_of_tokens_a_layer() -> None:
    program = inference_step(plain_shape(moe=(True, False, True)), learns=True)
    starts = [(s.op, s.layer) for s in program if s.kind is Kind.START]
    assert starts == [(op, layer) for layer in (0, 2) for op in (Op.GATHER, Op.TOKENS, Op.TOKENS)]


def test_a_chunk_of_slots_goes_back_while_the_next_one_computes() -> None:
    program = inference_step(plain_shape(moe=(True, True)), learns=False, chunks=3)
    tags = [s.tag for s in program]
    begin = tags.index("F:dispatch<.1.0")
    assert tags[begin + 1 : begin + 12] == [
        *("F:experts.1.0c0", "F:combine>.1.0c0", "F:experts.1.0c1", "F:combine>.1.0c1", "F:experts.1.0c2", "F:combine>.1.0c2"),
        *("F:combine<.1.0c0", "F:combine<.1.0c1", "F:combine<.1.0c2"),
        *("F:join.1.0", "F:mix.1.0"),
    ]
    chunked = [s for s in program if s.name in ("experts", "combine") and s.layer == 1]
    assert all(s.chunk == (int(s.part[-1]), 3) for s in chunked)
    assert not any(s.credit or s.yields_to for s in program)


def test_no_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="0 chunks of slots: choose 1 or more"):
        inference_step(plain_shape(moe=(True,)), learns=False, chunks=0)


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match="leave parallel.tp at 1"):
        inference_step(plain_shape(moe=(True,), tp=True), learns=False)


@pytest.mark.parametrize("cut", [{"tp": True}, {"context": "all_gather"}])
def test_ranks_that_cut_heads_or_sequences_are_refused(cut: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"inference has no {'tensor' if 'tp' in cut else 'context'} parallelism"):
        inference_step(replace(plain_shape(moe=(True,)), **cut), learns=False)
