"""The star test of `make test-full` on 4 ranks: the product of layouts, ZeRO, accumulation and routers."""

import pytest

from tests.verify.star import product_equals_one_process


@pytest.mark.full
@pytest.mark.parametrize(("world", "tp", "number"), [(4, 1, 100), (4, 2, 150), (4, 4, 70)])
def test_the_product_of_layouts_and_routers_equals_one_process(world: int, tp: int, number: int) -> None:
    product_equals_one_process(world, tp, number)
