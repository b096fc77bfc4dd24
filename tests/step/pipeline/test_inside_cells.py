"""What is inside of cells: parts that walk in turn, gradients of weights that come later, and one message a micro-batch all the
same."""

import re

import pytest

from megalina.blocks.pipelined import pipelined
from megalina.compose import compose
from megalina.parallel.plan_file import setting_of
from megalina.step.pipeline.job import cells_by_tag, training_steps
from megalina.step.program import Instruction, Kind, Op, Program

MODEL = (
    *("model=tiny", "model.num_layers=4", "model.tie_embeddings=false", "parallel.pp=2"),
    *("train.micro_batch_size=2", "train.global_batch_size=8"),
)


def lists(*overrides: str) -> tuple[Program, ...]:
    config = compose([*MODEL, *overrides])
    return training_steps(setting_of(config, 2, 512), pipelined(config, 2, vocab_size=512))


def under_tokens(program: Program, instruction: Instruction) -> bool:
    """Whether some tokens are on the wire when an instruction's turn comes."""
    under_way = set[str]()
    for s in program:
        if s == instruction:
            return bool(under_way)
        if s.carries_tokens:
            under_way = under_way | set(s.writes) if s.kind is Kind.START else under_way - set(s.reads)
    raise AssertionError(f"{instruction.tag} isn't there")


@pytest.mark.parametrize("schedule", ["strategy.pipeline=1f1b", "strategy.pipeline=zb_h1"])
def test_one_part_computes_while_the_others_tokens_travel_in_every_cell(schedule: str) -> None:
    whole, parts = lists(schedule), lists(schedule, "strategy=flow")
    for rank, program in enumerate(parts):
        heavy = [s for s in program if s.name == "experts" and s.phase in "FB"]
        assert len(heavy) == 2 * 2 * 2 * 4  # parts, passes, layers, micro-batches
        assert all(under_tokens(program, s) for s in heavy)
        assert not any(under_tokens(whole[rank], s) for s in whole[rank] if s.name == "experts")
        of_stream = [s.tag for s in program if s.op in (Op.SEND, Op.RECV)]
        assert of_stream == [s.tag for s in whole[rank] if s.op in (Op.SEND, Op.RECV)]


def test_weights_later_go_under_tokens_and_behind_what_their_cell_sends() -> None:
    first, second = lists("strategy=lancet")
    for program in (first, second):
        later = [s for s in program if s.phase == "W"]
        assert {s.name for s in later} >= {"attention", "experts"} and len(later) > 2 * 2 * 4
        assert sum(under_tokens(program, s) for s in later) > 0.8 * len(later)
    (place,) = (i for i, s in enumerate(second) if s.tag == "B:stream>.2.0")  # the first micro-batch's gradient goes
    own = [i for i, s in enumerate(second) if s.phase == "W" and s.part == "0"]
    assert sum(i < place for i in own) > 0 and sum(i > place for i in own) > 0  # the last ones have waited
    assert max(own) < next(i for i, s in enumerate(second) if s.tag == "B:combine>.3.1")  # no longer than the next forward


def test_the_last_layers_of_each_stage_have_their_experts_weights_last() -> None:
    for rank, program in enumerate(lists("strategy=flow", "strategy.late_layers=1", "strategy.parts=1")):
        later = [s for s in program if s.phase == "W"]
        assert {(s.name, s.layer) for s in later} == {("experts", 2 * rank)} and len(later) == 4
    assert [s.tag for s in program if s.phase == "W" or s.tag == "B:stream>.2.3"][-2:] == ["B:stream>.2.3", "W:experts.2.3"]


def test_cells_w_hold_what_they_held() -> None:
    split = "strategy.pipeline=zb_h1"
    assert lists(split, "strategy.deferred_weights=all") == lists(split)
    joined = lists(split, "strategy=flow", "strategy.deferred_weights=experts", "strategy.join_weights=true")
    plain = lists(split, "strategy=flow")
    assert sum(s.phase == "W" for s in joined[0]) < sum(s.phase == "W" for s in plain[0])


@pytest.mark.parametrize(
    ("strategy", "schedule", "chunks"),
    [("strategy=lancet strategy.partition=2", "interleaved", 2), ("strategy=pair", "dualpipev", 2), ("strategy=pair", "1f1b", 1)],
)
def test_every_instruction_of_a_cell_is_told_its_cell(strategy: str, schedule: str, chunks: int) -> None:
    overrides = [*strategy.split(), f"parallel.pp_chunks={chunks}", f"strategy.pipeline={schedule}"]
    config = compose([*MODEL, *overrides])
    setting, job = setting_of(config, 2, 512), pipelined(config, 2, vocab_size=512)
    stage_of = {layer: number for number, stage in enumerate(job.stages) for layer in stage.layers}
    for rank, program in enumerate(training_steps(setting, job)):
        cells = cells_by_tag(setting, job, rank)
        inside = [s for s in program if s.phase in "FBW" and s.op not in (Op.SEND, Op.RECV, Op.GRADS)]
        assert {s.tag for s in inside} <= set(cells)
        listed = {str(cell) for _, cell in job.under(config.strategy.name).cells(rank) if "_" not in str(cell)}
        assert {cells[s.tag] for s in inside} == listed
        for s in (s for s in inside if s.layer >= 0):
            work = {"F": "F", "W": "W" if any("W" in cell for cell in listed) else "B"}.get(s.phase, "[BI]")
            assert re.fullmatch(f"{stage_of[s.layer]}{work}{s.part.partition('p')[0]}", cells[s.tag]), s.tag
