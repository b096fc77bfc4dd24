"""Sparse inference of densely trained experts: layer by hand, engines against the plain model, one checkpoint by every rule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalina.blocks.selection import Selection, selection_of
from megalina.config import InferConfig, ModelConfig, RouterConfig
from megalina.evaluate.worker import Evaluation, evaluate
from megalina.generate import Sampling, generate
from megalina.mesh import build_mesh
from megalina.model.block_functions import Seen
from megalina.placement.controller import Policy
from megalina.placement.planners.identity import identity
from megalina.placement.split import load_aware
from megalina.placement.triggers import never
from megalina.serve.engine import Engine
from megalina.serve.expert_memory import check_rows
from megalina.serve.policies import Served
from tests.model.test_all_experts import plain_sum
from tests.model.test_experts import HIDDEN
from tests.parallel.ranks import run_on_ranks
from tests.serve.small_engine import EXPERTS, batch_of, random_placement, shared, small_gpt, tokens_of
from tests.train.small_run import config_of, records_of, write_tokens

DENSE = RouterConfig(kind="dense", balance_loss=0.0, renormalize=False, top_k=2)
RULES = [
    None,
    Selection("top_k", k=2),
    Selection("top_k", k=EXPERTS),
    Selection("threshold", threshold=0.7),
    Selection("threshold", threshold=0.0),
    Selection("threshold_top_k", threshold=0.7),
]


def mask_of(rule: Selection | None, prob_TE: torch.Tensor) -> torch.Tensor:
    """Which experts a token uses, written out."""
    out = torch.ones_like(prob_TE)
    if rule is None:
        return out
    above_TE = EXPERTS * prob_TE > rule.threshold
    k = int(above_TE.sum(1).double().mean() + 0.5) if rule.rule == "threshold_top_k" else rule.k
    for t, row in enumerate(prob_TE):
        best = row.argsort(descending=True)
        kept = max(1, int(above_TE[t].sum())) if rule.rule == "threshold" else k
        out[t, best[kept:]] = 0
    return out


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("model", [{}, {"shared_d_ff": 8, "bias": True, "activation": "gelu"}], ids=["plain", "shared, biases"])
def test_a_layer_is_the_sum_of_the_experts_that_are_used(rule: Selection | None, model: dict[str, Any]) -> None:
    gpt = small_gpt(DENSE, d_ff=HIDDEN, **model)
    gpt.select(rule)
    layer, batch = gpt.layers[1], batch_of(tokens_of(0))
    h_TD = torch.randn(48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        n_TD, logits_TE = layer.moe.scores(h_TD)
        prob_TE = logits_TE.softmax(1)
        e = layer.experts
        biases = [b for b in (e.b1, e.b2) if b is not None]
        weight_TE = prob_TE * mask_of(rule, prob_TE)
        want = h_TD + plain_sum(n_TD, weight_TE, e.w1, e.w2, *biases, activation=e.activation)
        want = want if layer.shared is None else want + layer.moe.shared(n_TD)
        torch.testing.assert_close(layer.moe.forward(h_TD, batch, Seen()), want)


def engine_of(gpt: Any, rule: Selection | None, seed: int = 0) -> Engine:
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh, slots = build_mesh(ep=world), -(-2 * EXPERTS // world)
    random = np.random.default_rng(seed)
    residents = [random_placement(random, world, slots) if world > 1 else identity(np.ones(EXPERTS), 1, slots)] * len(
        gpt.moe_layers
    )
    return Engine(gpt, shared(gpt, mesh), mesh, Policy(None, None, load_aware, never), residents, selection=rule)


def differences(rules: list[Selection | None]) -> dict[str, float]:
    """Of each engine to the plain model with the same selection; the engines take turns with one model."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    gpt, batch = small_gpt(DENSE), batch_of(tokens_of(rank))
    engines = {str(rule): engine_of(gpt, rule) for rule in rules}
    out = {}
    for rule in rules:
        found = engines[str(rule)].hidden(batch)
        gpt.select(rule)
        with torch.inference_mode():
            want = gpt.hidden(batch)[0]
        out[str(rule)] = float((found - want).abs().max() / want.abs().max())
    for engine in engines.values():
        engine.close()
    return out


def test_engines_of_several_rules_take_turns_with_one_model() -> None:
    assert max(differences(RULES).values()) < 1e-12


@pytest.mark.full
def test_replicas_on_four_ranks_change_no_answer() -> None:
    for of_rank in run_on_ranks(4, differences, RULES):
        assert max(of_rank.values()) < 1e-12


def test_all_experts_by_any_rule_write_the_dense_model_s_text() -> None:
    gpt, sampling = small_gpt(DENSE), Sampling(max_tokens=12, max_positions=48, temperature=0.0)
    texts = {}
    for rule in (None, Selection("top_k", k=EXPERTS), Selection("threshold", threshold=0.0), Selection("top_k", k=1)):
        gpt.select(rule)
        texts[rule] = list(generate(gpt, [3, 1, 4], sampling))
    dense, every, above, one = texts.values()
    assert dense == every == above != one


def test_a_router_that_selects_by_itself_is_not_told() -> None:
    with pytest.raises(ValueError, match="router=topk selects by itself"):
        small_gpt().select(Selection("top_k", k=1))


@pytest.mark.parametrize(
    ("infer", "said"),
    [
        ({"select": "best"}, "infer.select is 'best': choose one of none, dense, top_k, threshold, threshold_top_k"),
        ({"select": "top_k", "select_k": 7}, "infer.select_k=7: choose 1 to 6 experts, or 0 for router.top_k"),
        ({"select": "threshold", "select_k": 2}, "does nothing with infer.select=threshold, only with top_k"),
        ({"select": "top_k", "select_threshold": 0.4}, "does nothing with infer.select=top_k, only with threshold"),
        ({"select": "threshold", "select_threshold": 6.0}, "must be from 0 to below 6 experts"),
        ({"select": "threshold_top_k", "batch_invariant": True}, "choose infer.select=threshold or top_k"),
    ],
)
def test_what_can_not_be_selected_is_refused(infer: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        selection_of(InferConfig(**infer), DENSE, EXPERTS)


def test_a_model_that_was_trained_sparse_is_refused() -> None:
    with pytest.raises(ValueError, match="trained with router=dense, and this one has router=topk"):
        selection_of(InferConfig(select="top_k"), RouterConfig(), EXPERTS)


def test_rows_that_do_not_fit_are_refused_with_what_to_change() -> None:
    model, dense, few = ModelConfig(d_model=64), Served(8, 8, 4), Served(8, 2, 4)
    needed = 4 * 1000 * 8 * 4 * 64 * 4  # ranks, tokens, experts, copies of a row, numbers, bytes
    check_rows(dense, model, tokens=1000, local_ranks=4, free_bytes=None)
    check_rows(dense, model, tokens=1000, local_ranks=4, free_bytes=2 * needed)
    check_rows(few, model, tokens=1000, local_ranks=4, free_bytes=needed // 2)
    with pytest.raises(ValueError, match="go to 8 of 8 experts: their rows take 0.03 GB, .*infer.select=top_k"):
        check_rows(dense, model, tokens=1000, local_ranks=4, free_bytes=needed // 2)


@pytest.mark.full
def test_one_checkpoint_is_judged_dense_and_by_every_rule(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    config = config_of(tmp_path, "run", steps=2, d_model=32, num_experts=4)
    router = RouterConfig(kind="dense", balance_loss=0.0, renormalize=False, mutual_information_loss=0.001)
    records = records_of(replace(config, router=router))
    checkpoint = str(next((tmp_path / "run" / "checkpoints").iterdir()))
    found = {}
    for infer in (
        InferConfig(),
        InferConfig(select="top_k", select_k=1),
        InferConfig(select="top_k", select_k=4),
        InferConfig(select="threshold", select_threshold=1.05),
        InferConfig(select="threshold_top_k", select_threshold=0.9),
    ):
        found[infer.select, infer.select_k] = evaluate(
            Evaluation(checkpoint, {"static": infer}, batches=1, sequences=2, length=0, decode=2)
        )["modes"]["static"]
    used = {key: mode["active_fraction"] for key, mode in found.items()}
    assert (used["none", 0], used["top_k", 1], used["top_k", 4]) == (1, 0.25, 1)
    assert 0.25 <= used["threshold", 0] < 1
    assert (4 * 2 * used["threshold_top_k", 0]).is_integer()  # as many for all tokens in each of two layers
    assert found["none", 0]["loss"] == pytest.approx(records.records[-1]["val_loss"], rel=1e-5)
    assert found["top_k", 4]["loss"] == pytest.approx(found["none", 0]["loss"], rel=1e-6)
    assert found["top_k", 1]["loss"] != pytest.approx(found["none", 0]["loss"], rel=1e-6)
