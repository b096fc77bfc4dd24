"""Rows: residuals, what may not be said, and the paper's rows by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from megalina.perfmodel.sim.virtual import Timeline
from megalina.timeline.recorder import SEND
from papers.lina import walk, worked_example
from papers.lina.models import DDP, PARTITION, PIPELINE, TRAINED, TXL, config_of, lina
from papers.lina.overheads import alone, figures, shares, table_1, under_gradients
from papers.lina.report import Found, closing, contradictions, draw, part_of, table, what_if
from papers.lina.row import Row, mean_absolute
from papers.lina.speedups import SWEPT_MB, Speedups, _local_minima, efficiency
from papers.lina.walk import START, Bed
from papers.lina.what_if import exposed, packed
from tests.papers.lina.testbed import PLAIN, base, bed

pytestmark = pytest.mark.full  # of `make test-full` alone

GIVEN = replace(START, between_factor=1.4, inside_factor=100.0)


def numbers(rows: list[Row]) -> dict[str, float]:
    return {row.id: float(row.simulated) for row in rows if row.simulated is not None}


def test_a_residual_is_relative_to_the_paper() -> None:
    row = Row(id="a", name="a", paper=2.0, simulated=1.5)
    assert row.residual == -0.25 and row.as_json()["residual"] == -0.25
    assert Row(id="b", name="b", paper="grows", simulated=True).residual is None
    assert mean_absolute([row, replace(row, simulated=2.5)]) == 0.25 and math.isnan(mean_absolute([]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"paper": "grows", "simulated": 1.2}, "neither"),
        ({"simulated": None}, "say why"),
        ({"marks": "az"}, "no contradiction z"),
        ({"put_in": True}, "not held out"),
    ],
)
def test_a_row_that_says_too_little_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Row(**{"id": "a", "name": "a", "paper": 1.0, "simulated": 1.0, **changes})


# the worked example


def sent_ms(timeline: Timeline, op: str) -> float:
    return 1e3 * sum(e.end_s - e.start_s for e in timeline.events(0) if e.kind == SEND and e.op == op)


def test_the_example_s_lengths_are_the_papers() -> None:
    assert pytest.approx(9.7) == worked_example.A2A_MS and pytest.approx(3.6) == worked_example.COMBINE_MS
    held = worked_example.walk(place="end")
    assert worked_example.layer_ms(held) == pytest.approx(24.6)
    assert worked_example.reduced_ms(held) == pytest.approx(6.6 / 0.217)
    assert sent_ms(held, "tokens") == pytest.approx(2 * 9.7)


def test_what_shares_a_link_loses_what_the_other_sends() -> None:
    """Asked for with the first all-to-all, an all-reduce that ends within it costs just its own length, either way."""
    for alone_ in (False, True):
        found = worked_example.walk(asked_ms=worked_example.COMBINE_MS, alone=alone_)
        assert worked_example.layer_ms(found) == pytest.approx(24.6 + worked_example.REDUCE_MS)


def test_the_gap_saves_an_all_reduce_what_the_experts_take() -> None:
    found = worked_example.walk(place="gap")
    assert worked_example.layer_ms(found) == pytest.approx(24.6 + worked_example.REDUCE_MS - 1.6)


def test_small_pieces_wait_for_all_to_alls() -> None:
    pieces = worked_example.walk(pieces=100, yields=True)
    assert worked_example.layer_ms(pieces) == pytest.approx(24.6, abs=2 * worked_example.REDUCE_MS / 100 + 1e-6)
    hidden_ms = 3.6 + 1.6  # before the first all-to-all, and between the two
    left_ms = worked_example.REDUCE_MS - hidden_ms
    assert worked_example.reduced_ms(pieces) - worked_example.layer_ms(pieces) == pytest.approx(left_ms, abs=0.2)


def test_the_example_has_the_papers_rows() -> None:
    ids = [row.id for row in worked_example.rows()]
    assert ids[:4] == ["Fig7a", "Fig7b", "Fig7c", "Fig7d"] and len(ids) == len(set(ids)) == 9
    assert numbers(list(worked_example.rows()))["Fig7a"] == pytest.approx(29.0)


# training


def test_slowdowns_are_of_all_to_alls_that_meet_gradients() -> None:
    assert not under_gradients(bed(), GIVEN, replace(DDP, strategy="serial"))
    found = under_gradients(bed(), GIVEN, DDP)
    assert found and min(found) > 1 and max(found) < 2.0 + 1e-6
    step = bed().step(TXL, 16, DDP, GIVEN)
    forward = step.sends("tokens", "F")[0]
    assert alone(step).seconds(forward.num_bytes) == pytest.approx(forward.end_s - forward.start_s)


@pytest.mark.full
def test_rows_of_training_are_ratios_of_walks() -> None:
    own = Speedups(bed(), GIVEN)
    found = numbers(list(own.rows()))
    walks = {(m, p): bed().step(m, 8, p, GIVEN) for m in TRAINED for p in (DDP, PARTITION, lina(m, 8))}
    for id, plan in (("T1.E8", None), ("T10.E8", PARTITION)):
        hand = mean(walks[m, DDP].step_s / walks[m, plan or lina(m, 8)].step_s for m in TRAINED)
        assert found[id] == pytest.approx(hand), id
    assert found["T5.E8"] == pytest.approx(
        mean(walks[m, DDP].all_to_all_s("B") / walks[m, lina(m, 8)].all_to_all_s("B") for m in TRAINED)
    )
    assert found["T2.mean"] == pytest.approx(mean(found[f"T1.E{e}"] for e in (2, 4, 8, 16)))
    assert found["T2.max"] == max(found[f"T1.E{e}"] for e in (2, 4, 8, 16))
    assert 0 < found["T15"] < 5 and 0 < found["T14"] < 5
    assert all(0 < found[f"T6.{m.name}.{n}"] < 100 for m in TRAINED for n in ("baseline", "lina"))
    assert found["T7.TXL-24.lina"] > found["T7.TXL-24.baseline"]  # packed experts and their optimizer


@pytest.mark.full
def test_no_row_of_training_is_fitted_and_ids_are_unique() -> None:
    rows = [*Speedups(bed(), GIVEN).rows(), *shares(bed(), GIVEN)]
    assert not any(row.fitted for row in rows)
    assert len({row.id for row in rows}) == len(rows)
    wanted = {f"T{n}" for n in range(1, 17)}
    assert {row.id.split(".")[0] for row in rows if row.id.startswith("T")} == wanted


def test_efficiency_is_one_where_experts_take_as_long_as_all_to_alls() -> None:
    walk = bed().step(TXL, 16, PIPELINE, GIVEN)
    sent = mean(e.end_s - e.start_s for e in walk.sends("tokens", "F"))
    computed = walk.compute_s("experts", phase="F") / (2 * TXL.layers)
    assert efficiency(walk) == pytest.approx(computed / sent)
    balanced = replace(GIVEN, experts_factor=GIVEN.experts_factor * sent / computed)
    assert efficiency(bed().step(TXL, 16, PIPELINE, balanced)) == pytest.approx(1.0, rel=0.02)


def test_pieces_are_swept_for_tokens_and_gradients() -> None:
    found = Speedups(bed(), GIVEN).sweep(TXL)
    assert tuple(found) == SWEPT_MB
    assert found[10] != found[20]  # an all-to-all of 16.8 MB is cut by the one, not by the other


@pytest.mark.parametrize(
    ("values", "minima"), [([3.0, 2, 3], 1), ([3.0, 2, 3, 2, 3], 2), ([1.0, 1, 1], 1), ([1.0, 2, 3], 1), ([2.0, 1, 2, 1], 2)]
)
def test_local_minima(values: list[float], minima: int) -> None:
    assert _local_minima(values) == minima


# what is printed


def small_found() -> Found:
    rows = [*figures(bed(), GIVEN), *worked_example.rows(), Row(id="T1", name="x", paper=2.0, simulated=1.0, unit="x", marks="g")]
    return Found(GIVEN, rows, list(exposed(bed(), GIVEN)), packed(bed(), GIVEN), {"TXL": {"lina": 1.1}}, "made routing")


@pytest.mark.full
def test_tables_json_and_picture_have_all_rows(tmp_path: Path) -> None:
    found = small_found()
    text = table(found.rows)
    assert all(row.id in text for row in found.rows) and "doesn't" in text and "not be" not in text
    fitted, held_out = found.split()
    assert {r.id for r in fitted} & {r.id for r in held_out} == set()
    assert f"{100 * mean_absolute(held_out):.1f}% over {len(held_out)} rows held out" in closing(found)
    assert "held out, training: 50.0% over 1" in closing(found)
    assert "  g  Amdahl" in contradictions(found.rows) and "  a  " not in contradictions(found.rows)
    assert what_if(found).count("x  ") > 30
    again = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert len(again["rows"]) == len(found.rows) and again["mean_absolute_residual"]["held_out"] == mean_absolute(held_out)
    assert {"id", "name", "paper", "simulated", "residual", "fitted", "unit", "marks"} <= set(again["rows"][0])
    draw(tmp_path / "rows.png", found.rows)
    assert (tmp_path / "rows.png").stat().st_size > 20_000


@pytest.mark.full
def test_all_rows_are_told_of_shallow_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The paper's models with two layers: what their numbers are is tested with all layers in `make test-full`."""
    shallow = lambda base, model, *more, **named: config_of(base, replace(model, layers=2), *more, **named)  # noqa: E731
    monkeypatch.setattr(walk, "config_of", shallow)
    own = Bed(base())
    training = [*Speedups(own, GIVEN).rows(), *shares(own, GIVEN)]
    assert {f"T{n}" for n in range(1, 17)} <= {row.id.split(".")[0] for row in training} and not any(r.fitted for r in training)
    rows = [*training, *figures(own, GIVEN), *table_1(own, GIVEN)]
    assert len({row.id for row in rows}) == len(rows) > 80
    found = Found(GIVEN, rows, list(exposed(own, GIVEN)), packed(own, GIVEN), {"TXL": {"lina": 1.1}}, "made routing")
    text = "\n".join((table(rows), closing(found), contradictions(rows), what_if(found)))
    assert all(row.id in text for row in rows)
    assert len(json.loads(json.dumps(found.as_json(), allow_nan=False))["rows"]) == len(rows)
    draw(tmp_path / "rows.png", rows)
    assert (tmp_path / "rows.png").stat().st_size > 20_000


def test_parts_of_the_paper() -> None:
    ids = {
        "Tab1.E4": "Tab1",
        "Fig3.median": "Tab1",
        "S2.2.mean": "Tab1",
        "T10.E2": "T",
        "Tab5.TXL": "I",
        "Tab6.a": "I",
        "I1.E4": "I",
    }
    for id, part in ids.items():
        assert part_of(Row(id=id, name="", paper=1.0, simulated=1.0)) == part


@pytest.mark.full
def test_more_gradients_expose_more_and_no_packing_is_ddp_nearly() -> None:
    found = list(exposed(bed(), PLAIN))
    assert found[-1].meeting > found[0].meeting
    assert set(packed(bed(), PLAIN)[4]) == {1, 2, 4}
