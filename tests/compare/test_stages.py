"""A pipeline among those who compete: the same losses, waits for other stages, bytes on the links, on two ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalina.compare.interleaved import alone, rows_along, run_interleaved
from megalina.compare.report import draw_bars, table, whole
from megalina.compare.results import as_json, bytes_of_links, measure
from megalina.compare.worker import traced
from megalina.config import ClusterConfig, PretrainConfig, StrategyConfig
from megalina.data.source import open_data
from megalina.timeline.recorder import SEND
from tests.parallel.ranks import run_on_ranks
from tests.timeline.made import event
from tests.train.small_run import LENGTH, config_of, write_tokens

DEVICE = ClusterConfig(attention_ms=3.0, experts_ms=4.0)
TURN, LAYERS, SEQUENCES, MICRO_BATCHES = 2, 4, 8, 4
STREAM_BYTES = SEQUENCES // MICRO_BATCHES * LENGTH * 32 * 8  # of a micro-batch, in float64


def configs(folder: Path) -> dict[str, PretrainConfig]:
    config = config_of(folder, "run", num_layers=LAYERS, micro_batch_size=2, dtype="float64", balance_loss=0.0)
    config = replace(config, cluster=DEVICE)
    staged = replace(config, parallel=replace(config.parallel, pp=2, pp_layout="Ett|ttL"))
    in_v = replace(config.parallel, pp=2, pp_chunks=2, pp_layout="Et|t|t|tL")
    v_shaped = replace(config, parallel=in_v, strategy=StrategyConfig(pipeline="zbv"))
    return {"eager": replace(config, parallel=replace(config.parallel, ep=2)), "1f1b": staged, "zbv": v_shaped}


def work(folder: Path) -> dict[str, Any]:
    of = configs(folder)
    first = of["eager"]
    data = open_data(first.data, seq_len=first.train.seq_len, seed=first.train.seed)
    competitors = run_interleaved(of, data, rounds=1, turn=TURN)
    known = alone(competitors)
    found = measure(competitors, known, turn=TURN, ranks_per_node=1, link_mbit=8.0)  # 1 MB/s
    by_name = {c.name: c for c in competitors}
    return {
        "found": found,
        "layouts": list(known),
        "rows": {name: rows_along(c.runner.trainable) for name, c in by_name.items()},
        "sent": {
            name: sum(e.num_bytes for events in c.events for e in events if e.kind == SEND and e.op == "send") // TURN
            for name, c in by_name.items()
        },
        "traced": len(traced(by_name["zbv"], known).by_rank),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stages")
    write_tokens(folder / "tokens")
    return run_on_ranks(2, work, folder)


@pytest.mark.full
def test_stages_learn_what_experts_across_ranks_do(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["found"] == ranks[1]["found"] and ranks[0]["layouts"] == ranks[1]["layouts"]
    for m in ranks[0]["found"].values():
        assert m.largest_loss_difference < 1e-9
    assert len(ranks[0]["layouts"]) == 2  # of both schedules one


@pytest.mark.full
def test_messages_are_told_apart(ranks: list[dict[str, Any]]) -> None:
    found = ranks[0]["found"]
    eager, staged, v_shaped = (found[name] for name in ("eager", "1f1b", "zbv"))
    assert eager.messages_exposed_s == 0 < min(staged.messages_exposed_s, v_shaped.messages_exposed_s)
    assert ranks[0]["sent"] == {"eager": 0, "1f1b": MICRO_BATCHES * STREAM_BYTES, "zbv": 2 * MICRO_BATCHES * STREAM_BYTES}
    words_bytes = 384 * 32 * 8  # the embedding's gradient, summed over the first stage and the last, here and there
    assert staged.link_s == pytest.approx((MICRO_BATCHES * STREAM_BYTES + words_bytes) / 1e6, rel=0.01)  # and what closes a step
    assert v_shaped.link_s == pytest.approx(2 * MICRO_BATCHES * STREAM_BYTES / 1e6, rel=0.02)  # one rank has both
    cells_s = LAYERS // 2 * MICRO_BATCHES * 3 * 1.02 * 7e-3
    assert staged.device_s == pytest.approx(cells_s) == pytest.approx(v_shaped.device_s)
    assert staged.median_step_s > staged.device_s + cells_s / MICRO_BATCHES  # its bubble
    assert 0 < staged.idle_s < staged.median_step_s and staged.critical_path_s == staged.device_s


@pytest.mark.full
def test_the_report_has_a_column_for_them(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    setting = as_json("2x1", ranks[0]["found"])
    assert "waits: tokens, gradients, stages, sizes ms" in table(setting)
    draw_bars(tmp_path / "bars.png", whole([setting], note="emulated"))
    assert ranks[0]["traced"] == 2


def test_a_message_leaves_its_node_once() -> None:
    sent = event("send", "stream", 0, 1, num_bytes=100, op="send", axis="pp0-1")
    received = event("send", "stream", 0, 1, num_bytes=0, op="recv", axis="pp0-1")
    table = {"pp0-1": [[0, 2], [1, 3]]}
    by_rank = [[sent], [sent], [received], [received]]
    apart = bytes_of_links(by_rank, table, ranks_per_node=2, sharded=False)
    assert {node: sum(by_tag.values()) for node, by_tag in apart.items()} == {0: 200, 1: 0}
    together = bytes_of_links(by_rank, table, ranks_per_node=4, sharded=False)
    assert [sum(by_tag.values()) for by_tag in together.values()] == [0]
