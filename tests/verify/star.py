"""Rows of the star test: which pairs of choices are run, and how a row differs from one process."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from megalina.verify import layouts
from megalina.verify.layouts import Choices, Row, Values, axes, pairs, product, row_of, runs
from megalina.verify.verification import verify
from tests.verify.cases import choices_of

RANKS = 4
SIZES: dict[str, list[Any]] = {"world": [4, 2, 1], "tp": [1, 2, 4], "ep": [1, 2, 4], "sequence": [True, False]}
# of a row: its ranks, which share two cores, and its micro-batches
COSTS = {("world", 4): 8.0, ("world", 2): 3.0, ("micro_batch", 1): 3.0, ("micro_batch", 2): 1.5}


def options_by_size() -> dict[str, Sequence[Any]]:
    """The axes of rows, but the sizes of a layout each an axis of its own: far fewer pairs than with layouts as choices."""
    options = axes(choices_of(RANKS), RANKS) | {"context": [(1, "all_gather")]}  # others: test_context_layouts.py
    return SIZES | {axis: options[axis] for axis in options if axis != "place"}


def with_place(values: Values) -> Values:
    return {**values, "place": tuple(values[axis] for axis in SIZES)}


@cache
def pairs_by_size() -> list[Values]:
    choices, places = choices_of(RANKS), set(layouts.places(RANKS))

    def is_a_place(values: Values) -> bool:
        return not values.keys() >= SIZES.keys() or with_place(values)["place"] in places

    def allowed(values: Values) -> bool:
        return is_a_place(values) and runs(choices, row_of(choices, with_place(values)))

    return list(pairs(options_by_size(), allowed, COSTS, is_a_place))


def differences(choices: Choices, rows: list[Row], steps: int | Callable[[Row], int]) -> list[str]:
    """A line for every row that differs from one process or could not be run."""
    return [f"{r.row}: {r.first_difference} {r.failed}" for r in verify(choices, rows, steps=steps) if not r.equal]


def product_equals_one_process(world: int, tp: int, at_least: int) -> None:
    """Of layouts, ZeRO, accumulation and routers, in a world cut by `tp`."""
    crossed = ("place", "zero", "micro_batch", "router")
    choices = choices_of(RANKS)
    rows = [row for row in product(choices, RANKS, crossed) if (row.layout.world, row.layout.tp, row.layout.cp) == (world, tp, 1)]
    assert len(rows) >= at_least
    assert differences(choices, rows, steps=2) == []
