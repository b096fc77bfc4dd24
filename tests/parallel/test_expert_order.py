"""Experts in an order of their own on the ranks: the numbers are one process's, checkpoints are whole, bytes are fewer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalina.batch import Batch
from megalina.checkpoint.files import read_values
from megalina.checkpoint.stored import read_tensors
from megalina.config import PretrainConfig
from megalina.mesh import build_mesh
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.model.routing_recorder import record_routing
from megalina.parallel.trainable import Trainable
from megalina.placement.expert_order import ExpertOrders, counts_of, local_share, read_orders, write_orders
from megalina.placement.routing_trace import read_trace, traced, write_trace
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.validate import check_orders, check_paths
from megalina.verify.compare import compare
from megalina.verify.on_ranks import Pool
from megalina.verify.recording import Layout
from megalina.verify.reference import record
from megalina.verify.start import random_batches
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import LENGTH, VOCABULARY, checkpoint, config_of, records_of, write_tokens
from tests.verify.cases import config_with, strategy
from tools import place_experts

ORDERS = {0: (2, 0, 3, 1), 1: (3, 2, 1, 0)}
LAYOUTS = [
    Layout(2, ep=2, micro_batch=2),
    Layout(4, ep=4, zero=1, micro_batch=1, strategy="lina_nopack", piece_mb=0.002),
    Layout(4, tp=2, ep=2, micro_batch=2, recompute="full"),
    Layout(4, ep=2, zero=1, micro_batch=2, strategy="flow"),
]


def placed(folder: Path, config: PretrainConfig) -> PretrainConfig:
    path = folder / "experts.json"
    write_orders(path, ExpertOrders(4, 2, ORDERS))
    return replace(config, parallel=replace(config.parallel, placement=str(path)))


@pytest.mark.parametrize(
    ("router", "layouts"),
    [("topk", LAYOUTS[1:2]), *(pytest.param(r, LAYOUTS, marks=pytest.mark.full) for r in ("topk", "group limited"))],
)
def test_every_layout_equals_one_process(tmp_path: Path, router: str, layouts: list[Layout]) -> None:
    config = config_with(router=router, model="GPT-2" if router == "topk" else "plain")
    config = replace(config, model=replace(config.model, moe_every=1))
    batches = random_batches(config, 2)
    reference = record(config, batches)
    with Pool() as pool:
        for layout in layouts:
            own = placed(tmp_path, replace(config, strategy=strategy(layout.strategy)))
            found = compare(reference, pool.record(own, layout, batches))
            assert found.first is None, (layout, found.first)


# runs


def run(
    folder: Path, name: str, settings: dict[str, Any], start: str = "", step: int = 0, packing: str = "1"
) -> list[dict[str, Any]]:
    config = config_of(folder, name, **({"dtype": "float64", "steps": 4, "interval": 2} | settings))
    config = replace(config, strategy=replace(config.strategy, packing=packing))
    return records_of(config, checkpoint(config_of(folder, start), step) if start else None).records


@pytest.mark.full
def test_a_checkpoint_is_in_the_models_order(tmp_path: Path) -> None:
    """What one layout has written with an order, another goes on from without, or with another order."""
    write_tokens(tmp_path / "tokens")
    write_orders(tmp_path / "experts.json", ExpertOrders(4, 2, ORDERS))
    order = {"placement": str(tmp_path / "experts.json")}
    (plain, *_) = run_on_ranks(2, run, tmp_path, "plain", {"ep": 2})
    (ordered, *_) = run_on_ranks(2, run, tmp_path, "ordered", {"ep": 2} | order)
    (zero, *_) = run_on_ranks(2, run, tmp_path, "zero", {"ep": 2, "zero": 1} | order, "plain", 2)
    (one,) = run_on_ranks(1, run, tmp_path, "one", {"steps": 6}, "zero", 4)
    (longer, *_) = run_on_ranks(2, run, tmp_path, "longer", {"ep": 2, "steps": 6}, "plain", 4)
    for key in ("loss", "aux_loss", "grad_norm"):
        assert [r[key] for r in ordered] == pytest.approx([r[key] for r in plain], rel=1e-12)
    assert [r["loss"] for r in zero] == pytest.approx([r["loss"] for r in plain[2:]], rel=1e-12)
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in longer], rel=1e-12)
    points = {name: checkpoint(config_of(tmp_path, name), 4) for name in ("plain", "ordered", "zero")}
    for name in ("ordered", "zero"):
        assert _differing(points[name], points["plain"]) == []
    routings = [[line["routing"] for line in read_values(points[name])["ledger"]] for name in ("plain", "ordered")]
    assert routings[0] == routings[1] and len(routings[0]) == 4  # decisions are by experts, not by places


@pytest.mark.full
def test_packed_experts_keep_the_order(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    write_orders(tmp_path / "experts.json", ExpertOrders(4, 2, ORDERS))
    (plain, *_) = run_on_ranks(4, run, tmp_path, "plain", {"ep": 4})
    (packed, *_) = run_on_ranks(4, run, tmp_path, "packed", {"ep": 4, "placement": str(tmp_path / "experts.json")}, "", 0, "2")
    assert [r["loss"] for r in packed] == pytest.approx([r["loss"] for r in plain], rel=1e-12)
    points = [checkpoint(config_of(tmp_path, name), 4) for name in ("plain", "packed")]
    assert _differing(*points) == []


def _differing(a: Path, b: Path) -> list[str]:
    first, second = read_tensors(a), read_tensors(b)
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.allclose(value, second[name], rtol=1e-10, atol=1e-13)]


# bytes


def text_of(sample: int) -> torch.Tensor:
    """Three words; sequences of odd and even numbers have none in common."""
    random = torch.Generator().manual_seed(sample)
    return torch.randint(0, 3, (LENGTH + 1,), generator=random) * 2 + sample % 2


def batch_of(samples: Sequence[int]) -> Batch:
    tokens, every = torch.stack([text_of(s) for s in samples]), torch.ones(len(samples), LENGTH, dtype=torch.bool)
    position = torch.arange(LENGTH).repeat(len(samples), 1)
    return Batch(tokens[:, :-1], tokens[:, 1:], every, every, position, None, torch.tensor(samples))


def stepped(config: PretrainConfig) -> tuple[float, int, int]:
    """Loss, bytes between nodes and within them, of a step of 8 sequences that are at home on two nodes of two ranks."""
    mesh = build_mesh(ep=4)
    trainable = Trainable(
        config, mesh, vocab_size=VOCABULARY, device=torch.device("cpu"), wish_to_stop=lambda: False, ranks_per_node=2
    )
    node, place = divmod(mesh.world.rank, 2)
    update = BucketOptimizer(config.optim, trainable.buckets).update
    result = trainable.step(batch_of([node + 2 * (2 * place + i) for i in range(2)]), update)
    trainable.close()
    return result.loss, result.token_bytes_between_nodes, result.token_bytes_within_nodes


def test_bytes_between_nodes_are_as_many_fewer_as_the_profile_says(tmp_path: Path) -> None:
    base = config_of(
        tmp_path,
        "run",
        dtype="float64",
        ep=4,
        kind="hash",
        top_k=1,
        balance_loss=0.0,
        z_loss=0.0,
        num_experts=8,
        global_batch_size=8,
    )
    gpt = GPT(base.model, base.router, vocab_size=VOCABULARY, max_positions=LENGTH, seed=0)
    initialize(gpt, seed=0, dtype=torch.float64)
    write_trace(tmp_path / "routing.npz", record_routing(gpt, [batch_of(list(range(8)))], max_tokens=1000, name="text"))
    trace = read_trace(tmp_path / "routing.npz")
    out = tmp_path / "experts.json"
    assert place_experts.main([str(tmp_path / "routing.npz"), "--nodes", "2", "--ranks-per-node", "2", "--out", str(out)]) == 0
    orders, found = read_orders(out), {}
    for name, config in {"before": base, "after": replace(base, parallel=replace(base.parallel, placement=str(out)))}.items():
        check_paths(config)
        found[name], *_ = run_on_ranks(4, stepped, config)
    assert found["after"][0] == pytest.approx(found["before"][0], rel=1e-13)
    count_LNE = counts_of(trace, 2)
    row_bytes = 4 * base.model.d_model * 8  # there and back, forward and backward
    for name, of in (("before", {i: tuple(range(8)) for i in orders.layers}), ("after", orders.layers)):
        layers = zip(trace.layers, count_LNE, strict=True)
        away = sum(count_NE.sum() * (1 - local_share(count_NE, of[i])) for i, count_NE in layers)
        assert found[name][1] == pytest.approx(away * row_bytes)
    assert found["after"][1] < 0.8 * found["before"][1]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = placed(tmp_path, config_of(tmp_path, "run", ep=2, dtype="float64"))
    path = config.parallel.placement
    check_orders(config, read_orders(Path(path)))
    for changed, message in (
        (replace(config, parallel=replace(config.parallel, ep=1)), "does nothing with parallel.ep=1"),
        (replace(config, model=replace(config.model, num_experts=8)), r"of 4 experts in layers \[0, 1\], and the model has 8"),
        (replace(config, model=replace(config.model, moe_every=2)), r"the model has 4 in layers \[1\]"),
        (
            replace(config, router=replace(config.router, locality_loss=0.1, locality_nodes=2)),
            "moves experts to other nodes, and router.locality_loss=0.1 keeps tokens with those whose numbers say",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_orders(changed, read_orders(Path(path)))


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, "run", ep=2, placement="nowhere.json")
    with pytest.raises(ValueError, match="parallel.placement=nowhere.json: nowhere.json can't be read: No such file"):
        check_paths(config)
    arguments = [str(tmp_path / "none.npz"), "--nodes", "2", "--out", str(tmp_path / "experts.json")]
    assert place_experts.main(arguments) == 2
    write_trace(tmp_path / "none.npz", traced(np.zeros((4, 2, 1), dtype=np.int64), 4))
    assert place_experts.main(arguments) == 2
    missing, unnumbered = capsys.readouterr().err.splitlines()
    assert missing.startswith("error: ") and "No such file" in missing
    assert "has no numbers of its sequences" in unnumbered and not (tmp_path / "experts.json").exists()
