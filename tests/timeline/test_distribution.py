"""The lines of a distribution."""

import pytest

from megalina.timeline.picture import draw_distribution


def test_each_sample_is_a_line_from_nobody_to_everybody() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    draw_distribution(axis, {"eager": [3.0, 1.0, 2.0, 2.0], "nothing": []})
    line, median, worst = axis.lines
    assert line.get_label() == "eager (4, at most 3.0)"
    assert list(zip(line.get_xdata(), line.get_ydata())) == [(1, 0), (1, 0.25), (2, 0.5), (2, 0.75), (3, 1)]
    assert (median.get_xdata()[0], worst.get_xdata()[0]) == (1.83, 4.14)


def test_one_that_was_held_up_by_chance_presses_no_other_to_the_edge() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    draw_distribution(axis, {"eager": [2.0] * 98 + [5.0, 49.0]})
    assert axis.get_xlim() == (0, pytest.approx(1.05 * 4.14))  # the paper's worst
    assert axis.lines[0].get_label() == "eager (100, at most 49.0)"
    draw_distribution(axis := Figure().subplots(), {"eager": [2.0] * 90 + [6.0] * 10})
    assert axis.get_xlim()[1] == pytest.approx(1.05 * 6)
