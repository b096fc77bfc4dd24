"""The benchmark of LocMoE's routers: who competes can run, what is told is what was found."""

import json
from typing import Any

import pytest

from benchmarks import locmoe
from benchmarks.link_counters import FRAME_BYTES
from benchmarks.locality.cases import FEW, ROUTERS, TRAINED, config_of, words_of
from benchmarks.locality.report import report

PLACE = {"nodes": 2, "ranks_per_node": 2, "experts": 8, "ep": 4, "homes": 2}


@pytest.mark.full
def test_all_compete_with_one_model_one_batch_and_one_capacity() -> None:
    configs = [config_of(words_of(name), data="alike", **PLACE) for name in ROUTERS]
    assert len({repr((c.model, c.train, c.data, c.cluster)) for c in configs}) == 1
    assert {c.router.capacity_factor for c in configs} == {1.25} and {c.router.locality_nodes for c in configs} == {2}
    assert {c.router.locality_loss for c in configs} == {0, 0.01, 0.1, 1} and {*TRAINED} == {*ROUTERS, "switch mu=0.1"}
    assert config_of(words_of("switch mu=0.1"), data="apart", real=True, **PLACE).router.locality_loss == 0.1
    assert {locmoe.PLACED, *locmoe.WIRED} <= {*ROUTERS}


def test_more_nodes_than_experts_have_no_home() -> None:
    few = {"nodes": 4, "ranks_per_node": 1, "experts": 2, "ep": 2}
    for name in FEW:
        config_of(words_of(name), data="alike", homes=0, **few)
    with pytest.raises(
        ValueError, match=r"router.locality_nodes \(4\) is more than model.num_experts \(2\): nodes without an expert"
    ):
        config_of(words_of("locmoe"), data="alike", homes=4, **few)


def of(**more: Any) -> dict[str, Any]:
    both = {"token_bytes_between_nodes": 2**20, "at_home": 0.5, "load_entropy": 0.9, "dropped_fraction": 0.1, "train_loss": 5.0}
    return both | more


def test_tables_say_what_was_found() -> None:
    step = {
        "step_s": 0.4, "step_s_quarters": [0.3, 0.5], "epoch_s": 600.0, "token_bytes_within_nodes": 2**19,
        "link_bytes_a_step": 2**21, "overrun": 0.01,
    }  # fmt: skip
    wire = {
        "counted_bytes": 1000,
        "link_bytes": 1000 + 2 * FRAME_BYTES + 144,
        "link_packets": 2,
        "messages": 1,
        "difference": 0.276,
    }
    text = report(
        {
            "nodes": 2, "ranks_per_node": 2, "link_mbit": 100.0, "data": "apart", "train_steps": 3,
            "timed": {"hash": of(**step, wire=wire), "locmoe": of(**step | {"step_s": 0.2})},
            "trained": {"switch": of(val_loss=4.5, locality_loss=None, placed={"as_they_are": 0.5, "placed": 0.6})},
            "few": {"nodes": 4, "experts": 2, "refused": "refused: so", "timed": {"hash": of(**step)}},
        }
    )  # fmt: skip
    assert "| locmoe | 200 (300 to 500) | 10.0 | 2.00x | 1.00 | 0.50 | 50.0% | 2.00 | 0.900 | 10.0% | 1.0% |" in text
    assert "| hash | 1,000 | 1,276 | +27.600% | 132 of 2 packets | 144, 144 a message |" in text
    assert "| switch | 4.5000 | 5.0000 |  | 1.000 | 50.0% | 0.900 | 10.0% | 50.0% to 60.0% |" in text
    assert "4 nodes and 2 experts: refused: so" in text
    for table in text.split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert locmoe.main(["--parts", "time,lost"]) == 2
    assert capsys.readouterr().err == "--parts time,lost: lost is none of train, time, few\n"
    assert locmoe.main(["--eval-sequences", "20"]) == 2
    assert "ranks evaluate 16 at a time" in capsys.readouterr().err


@pytest.mark.full
def test_some_steps_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert locmoe.main(["--parts", "train", "--data", "alike", "--train-steps", "2", "--eval-sequences", "16"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trained"].keys() == set(TRAINED)
    assert all(of["token_bytes_between_nodes"] > 0 and 3 < of["val_loss"] < 8 for of in found["trained"].values())
    assert "placed" in found["trained"][locmoe.PLACED]
