"""Some rows of the star test for pipelines on real ranks, whose messages are gloo's."""

from collections.abc import Iterator

import pytest

from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.verify import layouts
from megalina.verify.layouts import Row
from tests.verify.pipeline_rows import RANKS, choices, every_pair
from tests.verify.star import differences

ROWS = 4  # of each schedule


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    yield [row for row in every_pair() if row.layout.world <= RANKS]


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_gives_the_numbers_of_one_process(schedule: str, rows: list[Row]) -> None:
    own = [row for row in rows if row.layout.pipeline == schedule]
    some = own[:: max(1, len(own) // ROWS)][:ROWS]
    assert len(some) == ROWS
    assert differences(choices(), layouts.in_order(some), steps=2) == []
