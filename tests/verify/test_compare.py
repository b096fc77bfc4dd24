"""The comparison: the first difference in the order of computation, on the whole and on each rank."""

import copy

import torch

from megalina.verify.compare import AFTER_ADAM, EXACT, compare
from megalina.verify.recording import NOBODY, Entry, Layout, Recording
from tests.verify.cases import config_with


def value(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def entries() -> list[Entry]:
    return [
        Entry(-1, "weight", "w", value(1.0, 2.0)),
        Entry(0, "activation", "embedded", value(1.0, -4.0)),
        Entry(0, "routing", "layers.0.expert", torch.tensor([0, 1])),
        Entry(0, "gradient", "w", value(0.5, 0.25)),
        Entry(0, "gradient", "small", value(1e-9, 0.0)),
        Entry(0, "weight", "w", value(1.0, 2.0)),
        Entry(1, "loss", "loss", value(3.0)),
    ]


def recordings(optimizer: str = "sgd") -> tuple[Recording, Recording]:
    """A reference, and two ranks of which each holds half of a gradient."""
    config = config_with(optimizer=optimizer)
    reference = Recording(None, config, [], entries())
    got = copy.deepcopy(entries())
    for e in got:
        e.by_rank = [e.value.clone(), e.value.clone()]
    nan = float("nan")
    got[3].by_rank = [value(0.5, nan), value(nan, 0.25)]
    return reference, Recording(Layout(2), config, [], got)


def test_equal_recordings_do_not_differ() -> None:
    found = compare(*recordings())
    assert (found.first, found.differences, found.largest_error, found.largest_share) == (None, [], 0.0, 0.0)


def test_the_first_difference_in_the_order_of_computation_is_named() -> None:
    reference, got = recordings()
    got.entry(0, "gradient", "w").value[1] += 0.125
    got.entry(1, "loss", "loss").value += 1
    found = compare(reference, got)
    assert found.first is not None
    assert (found.first.step, found.first.kind, found.first.name, found.first.error) == (0, "gradient", "w", 0.25)
    assert str(found.first) == "step 0: gradient w"
    assert [d.name for d in found.differences] == ["w", "loss"]


def test_a_copy_that_differs_on_one_rank_is_a_difference() -> None:
    reference, got = recordings()
    ranks = got.entry(0, "weight", "w").by_rank
    assert ranks is not None
    ranks[1][0] += 0.1
    found = compare(reference, got)
    assert [(d.kind, d.name) for d in found.differences] == [("weight", "w")]


def test_other_routing_a_hole_and_another_shape_are_infinite_differences() -> None:
    for kind, name, change in (
        ("routing", "layers.0.expert", torch.tensor([1, 1])),
        ("routing", "layers.0.expert", torch.tensor([0, NOBODY])),
        ("gradient", "w", value(0.5, float("nan"))),
        ("gradient", "w", value(0.5, 0.25, 0.0)),
    ):
        reference, got = recordings()
        got.entry(0, kind, name).value = change
        first = compare(reference, got).first
        assert first is not None
        assert (first.kind, first.error) == (kind, float("inf"))


def test_errors_are_relative_to_the_largest_magnitude_with_a_floor_from_its_kind() -> None:
    reference, got = recordings()
    got.entry(0, "activation", "embedded").value[0] += 4 * EXACT / 2  # a half of what is allowed of the -4
    got.entry(0, "gradient", "small").value += 1e-16  # the largest gradient is 0.5: a thousandth of it is the measure
    found = compare(reference, got)
    assert found.first is None
    assert 0.4 < found.largest_share < 0.6
    got.entry(0, "gradient", "small").value += 1e-15
    assert [d.name for d in compare(reference, got).differences] == ["small"]


def test_adam_may_magnify_rounding_after_its_first_update_only() -> None:
    for optimizer, names in (("sgd", ["w", "w", "loss"]), ("adamw", ["w"])):
        reference, got = recordings(optimizer)
        for step, kind, name in ((0, "gradient", "w"), (0, "weight", "w"), (1, "loss", "loss")):
            got.entry(step, kind, name).value *= 1 + AFTER_ADAM / 10
        assert [d.name for d in compare(reference, got).differences] == names
