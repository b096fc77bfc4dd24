"""What tests of benchmarks share."""

import pytest

from megalina import console


@pytest.fixture
def every_status_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A status line that is no terminal's is written whenever it changes, not every ten seconds."""
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
