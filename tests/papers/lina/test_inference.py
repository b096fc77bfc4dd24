"""Inference rows: routing that is made to order, and replays held against counts by hand."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megalina.compose import compose
from megalina.placement.controller import Outcome
from megalina.placement.routing_trace import traced, write_trace
from megalina.serve.modes import read_mode
from papers.lina import routing
from papers.lina.inference import (
    BERT_LARGE,
    FREE,
    IDEAL,
    LINA,
    NO_ESTIMATION,
    NO_PHASE_2,
    SERVED,
    STATIC,
    TXL_12,
    Inference,
    _misplaced,
)
from papers.lina.models import Model
from papers.lina.reenactment import reenact
from papers.lina.routing import BATCH_TOKENS, SKEWS, Routed, made, next_concentration, of_trace
from papers.lina.walk import START
from tests.papers.lina.testbed import base, bed

pytestmark = pytest.mark.full  # of `make test-full` alone

CONF = Path(__file__).resolve().parents[3] / "conf" / "infer"


def short(model: Model, experts: int) -> Routed:
    """Two batches of made routing, an eighth as long: quick."""
    found = made(experts, model.layers, seed=SERVED.index(model))
    return Routed(found.profile, [ids[:512] for ids in found.batches[:2]], found.skew, found.note)


@pytest.fixture(scope="module")
def inference() -> Iterator[Inference]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "TEXTS", 32)
        yield Inference(bed(), START, lina=read_mode(CONF, "lina_paper"), static=read_mode(CONF, "static"), routed=short)


@pytest.mark.full
@pytest.mark.parametrize("experts", [4, 16])
def test_made_routing_has_the_papers_skew_and_paths(experts: int) -> None:
    found = made(experts, 12, seed=0)
    assert found.skew == pytest.approx(SKEWS[experts], rel=0.01)
    assert all(batch.shape == (BATCH_TOKENS, 12, 1) for batch in found.batches)
    again, other = made(experts, 12, seed=0), made(experts, 12, seed=1)
    assert all((a == b).all() for a, b in zip(found.batches, again.batches, strict=True))
    assert any((a != b).any() for a, b in zip(found.batches, other.batches, strict=True))
    served = np.concatenate(found.batches)
    shuffled = np.random.default_rng(0).permuted(served, axis=0)  # as popular, without paths
    more = {4: 1.05, 16: 1.5}[experts]  # among 4 experts the popular one takes nearly half by itself
    assert next_concentration(served, experts, 1) > more * next_concentration(shuffled, experts, 1)
    if experts == 16:
        assert next_concentration(served, 16, 1) == pytest.approx(0.4194, abs=0.05)


def test_concentration_by_hand() -> None:
    ids = np.array([[0, 1], [0, 1], [0, 2], [1, 3], [1, 0]])[:, :, None]
    assert next_concentration(ids, 4, 1) == pytest.approx(3 / 5)
    assert next_concentration(ids, 4, 2) == 1.0


def test_a_trace_is_merged_cut_and_brought_to_the_skew(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids = random.choice(32, (6000, 14, 1), p=np.arange(1, 33) / 528)
    write_trace(tmp_path / "a.npz", traced(ids, 32, sample_lengths_S=np.full(60, 100)))
    found = of_trace(tmp_path / "a.npz", 16, 12)
    assert found.skew == pytest.approx(SKEWS[16], rel=0.02) and found.batches[0].shape == (512, 12, 1)
    with pytest.raises(ValueError, match="14 MoE layers.* have 15"):
        of_trace(tmp_path / "a.npz", 16, 15)
    write_trace(tmp_path / "short.npz", traced(ids[:1000], 32, sample_lengths_S=np.full(10, 100)))
    with pytest.raises(ValueError, match="no two batches"):
        of_trace(tmp_path / "short.npz", 16, 12)


def test_modes_stand_in_their_order(inference: Inference) -> None:
    for model in SERVED:
        by = {mode: inference.replay(model, 16, mode) for mode in (STATIC, IDEAL, LINA, NO_ESTIMATION, NO_PHASE_2)}
        assert by[IDEAL].median_s() < by[STATIC].median_s()
        assert by[IDEAL].median_s() < min(by[mode].median_s() for mode in (LINA, NO_ESTIMATION, NO_PHASE_2))
        assert by[NO_ESTIMATION].median_s() > by[LINA].median_s()  # plans after the router in every layer
        assert by[STATIC].decided == 0 and by[LINA].decided == 2 * (12 - 3)
        assert 0 <= by[LINA].accuracy <= 100
        free = inference.replay(model, 16, FREE)
        assert by[IDEAL].median_s() < free.median_s() < by[LINA].median_s() and free.accuracy == by[LINA].accuracy
        assert by[STATIC].tail_s() >= by[STATIC].median_s()


def test_ideal_is_the_batch_of_even_routing(inference: Inference) -> None:
    """Two ways to the same time: the training side's forward pass, and serving with even choices."""
    for experts in (4, 16):
        even = bed().batch(TXL_12, experts, START)
        found = inference.replay(TXL_12, experts, IDEAL).median_s()
        assert found == pytest.approx(even.step_s, rel=0.03)


def test_an_expert_is_misordered_where_another_stands_in_its_place() -> None:
    def outcome(expected: Sequence[float], actual: Sequence[int]) -> Outcome:
        return Outcome(3, np.array(expected), np.array(actual), np.array([1]), False)

    assert _misplaced(outcome([0.4, 0.3, 0.2, 0.1], [9, 5, 3, 1])) == 0
    assert _misplaced(outcome([0.4, 0.3, 0.2, 0.1], [5, 9, 3, 1])) == 2
    assert _misplaced(outcome([0.1, 0.2, 0.3, 0.4], [9, 5, 3, 1])) == 4


def test_rows_of_inference(inference: Inference) -> None:
    rows = {row.id: row for row in inference.rows()}
    assert {id.split(".")[0] for id in rows} >= {"I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "Tab5", "Tab6"}
    assert sum(id.startswith("Tab5") for id in rows) == 24 and sum(id.startswith("Tab6") for id in rows) == 8
    for model in SERVED:
        gain = inference.replay(model, 16, STATIC).median_s() / inference.replay(model, 16, LINA).median_s()
        assert rows[f"{'I1' if model is TXL_12 else 'I2'}.E16"].simulated == pytest.approx(gain)
        both = [rows[f"Tab5.{model.name}.l3.{name}"].simulated for name in ("phase_2", "accuracy")]
        assert sum(float(v or 0) for v in both) == pytest.approx(100)
        assert rows[f"I9.{model.name}"].simulated == rows[f"Tab5.{model.name}.l3.accuracy"].simulated
    assert rows["I8.plan"].fitted and not rows["I1.E4"].fitted
    assert "made routing" in rows["I1.E4"].note


def test_bad_input_stops_before_the_fit(tmp_path: Path) -> None:
    modes = {"lina": read_mode(CONF, "lina_paper"), "static": read_mode(CONF, "static")}

    def never(what: str) -> None:
        raise AssertionError(what)

    with pytest.raises(ValueError, match="take cluster=lina_testbed"):
        reenact(compose(["cluster=h100_400g"]), **modes, progress=never)
    with pytest.raises(ValueError, match="give two"):
        reenact(base(), **modes, traces=[tmp_path], progress=never)
    with pytest.raises(FileNotFoundError):
        reenact(base(), **modes, traces=[tmp_path / "a.npz", tmp_path / "b.npz"], progress=never)


def test_served_models_have_the_layers_of_the_planner_s_price() -> None:
    assert TXL_12.layers == BERT_LARGE.layers == 12
