"""Random orders of the programs of all pipeline ranks are legal, each and together; one of a rank by itself isn't."""

from collections.abc import Collection, Sequence
from random import Random

import pytest

from megalina.blocks.model import plain_shape
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.together import check_together
from megalina.step.program import BucketSpec, Op, Program, check, writes_of
from tests.perfmodel.sim.schedules import order_of
from tests.step.pipeline.random_orders import reordered
from tests.step.pipeline.test_fill import filled

SHAPE = plain_shape(moe=(False, True) * 2, tied=False)


def given_of(program: Program) -> tuple[Collection[str], dict[str, BucketSpec]]:
    buckets = {name: BucketSpec(64, "dp") for name in dict.fromkeys(u for s in program for u in s.uses)}
    return {f"#batch.-.{i}" for i in range(4)} | set(buckets), buckets


def messages(programs: Sequence[Program]) -> list[list[str]]:
    return [[f"{s.tag} {s.op}" for s in program if s.op in (Op.SEND, Op.RECV)] for program in programs]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in ("1f1b", "zbv"))) for name in SCHEDULES]
)
def test_other_orders_of_all_ranks_are_legal(name: str) -> None:
    programs = filled(name, SHAPE, chunks=0 if SCHEDULES[name].chunks else 2)
    for seed in range(4):
        for keep_sums in (True, False):
            found = reordered(programs, {}, Random(seed), keep_sums=keep_sums)
            assert found != programs and [set(p) for p in found] == [set(p) for p in programs]
            check_together(found)
            for program in found:
                check(program, *given_of(program))
            assert messages(found) != messages(programs)
            sums = [[s.tag for s in program if "experts.1'" in writes_of(s)] for program in found]
            kept = [[s.tag for s in program if "experts.1'" in writes_of(s)] for program in programs]
            assert sums == kept or not keep_sums


def test_another_order_of_one_rank_by_itself_is_refused() -> None:
    programs = filled("zb_h1", SHAPE, chunks=1)
    for seed in range(8):
        alone = order_of(programs[0], Random(seed))
        check(alone, *given_of(alone))
        with pytest.raises(ValueError, match="start things in different orders|the programs never end"):
            check_together((alone, programs[1]))
