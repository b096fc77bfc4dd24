"""Layers or experts across slow nodes: who competes, what tables say; a tiny run without links."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pipelines import main
from benchmarks.pipelining.cases import CHUNKS, LAYERS, MICRO_BATCHES, NODES, PAIR, SCHEDULES, SETTINGS, base_of, variants_of
from benchmarks.pipelining.cells import walk_s
from benchmarks.pipelining.forecast import forecast_s, with_hosts_s
from benchmarks.pipelining.report import competitors, draw, table
from megalina.blocks.pipelined import pipelined
from megalina.cli.compare import BAD_INPUT, job_of
from megalina.compare.results import as_json
from megalina.plan_settings import plan_of
from tests.benchmarks.test_emulated import FREE
from tests.compare.made import measured


@pytest.mark.full
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_all_take_the_same_steps_of_the_same_model(setting: Any) -> None:
    variants = variants_of(setting)
    job = job_of(setting, list(variants), variants=variants, base=base_of(setting), link_mbit=500)
    assert {(c.train.global_batch_size, c.train.seq_len, c.train.seed) for c in job.configs.values()} == {
        (64 * setting.ranks_per_node, 64 // setting.ranks_per_node, 1234)
    }
    assert len({repr((c.model, c.router, c.data, c.cluster)) for c in job.configs.values()}) == 1
    eager = job.configs["eager whole"]
    assert (eager.parallel.pp, eager.parallel.ep) == (1, setting.world)
    for name in SCHEDULES:
        chunks = CHUNKS[name.removesuffix(PAIR)]
        parallel = job.configs[name].parallel
        assert (parallel.pp, parallel.ep, parallel.pp_chunks) == (NODES, setting.ranks_per_node, chunks)
        found = pipelined(job.configs[name], setting.world)
        assert found.pipeline.micro_batches == MICRO_BATCHES
        assert {len(stage.layers) for stage in found.stages} == {LAYERS // (NODES * chunks)}


def test_cells_alone_take_what_schedules_promise() -> None:
    """In the order of their bubbles: (P-1)(F+B) of 1F1B, half of that interleaved, a sixth of ZB-V, and DualPipe-V a third."""
    setting = replace(SETTINGS[0], slow_motion=1.0)
    variants = variants_of(setting)
    job = job_of(setting, list(variants), variants=variants, base=base_of(setting), link_mbit=500)
    found = {name: walk_s(job.configs[name], link_mbit=0) for name in SCHEDULES}
    of_a_rank_s = 2 * 3 * 1.02 * 0.024
    assert found["1f1b"] == pytest.approx((MICRO_BATCHES + 3) * of_a_rank_s)
    assert found["interleaved"] == pytest.approx((MICRO_BATCHES + 1.5) * of_a_rank_s)
    assert all(found[name] < found["interleaved"] for name in ("zbv", "dualpipev"))  # type: ignore[operator]
    assert found["1f1b, pair"] == pytest.approx(found["1f1b"])  # a pair takes as long as its two cells here


def setting() -> dict[str, Any]:
    found = {
        "eager whole": measured(median_step_s=4.0, ratio_to_eager=1.0),
        "flow": measured(median_step_s=3.0, ratio_to_eager=4 / 3, ratio_spread=(1.2, 1.4)),
        "zbv": measured(
            median_step_s=2.0, ratio_to_eager=2.0, ratio_spread=(1.92, 2.08), messages_exposed_s=0.2, idle_s=0.25, link_s=0.1
        ),
    }
    return as_json("4x1", found, slow_motion=2.0) | {
        "walk_s": {"zbv": 1.9},
        "forecast_s": {"flow": 2.7, "eager whole": 9.0},
        "with_hosts_s": {"zbv": 2.02},
    }


def test_a_table_is_to_the_best_with_experts_across_nodes() -> None:
    text = table(setting())
    assert "| experts across nodes, flow | 3000 | 1.00 | 0.90 - 1.05 |" in text
    assert "| stages across nodes, zbv | 2000 | 1.50 | 1.44 - 1.56 | 250 | 200, 300, 200, 50 | 100 | 1900 (-5.0%)" in text
    assert "| 1900 (-5.0%) |  | 2020 (+1.0%) |" in text
    assert "| 2700 (-10.0%) |" in text
    assert "Median error of 1 forecasts: 10.0%.  Median error of 1 forecasts with hosts: 1.0%." in text
    assert "eager whole" not in text and "| experts across nodes, eager | 4000 | 0.75 |" in text
    assert list(competitors(setting())) == ["flow", "zbv", "eager"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "found.png", [setting()], note="emulated: devices")
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"


def test_a_forecast_is_what_devices_and_links_take() -> None:
    """Eager with experts across nodes, no two things at once: each layer's exchanges wait for nobody but the link.  Of a
    pipeline without exchanges cells and messages."""
    setting = replace(SETTINGS[0], slow_motion=1.0)
    variants = variants_of(setting)
    job = job_of(setting, ["eager", "zbv"], variants=variants, base=base_of(setting), link_mbit=500)
    config = job.configs["eager whole"]
    found = forecast_s(config, plan_of(config.strategy), setting.world)
    micro_batches, sent_bytes = 4, 4 * 64 * 2 * 512 * 4 * 3 / 4  # of a rank: tokens to two experts each, three of four elsewhere
    layer_s = 3 * 1.02 * 0.024 + 4 * sent_bytes / (500e6 / 8)
    assert found == pytest.approx(micro_batches * LAYERS * layer_s, rel=0.05)
    staged = job.configs["zbv"]
    alone_s = walk_s(staged, link_mbit=500)
    assert forecast_s(staged, plan_of(staged.strategy), setting.world) == pytest.approx(alone_s, rel=0.05)


@pytest.mark.full
def test_hosts_that_take_no_time_change_no_forecast() -> None:
    """Of a pipeline, too, where a walk of all micro-batches stands beside one of few; and hosts that take time add it."""
    setting = replace(SETTINGS[0], slow_motion=1.0)
    variants = variants_of(setting)
    job = job_of(setting, ["eager", "1f1b"], variants=variants, base=base_of(setting), link_mbit=500)
    for name in ("eager whole", "1f1b"):
        config = job.configs[name]
        plan = plan_of(config.strategy)
        alone_s = forecast_s(config, plan, setting.world)
        assert with_hosts_s(config, plan, setting, link_mbit=500, host=FREE) == pytest.approx(alone_s, rel=0.02)
        slow = replace(setting, slow_motion=2.0)
        slower = job_of(slow, [name.split()[0]], variants=variants, base=base_of(slow), link_mbit=500)
        twice_s = with_hosts_s(slower.configs[name], plan, slow, link_mbit=slower.link_mbit, host=FREE)
        assert twice_s == pytest.approx(2 * alone_s, rel=0.02)
        late = replace(FREE, collective_s=5e-3, all_to_all_s=5e-3)
        assert with_hosts_s(config, plan, setting, link_mbit=500, host=late) > 1.005 * alone_s


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"settings": []}')
    assert main(["--measured", str(file)]) == BAD_INPUT
    assert capsys.readouterr().err == f"{file} has no overrides: give what this benchmark wrote with --json\n"
    file.write_text('{"settings": [], "overrides": [], "note": ""}')
    assert main(["--measured", str(file), "--host", str(file)]) == BAD_INPUT
    assert capsys.readouterr().err == f"{file} has no host: give what benchmarks/validate_simulator.py wrote with --json\n"


def test_an_unknown_cluster_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "8x1"]) == BAD_INPUT
    assert capsys.readouterr().err == "--only 8x1: there are 4x1, 4x2\n"


@pytest.mark.full
def test_a_tiny_run_on_real_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All competitors on four nodes with links: the same losses, and a pipeline's step is no shorter than its cells."""
    words = ["--only", "4x1", "--rounds", "1", "--slow-motion", "1"]
    tiny = ["model.d_model=64", "train.seq_len=16", "cluster.attention_ms=1", "cluster.experts_ms=1"]
    files = ["--json", str(tmp_path / "found.json"), "--picture", str(tmp_path / "found.png")]
    code = main([*words, *files, *tiny])
    out, err = capsys.readouterr()
    if code == BAD_INPUT:
        pytest.skip(err.strip())  # no root, or namespaces are not permitted
    assert code == 0, err
    (found,) = json.loads((tmp_path / "found.json").read_text())["settings"]
    assert set(competitors(found)) == {"eager", "flow", "pair", *SCHEDULES}
    assert set(found["forecast_s"]) == set(found["strategies"])
    for name, m in found["strategies"].items():
        assert m["largest_loss_difference"] < 1e-4
        if name in SCHEDULES:
            assert m["median_step_s"] > 0.999 * found["walk_s"][name] > 0 and m["messages_exposed_s"] > 0
        else:
            assert m["messages_exposed_s"] == 0
    assert "stages across nodes, dualpipev" in out and (tmp_path / "found.png").exists()
