"""The picture: boxes where they belong, on one axis, with words that are the events' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from megalina.timeline import picture
from megalina.timeline.picture import draw, figure_of
from megalina.timeline.recorder import Event
from tests.timeline.made import compute, event, grads, tokens, wait

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def step() -> list[Event]:
    """Half a second from 100 s on: attention, a wait of 0.1 s for tokens, experts, backward under gradients, the update."""
    return [
        compute("attention", 100.0, 100.1, layer=3),
        tokens("dispatch", 100.1, 100.2, layer=3),
        wait("dispatch", 100.1, 100.2, 0.1, layer=3),
        compute("experts", 100.2, 100.3, layer=3),
        compute("experts", 100.3, 100.4, layer=3, phase="B"),
        grads("dense.4", 100.3, 100.45),
        grads("experts.4", 100.35, 100.4, axis="copies"),
        wait("dense.4", 100.4, 100.45, 0.05, "grads", phase="B"),
        event("wait", "measured", 100.45, 100.45, op="sum", axis="world", phase="U"),
        compute("update dense.4", 100.45, 100.5, phase="U"),
    ]


def boxes(figure: Figure, row: int = 0) -> set[tuple[str, float, float, float]]:
    """Colour, left and right in ms, bottom."""
    found = set()
    for collection in figure.axes[row].collections:
        colour = collection.get_facecolor()[0]
        extents = collection.get_paths()[0].get_extents()
        name = "#" + "".join(f"{round(v * 255):02x}" for v in colour[:3])
        found.add((name, round(extents.x0, 3), round(extents.x1, 3), round(extents.y0, 2)))
    return found


def words(figure: Figure, row: int = 0) -> list[str]:
    return [text.get_text().strip() for text in figure.axes[row].texts]


def test_each_event_is_a_box_in_its_lane() -> None:
    found = boxes(figure_of({"eager": step()}))
    computes, on_the_wire, half_up, stands_still = -0.88, -1.88, -2.5, -3.88
    assert found == {
        (picture.ATTENTION[0], 0, 100, computes),
        (picture.EXPERTS[0], 200, 300, computes),
        (picture.EXPERTS[0], 300, 400, computes),
        (picture.REST[0], 450, 500, computes),
        (picture.TOKENS[0], 100, 200, on_the_wire),
        (picture.GRADIENTS[0], 300, 450, -2.88),
        (picture.GRADIENTS[0], 350, 400, half_up),  # at the same time along another axis
        (picture.FOR_TOKENS, 100, 200, stands_still),
        (picture.FOR_GRADIENTS, 400, 450, stands_still),
    }


def test_the_words_say_phases_layers_time_and_idleness() -> None:
    found = words(figure_of({"eager": step()}))
    assert [word for word in found if word.isalpha()] == ["update", "forward", "backward", "update"]  # a box, the phases
    assert "100 ms for tokens\n 50 ms for gradients" in found
    assert sorted(word for word in found if word.isdigit()) == ["3", "3", "3", "3", "4", "4"]
    assert "500 ms" in found
    assert "30% of it idle" in found


def test_the_second_row_is_on_the_same_axis_and_says_how_much_faster_it_was() -> None:
    flow = [e for e in step() if e.end_s <= 100.4]
    figure = figure_of({"eager": step(), "flow": flow}, "emulated")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["eager", "flow"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert "400 ms" in words(figure, 1)
    assert "25% of it idle\n 1.25x as fast as eager" in words(figure, 1)
    assert figure.axes[1].get_xlabel().startswith("milliseconds since the step began (emulated)\n")
    assert "25% of it idle" in words(figure_of({"step 1": step(), "step 2": flow}, race=False), 1)


def test_a_wait_is_red_only_as_long_as_the_device_stood_still() -> None:
    events = [compute("attention", 0, 1), wait("dispatch", 0.5, 2, 1.0, layer=0), compute("experts", 2, 3)]
    assert (picture.FOR_TOKENS, 1000, 2000, -3.88) in boxes(figure_of({"": events}))


def test_gradients_of_weights_that_come_late_are_backward_still() -> None:
    events = [compute("attention", 0, 1), compute("experts", 1, 2, phase="B"), compute("experts", 3, 4, phase="W"),
              compute("update dense.0", 4, 5, phase="U")]  # fmt: skip
    shades = [patch for patch in figure_of({"": events}).axes[0].patches if patch.get_zorder() == 0]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in shades]
    assert spans == [(0, 1000), (1000, 4000), (4000, 5000)]


def test_parts_come_in_two_shades_and_chunks_keep_their_parts() -> None:
    events = [compute("attention", i, i + 1, layer=0, part=part) for i, part in enumerate(["0", "1", "2", "1c1"])]
    figure = figure_of({"": events})
    colours = [colour for colour, left, _, _ in sorted(boxes(figure), key=lambda box: box[1])]
    even, odd = picture.ATTENTION
    assert colours == [even, odd, even, odd]
    assert any("lighter" in text.get_text() for text in figure.legends[0].get_texts())


def test_the_legend_names_what_is_there_and_nothing_else() -> None:
    names = [text.get_text() for text in figure_of({"": step()}).legends[0].get_texts()]
    assert "waits for tokens" in names
    assert "waits for sizes or small sums" not in names  # it took no time
    assert "updated weights (ZeRO-1)" not in names


@pytest.mark.parametrize(("name", "head"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_name_says_the_format(tmp_path: Path, name: str, head: bytes) -> None:
    draw(tmp_path / name, {"eager": step()})
    assert (tmp_path / name).read_bytes().startswith(head)
