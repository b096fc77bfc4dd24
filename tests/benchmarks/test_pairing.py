"""The table of pairs: lists that strategies make take as long as those that were written by hand; docs show what it prints."""

import json
from pathlib import Path

import pytest

from benchmarks.pairing import LAYERS, LISTS, SKETCH, main, row_of, table

DOCUMENT = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
MORE = ((0.3, 4), (0.6, 4), (1.0, 16), (1.5, 16), (2.0, 16))


@pytest.mark.parametrize(
    ("all_to_all_s", "micro_batches"),
    [(1.0, 2), (1.5, 4), *(pytest.param(*of, marks=pytest.mark.full) for of in MORE)],
)
def test_lists_take_as_long_as_those_by_hand(all_to_all_s: float, micro_batches: int) -> None:
    row = row_of(LAYERS, micro_batches, all_to_all_s)
    by_hand = {name: SKETCH[name][round(row.ratio, 2), micro_batches] for name in SKETCH}
    assert all(round(row.times_as_fast[name], 2) == by_hand[name] for name in ("flow 2", "flow 4"))
    # there the last layer's gradients leave before the device has done what stands before it
    assert by_hand["pair"] - 0.015 < row.times_as_fast["pair"] < by_hand["pair"] + 0.005
    assert max(row.times_as_fast.values()) <= row.bound + 1e-9
    # placed by what exchanges alone leave idle, weights' gradients would make it slower where the wire is the limit
    assert row.times_as_fast["pair 2, late"] >= row.times_as_fast["pair 2"] >= row.times_as_fast["pair"]
    if table([row]).splitlines()[2] not in DOCUMENT:
        pytest.fail(f"row for docs/strategies.md, section pair: {table([row]).splitlines()[2]}")


def test_the_command_prints_a_table_and_writes_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--layers", "1", "--micro-batches", "2", "--json", str(tmp_path / "found.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert [row["micro_batches"] for row in found] == [2] * 5 and set(found[0]["times_as_fast"]) == set(LISTS)
    assert len(printed.splitlines()) == 2 + len(found) and printed.startswith("| wire / compute | micro-batches | late weights |")
