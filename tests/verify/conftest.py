"""One server forks the ranks of all tests, so it imports what any of them needs, whichever comes first."""

import pytest

from megalina.verify import on_ranks
from tests.parallel.ranks import PRELOAD


@pytest.fixture(autouse=True, scope="session")
def _preload() -> None:
    on_ranks.PRELOAD = PRELOAD
