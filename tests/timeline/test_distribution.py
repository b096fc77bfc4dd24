"""The picture of a distribution."""

from pathlib import Path

import matplotlib.figure
import pytest

from megalina.timeline.distribution import draw_distribution


def test_each_sample_is_a_line_from_nobody_to_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path: drawn.append(self) or save(self, path))
    draw_distribution(tmp_path / "a.png", {"eager": [3.0, 1.0, 2.0, 2.0], "nothing": []}, "emulated")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    line, median, worst = axis.lines
    assert line.get_label() == "eager (4)"
    assert list(zip(line.get_xdata(), line.get_ydata())) == [(1, 0), (1, 0.25), (2, 0.5), (2, 0.75), (3, 1)]
    assert (median.get_xdata()[0], worst.get_xdata()[0]) == (1.83, 4.14)
    assert axis.get_xlabel().endswith("(emulated)")
