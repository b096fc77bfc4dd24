"""Peers: the emulated device that their blocks have, their model's size, what a report makes of figures, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peering.model import Expert, PeerGPT, random_tokens, sizes
from benchmarks.peering.pace import Pace, Paced, at
from benchmarks.peering.report import OURS, closing, draw, rows_of, table
from benchmarks.peering.systems import NOT_RUN, PEERS, variants_of
from benchmarks.peers import main
from megalina.compare.ladder import LADDER
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.model.gpt import GPT

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Moves when somebody sleeps, or works."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_block_hides_what_the_host_did_since_the_last_one_but_not_an_exchange() -> None:
    clock = Clock()
    pace = Pace(clock, clock.sleep)
    clock.sleep(0.3)  # the host
    pace.computed(1.0)
    assert clock.now_s == pytest.approx(1.0)
    clock.sleep(0.5)  # an exchange
    pace.waited()
    pace.computed(1.0)
    assert (clock.now_s, pace.busy_s, pace.overrun_s) == pytest.approx((2.5, 2.0, 0.0))
    clock.sleep(3.0)  # real math that takes longer than the device
    pace.computed(1.0)
    assert (clock.now_s, pace.overrun_s) == pytest.approx((5.5, 2.0))


def test_backward_takes_twice_as_long_and_begins_when_its_gradient_has_arrived() -> None:
    clock = Clock()
    pace = Pace(clock, clock.sleep)
    block = Paced(nn.Linear(2, 2), pace, 1.0, exchanged=True)
    x = torch.ones(1, 2, requires_grad=True)
    moments: list[float] = []
    y = at(block(at(x, backward=lambda: moments.append(clock.now_s))), backward=lambda: clock.sleep(5.0))  # the wire
    assert clock.now_s == 1.0
    y.sum().backward()
    assert moments == [8.0] and pace.busy_s == 3.0 and x.grad is not None


def config_of(name: str) -> PretrainConfig:
    (setting,) = (s for s in LADDER if s.name == name)
    return compose(setting.all_overrides())


@pytest.mark.parametrize("name", ["4x1 light", "4x2 heavy"])
def test_a_peers_model_has_our_dense_parameters(name: str) -> None:
    config = config_of(name)
    model, width = config.model, config.model.d_model

    def mixture(config: PretrainConfig, pace: Pace) -> nn.Module:
        return nn.ModuleDict({"experts": Expert(width, model.d_ff)})

    peer = PeerGPT(config, 320, mixture, Pace())
    ours = GPT(model, config.router, vocab_size=320, max_positions=config.train.seq_len, seed=0)
    dense = sum(p.numel() for n, p in ours.named_parameters() if "experts" not in n and "router" not in n)
    assert sizes(peer, lambda name: ".experts." in name) == (dense, model.num_layers * 2 * width * model.d_ff)


def test_a_peers_model_trains() -> None:
    config = config_of("4x1 light")
    config.cluster = replace(config.cluster, attention_ms=0.0, experts_ms=0.0)
    torch.manual_seed(0)
    gpt = PeerGPT(config, 320, lambda config, pace: Expert(config.model.d_model, config.model.d_ff), Pace())
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
    tokens = random_tokens(config, 320, rank=0, step=0)
    losses = []
    for _ in range(4):
        loss = gpt(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert not torch.equal(tokens, random_tokens(config, 320, rank=1, step=0))


@pytest.mark.parametrize("override", ["model.norm=layernorm", "model.shared_d_ff=64", "train.dtype=bfloat16"])
def test_a_model_that_peers_do_not_have_is_refused(override: str) -> None:
    config = compose([*LADDER[0].all_overrides(), override])
    with pytest.raises(ValueError, match="peers train the ladder's model"):
        PeerGPT(config, 320, lambda config, pace: nn.Identity(), Pace())


# what is made of figures


def of_rank(step_s: list[float], busy_s: float = 0.4) -> dict[str, Any]:
    steps = len(step_s)
    return {
        "step_s": step_s, "busy_s": [busy_s] * steps, "overrun_s": [0.004] * steps, "losses": [6.0, 5.5], "peak_bytes": 2_000_000,
    }  # fmt: skip


def setting() -> dict[str, Any]:
    by_rank = [
        {OURS: of_rank([1.0, 1.0]), "parts": of_rank([1.2, 1.2]), "P, a": of_rank([3.0, 3.0]), "P, b": of_rank([2.0, 2.0])},
        {OURS: of_rank([1.0, 1.1]), "parts": of_rank([1.1, 1.1]), "P, a": of_rank([2.0, 2.0]), "P, b": of_rank([2.2, 2.2])},
    ]
    rows = rows_of(by_rank, {"P": ["P, a", "P, b"]}, {OURS: "", "parts": "FlowMoE"}, slow_motion=2.0)
    return {"name": "4x1 light", "slow_motion": 2.0, "rows": rows, "not_run": {"Q": "it wants a GPU"}}


def test_the_slowest_rank_counts_and_of_variants_the_fastest() -> None:
    rows = setting()["rows"]
    assert list(rows) == [OURS, "parts", "P"]
    assert rows["P"]["median_step_s"] == pytest.approx(1.1) and rows["P"]["tuned"] == "b"  # slow motion 2
    assert rows["P"]["tried_s"] == {"a": pytest.approx(1.5), "b": pytest.approx(1.1)}
    assert rows["P"]["ratio_of_megalina"] == pytest.approx((2.2 + 2.0) / 2) and rows[OURS]["ratio_of_megalina"] == 1
    assert rows["parts"]["re_expression"] == "FlowMoE" and rows["P"]["re_expression"] == ""
    assert rows["P"]["waits_s"] == pytest.approx(1.1 - 0.2) and rows["P"]["overrun_fraction"] == pytest.approx(0.01)


def test_a_table_says_who_was_tuned_how_and_who_could_not_run(tmp_path: Path) -> None:
    text = table(setting())
    assert "2 times in slow motion" in text and "| P (b) | 1100 | 2.10x |" in text
    assert "parts (our list after FlowMoE)" in text and "| Q | not run: it wants a GPU |" in text
    assert closing([setting()]) == "4x1 light, 2 times in slow motion: 2.10x of the best peer, P"
    draw(tmp_path / "peers.png", [setting(), setting(), setting()])
    assert (tmp_path / "peers.png").stat().st_size > 1000


# what is refused


def test_a_peer_without_its_package_or_with_another_gate_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, light = config_of("4x1 fine"), config_of("4x1 light")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [peer.left_out(light) for peer in PEERS] == [f"{peer.packages[0]} isn't installed" for peer in PEERS]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert [peer.left_out(light) for peer in PEERS] == ["", "", ""]
    assert [peer.left_out(fine) for peer in PEERS] == ["", "", "its gate is top-2 alone, not top-6"]
    assert len({title for title, *_ in variants_of(PEERS)}) == 8 and not {peer.name for peer in PEERS} & set(NOT_RUN)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "8x8"], "--only 8x8: the ladder has 4x1 light"),
        (["--speeds", "fast"], "--speeds fast: choose of slow, natural"),
        (["--lists", "eager"], "--lists eager: choose of megalina, pairing"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_tables_and_picture_are_drawn_again_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted((ROOT / "results").glob("peers_*.json"))
    assert main(["--redraw", *map(str, kept), "--picture", str(tmp_path / "again.svg")]) == 0
    out = capsys.readouterr().out
    assert all(f"of the best peer, {name}" in out for name in ("DeepSpeed's layer, DDP", "fairscale's layer, DDP"))
    assert "<svg" in (tmp_path / "again.svg").read_text()
    (tmp_path / "other.json").write_text('{"settings": []}')
    assert main(["--redraw", str(tmp_path / "other.json")]) == 2
    assert "other.json has no settings with rows" in capsys.readouterr().err
