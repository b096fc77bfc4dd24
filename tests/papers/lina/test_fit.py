"""The fit: it finds what was planted, it is the same each time, and it uses every other line of Table 1."""

import math
from collections.abc import Mapping
from dataclasses import astuple

import pytest

from papers.lina.fit import constants_of, fit
from papers.lina.overheads import TABLE_1, is_fitted, table_1
from papers.lina.walk import START, Constants
from tests.papers.lina.testbed import PLAIN, bed

PLANTED = Constants(
    inside_factor=90.0,
    between_factor=2.0,
    gradient_factor=3.0,
    experts_factor=1.5,
    gate_factor=8.0,
    attention_factor=30.0,
    outside_ms=20.0,
)


def made(constants: Constants) -> Mapping[str, float]:
    """As times are: sums of products."""
    c = constants
    return {
        "four": c.inside_factor + c.attention_factor,
        "sixteen": 5 * c.between_factor + c.attention_factor,
        "between": c.between_factor,
        "reduce": c.gradient_factor + c.outside_ms / 10,
        "outside": c.outside_ms,
        "experts": c.experts_factor,
        "layer": c.experts_factor + c.gate_factor,
        "share": c.inside_factor / (c.inside_factor + c.gate_factor),
    }


def test_planted_constants_are_found() -> None:
    found = fit(made(PLANTED), made)
    assert astuple(found) == pytest.approx(astuple(PLANTED), rel=0.01)


def test_equal_input_gives_equal_constants() -> None:
    paper = {name: value * (1.1 if name == "four" else 0.95) for name, value in made(PLANTED).items()}
    first, rounds = fit(paper, made), []
    assert fit(paper, made, progress=lambda done, error: rounds.append(error)) == first
    assert rounds[0] > rounds[-1]


def test_what_nothing_says_anything_of_stays_where_it_was() -> None:
    paper = {name: value for name, value in made(PLANTED).items() if name in ("experts", "layer")}
    found = fit(paper, lambda c: {name: made(c)[name] for name in paper})
    assert found.gate_factor == pytest.approx(PLANTED.gate_factor, rel=0.01)
    assert found.inside_factor == pytest.approx(START.inside_factor)


def test_a_step_is_at_most_a_factor_of_e_a_round() -> None:
    seen = []
    fit({"outside": 1e9}, lambda c: seen.append(c.outside_ms) or {"outside": c.outside_ms})  # type: ignore[func-returns-value]
    assert seen[0] == pytest.approx(START.outside_ms)
    assert max(seen) / START.outside_ms < math.e**31


def test_constants_are_exponentials_in_the_order_of_fields() -> None:
    assert astuple(constants_of([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])) == pytest.approx([math.exp(n) for n in range(7)])


@pytest.mark.full
def test_half_of_table_1_is_fitted_with_both_sizes_and_all_depths() -> None:
    own = [line for line in TABLE_1 if is_fitted(*line)]
    assert len(own) == len(TABLE_1) // 2
    assert {experts for experts, _ in own} == {4, 16} and {layers for _, layers in own} == {12, 24, 36}
    rows = list(table_1(bed(), PLAIN))
    assert len(rows) == 24 and sum(row.fitted for row in rows) == 12
    assert {row.id.split(".train")[0].split(".infer")[0] for row in rows if row.fitted} == {f"Tab1.E{e}.{n}L" for e, n in own}
