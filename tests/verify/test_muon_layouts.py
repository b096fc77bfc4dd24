"""The star test of whole matrices: Muon and QK-clip in every layout are one process's, by hand, matrix after matrix."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from megalina.config import OptimConfig
from megalina.verify.compare import compare
from megalina.verify.layouts import Choices, Row, product
from megalina.verify.on_ranks import Pool
from megalina.verify.recording import Layout
from megalina.verify.reference import record
from megalina.verify.shrink import shrink
from megalina.verify.start import random_batches
from tests.verify.cases import choices_of, config_with
from tests.verify.star import differences

RANKS = 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {},
    "muon, never clipped": {"clip_norm": 0.0, "muon_nesterov": False, "muon_scale": "original"},
    "muon of routers": {"muon_routers": True, "muon_scale": "spectral", "muon_steps": 3},
    "muon_clip": {"name": "muon_clip", "qk_clip_alpha": 0.3},
}
FEW = [
    Row(Layout(4, 2, 1, True, 1, 2, "selective", 0.002, "lina_nopack"), "topk", 0.8, "GPT-2", "muon_clip"),
    Row(Layout(4, 2, 2, False, 0, 4, "none", 0.0, "flow"), "sigmoid", 0.0, "DeepSeek-V3, windows and sinks", "muon_clip"),
    Row(Layout(4, 1, 2, True, 1, 1, "full", 0.0, "eager"), "topk", 0.0, "latent, ahead", "muon_clip"),
    Row(Layout(4, 1, 4, True, 1, 1, "none", 0.0, "lina_zero"), "topk", 0.0, "dropout", "muon of routers"),
    Row(Layout(4, 1, 2, True, 1, 2, "none", 0.0, "eager"), "topk", 0.0, "plain", "muon"),
    Row(Layout(4, 4, 1, True, 1, 4, "full", 0.0, "serial"), "topk", 0.0, "modern", "muon, never clipped"),
]


def optim_of(name: str) -> OptimConfig:
    optim = OptimConfig(**({"name": "muon", "lr": 1e-2} | OPTIMIZERS[name]))
    return shrink(replace(config_with(), optim=optim), RANKS).optim


def muon_choices(*, after: int) -> Choices:
    """`after`: of `strategy.newton_schulz_after`."""
    choices = choices_of(RANKS)
    strategies = {name: replace(of, newton_schulz_after=after) for name, of in choices.strategies.items()}
    latent = config_with(ranks=RANKS, model="DeepSeek-V3, windows and sinks").model
    latent = replace(latent, num_layers=1, mtp_layers=2, mtp_loss=0.3)
    models = {**choices.models, "latent, ahead": latent}
    return replace(choices, strategies=strategies, models=models, optimizers={name: optim_of(name) for name in OPTIMIZERS})


def test_whole_matrices_in_few_layouts_equal_one_process() -> None:
    """Under tokens; at the end they are in rows of `test_plants.py`, too."""
    assert differences(muon_choices(after=1), FEW[:3], steps=2) == []


@pytest.mark.full
def test_whole_matrices_at_the_end_equal_one_process() -> None:
    assert differences(muon_choices(after=0), FEW, steps=2) == []


@pytest.mark.full
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_whole_matrices_in_every_layout_equal_one_process(world: int, after: int) -> None:
    choices = muon_choices(after=after)
    rows = [row for row in product(choices, RANKS, ("place", "zero", "optimizer")) if row.layout.world == world]
    assert len(rows) >= {1: 10, 2: 45, 4: 100}[world]  # QK-clip has no rows of models whose heads are normed or latent
    assert differences(choices, rows, steps=2) == []


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool


@pytest.mark.full
def test_by_blocks_the_matrices_that_tp_cuts_differ_and_nothing_else(pool: Pool) -> None:
    config = replace(config_with(), optim=replace(optim_of("muon"), muon_tp="blocks"))
    batches = random_batches(config, 1)
    reference = record(config, batches)
    assert compare(reference, pool.record(config, Layout(2, 1, 2, zero=1), batches)).differences == []
    found = {d.name for d in compare(reference, pool.record(config, Layout(2, 2, 1), batches)).differences}
    assert found == {f"layers.{i}.attention.{name}" for i in range(config.model.num_layers) for name in ("q", "k", "v", "proj")}
