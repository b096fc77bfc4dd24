"""What is recorded ahead is what an engine asks, router by router; and the lab replays it as the engine would have served it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalina.batch import Batch
from megalina.config import RouterConfig
from megalina.model.routing_recorder import record_routing
from megalina.placement.controller import Policy
from megalina.placement.planners.identity import identity
from megalina.placement.predictors.look_ahead import LookAheadPredictor
from megalina.placement.predictors.predictor import Floats, Seen, choice_counts
from megalina.placement.routing_trace import traced, write_trace
from megalina.placement.split import even
from megalina.placement.triggers import never
from placement_lab.input import NEEDING_AHEAD, lab_of
from placement_lab.replays import Contest
from tests.parallel.ranks import run_on_ranks
from tests.serve.small_engine import EXPERTS, WORDS, small_engine, small_gpt
from tools import popularity_lab
from tools.popularity_lab import BAD_INPUT, asked_of, main

SMALL = ("--batch-tokens", "32", "--devices", "4", "--slots", "3")

MODELS: dict[str, tuple[RouterConfig, dict[str, Any]]] = {
    "plain": (RouterConfig(), {}),
    "every other layer dense": (RouterConfig(), {"num_layers": 6, "moe_every": 2}),
    "sigmoid with a bias, shared experts": (RouterConfig(kind="sigmoid", bias_update_rate=0.1), {"shared_d_ff": 8}),
    "hash": (RouterConfig(kind="hash"), {}),
}


class Listening(LookAheadPredictor):
    """Keeps what it is told."""

    def __init__(self, num_layers: int):
        super().__init__(np.ones((num_layers, EXPERTS)))
        self.heard: dict[int, Floats] = {}

    def features(self, layer: int, seen: Seen) -> Floats:
        if seen.ahead_E is not None:
            self.heard[layer] = seen.ahead_E.copy()
        return super().features(layer, seen)


def padded() -> Batch:
    """Two sequences of 16 tokens, the last of which ends early."""
    token_BS = torch.from_numpy(np.random.default_rng(0).integers(0, WORDS, (2, 16)))
    valid_BS = torch.arange(16) < torch.tensor([[16], [9]])
    position_BS = torch.arange(16).expand(2, -1)
    return Batch(token_BS, token_BS, valid_BS, valid_BS, position_BS, None, torch.arange(2))


def asked_and_recorded() -> dict[str, Any]:
    """Of each model [MoE layer, expert]: rows that the engine was told ahead, those of the trace, and how many ids agree with
    what was chosen."""
    found = {}
    for name, (router, model) in MODELS.items():
        gpt = small_gpt(router, **model)
        if router.kind == "sigmoid":
            for layer in gpt.layers:
                layer.router.bias_E.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
        batch = padded()
        trace = record_routing(gpt, [batch], max_tokens=1000, name=name)
        listening = Listening(len(gpt.moe_layers))
        residents = [identity(np.ones(EXPERTS), 1, EXPERTS)] * len(gpt.moe_layers)
        engine = small_engine(gpt, Policy(listening, None, even, never, looks_ahead=True), residents)
        engine.hidden(batch)
        engine.close()
        assert trace.ahead_ids_TLK is not None
        recorded = [choice_counts(trace.ahead_ids_TLK[:, layer], EXPERTS) for layer in range(trace.num_layers)]
        heard = [listening.heard.get(layer, np.zeros(EXPERTS)) for layer in range(trace.num_layers)]
        same = float((trace.ahead_ids_TLK == trace.expert_ids_TLK)[:, 1:].mean())
        found[name] = (np.array(heard).tolist(), np.array(recorded).tolist(), same)
    return found


def test_the_trace_says_what_the_engine_asks() -> None:
    for name, (heard, recorded, same) in run_on_ranks(1, asked_and_recorded)[0].items():
        assert heard == recorded, name
        assert [sum(of_layer) for of_layer in heard] == [0, *[25 * 2] * (len(heard) - 1)], name  # 16 + 9 tokens, top-2
        assert same == 1 if name == "hash" else 0 < same < 1, name  # fixed by the token, whatever the hidden state


# the lab


def lab_trace(folder: Path, name: str, tokens: int, *, ahead: bool = True, off: int = 0) -> str:
    """8 experts, top-2, 5 layers, samples of 32 tokens; what is said ahead is off by so many experts."""
    random = np.random.default_rng(ord(name[0]))
    score = random.random((tokens, 5, 8)) * np.repeat(random.exponential(size=(tokens // 32, 5, 8)), 32, axis=0)
    ids = np.argsort(-score, axis=2)[..., :2].astype(np.uint8)
    said = (ids + np.uint8(off)) % np.uint8(8)
    said[:, 0] = 8
    trace = traced(ids, 8, sample_lengths_S=np.full(tokens // 32, 32), name=name, ahead_ids_TLK=said if ahead else None)
    write_trace(folder / f"{name}.npz", trace)
    return str(folder / f"{name}.npz")


def distances(train: str, serve: str) -> dict[str, float]:
    """Of each that looks ahead: L1 of shares, in batches of 32 tokens."""
    arguments = ["--train", train, "--serve", serve, *SMALL]
    contest = Contest(lab_of(asked_of(popularity_lab._parser().parse_args(arguments))))
    return {name: contest.row(name, "even")["distance"] for name in NEEDING_AHEAD}


@pytest.mark.full
def test_the_lab_replays_a_look_ahead_and_its_corrections(tmp_path: Path) -> None:
    right, wrong, trained = (lab_trace(tmp_path, n, 320, off=off) for n, off in (("a", 0), ("b", 1), ("c", 0)))
    faulty = lab_trace(tmp_path, "d", 3200, off=1)
    assert distances(trained, right)["look_ahead"] == pytest.approx(0, abs=1e-12)
    seen = distances(faulty, wrong)
    assert seen["look_ahead"] > 0.5  # always off by one expert, as the trace has shown
    assert max(seen["look_ahead_map"], seen["look_ahead_online"]) < 0.2
    new = distances(trained, faulty)
    assert new["look_ahead_map"] > 0.5  # a trace without a fault says nothing of it
    assert new["look_ahead_online"] < 0.7 * new["look_ahead_map"]


def test_the_tool_serves_what_is_said_ahead_in_the_order_of_batches(tmp_path: Path) -> None:
    a, b = (lab_trace(tmp_path, name, 160) for name in "ab")
    arguments = ["--train", a, "--serve", a, b, "--alternate", "--predictors", "oracle,look_ahead", *SMALL]
    assert main([*arguments, "--json", str(tmp_path / "lab.json")]) == 0
    found = json.loads((tmp_path / "lab.json").read_text())
    assert found["skipped_predictors"] == {} and set(found["skipped_modes"]) == {"ideal"}
    assert found["predictors"]["look_ahead"]["p95"] == found["predictors"]["oracle"]["p95"]
    assert found["predictors"]["look_ahead"]["same_list"] == 1 == found["modes"]["lookahead"]["same_list"]


def test_a_trace_that_says_nothing_ahead_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, bare = lab_trace(tmp_path, "a", 160), lab_trace(tmp_path, "bare", 160, ahead=False)
    why = "needs ahead_ids, which traces lack: bare; record them with tools/record_routing.py"
    out = ["--json", str(tmp_path / "lab.json")]
    assert main(["--train", a, "--serve", bare, *SMALL, *out]) == 0
    found = json.loads((tmp_path / "lab.json").read_text())
    assert found["skipped_predictors"] == dict.fromkeys(NEEDING_AHEAD, why) and found["skipped_modes"]["lookahead"] == why
    assert not set(NEEDING_AHEAD) & set(found["predictors"])
    assert f"\n{', '.join(NEEDING_AHEAD)}: not replayed, it {why}\n" in capsys.readouterr().out
    before = (tmp_path / "lab.json").read_bytes()
    assert main(["--train", bare, "--serve", a, *SMALL, "--predictors", "static,look_ahead_map", *out]) == BAD_INPUT
    assert capsys.readouterr() == ("", f"--predictors look_ahead_map {why}, or leave it out\n")
    assert (tmp_path / "lab.json").read_bytes() == before
