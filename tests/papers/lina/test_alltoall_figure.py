"""The figure of an analysis: bars that are the analysis' numbers, and the paper's beside."""

from pathlib import Path

import pytest

from papers.lina.alltoall_figure import draw, figure_of
from tests.papers.lina.test_alltoall import analysed

SHARE, LAYER, SLOWDOWN, STEP = range(4)


def heights(axis: object) -> dict[str, list[float]]:
    """Of the bars, by name."""
    found = zip(axis.containers, axis.get_legend_handles_labels()[1], strict=False)  # type: ignore[attr-defined]
    return {name: [bar.get_height() for bar in bars] for bars, name in found if hasattr(bars, "patches")}


def test_bars_are_the_numbers_of_the_analysis() -> None:
    axes = figure_of([analysed(), analysed()]).axes
    share = axes[SHARE].containers
    assert [bar.get_height() for bar in share[0]] == pytest.approx([47.5, 47.5])
    assert [bar.get_height() for bar in share[1]] == pytest.approx([37.5, 37.5])
    layer = heights(axes[LAYER])
    assert layer == {"all-to-all dispatch": [1750, 1750], "route": [1000, 1000], "experts": [1000, 1000]}
    bottoms = [bars[0].get_y() for bars in axes[LAYER].containers]
    assert bottoms == [0, 1750, 2750]  # one on the other
    assert [text.get_text() for text in axes[LAYER].get_xticklabels()] == ["4 experts\non 2 ranks"] * 2


def test_a_step_adds_up_to_the_whole() -> None:
    step = heights(figure_of([analysed()]).axes[STEP])
    assert step["computes"] == [pytest.approx(52.5)] and step["waits for tokens"] == [pytest.approx(37.5)]
    assert step["waits for gradients, weights"] == [pytest.approx(10)]
    assert sum(value for (value,) in step.values()) == pytest.approx(100)


def test_the_papers_share_stands_where_it_has_one_with_as_many_experts() -> None:
    middle, _, (line,) = figure_of([analysed()]).axes[SHARE].containers[2]
    assert (middle.get_xdata()[0], middle.get_ydata()[0]) == (0, pytest.approx((35.4 + 38.2) / 2))
    assert [y for _, y in line.get_segments()[0]] == pytest.approx([35.4, 38.2])


@pytest.mark.full
@pytest.mark.parametrize(("name", "head"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_name_says_the_format_and_the_title_what_is_emulated(tmp_path: Path, name: str, head: bytes) -> None:
    draw(tmp_path / name, [analysed("ddp")], "emulated devices")
    assert (tmp_path / name).read_bytes().startswith(head)
    assert figure_of([analysed("ddp")], "emulated devices").get_suptitle() == "4 ranks, strategy ddp; emulated devices"
