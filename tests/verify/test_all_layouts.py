"""The star test of `make test-full`: all pairs of choices in each world; the product of layouts, ZeRO, accumulation and routers.

That of 4 ranks is in test_all_layouts_of_4.py, so that another worker may run it."""

import pytest

from megalina.verify.layouts import pairwise
from tests.verify.cases import choices_of
from tests.verify.star import differences, product_equals_one_process


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_pair_of_choices_in_each_world_equals_one_process(world: int) -> None:
    choices = choices_of(world)
    rows = pairwise(choices, world, only=True)
    assert {row.layout.world for row in rows} == {world}
    assert len(rows) >= {1: 50, 2: 50, 4: 90}[world]
    assert differences(choices, rows, steps=2) == []


@pytest.mark.full
@pytest.mark.parametrize(("world", "tp", "number"), [(1, 1, 70), (2, 1, 100), (2, 2, 100)])
def test_the_product_of_layouts_and_routers_equals_one_process(world: int, tp: int, number: int) -> None:
    product_equals_one_process(world, tp, number)
