"""A dense model becomes a mixture of experts whose first loss is the dense model's, and trains on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.batch import Batch
from megalina.checkpoint.files import read_values
from megalina.checkpoint.hugging_face.importing import import_folder
from megalina.checkpoint.inspection import faults
from megalina.checkpoint.loaded_model import load_model
from megalina.checkpoint.stored import read_tensors
from megalina.checkpoint.upcycling import upcycle
from megalina.cli import checkpoint as tool
from tests.checkpoint.hugging_face.plain import tiny

EIGHT = {"num_experts": 8}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny(folder / "hf", "llama")
    import_folder(folder / "hf", folder / "dense")
    return folder / "dense"


def loss_of(path: Path) -> float:
    """Mean, in float64."""
    token_BS = torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(load_model(path, dtype=torch.float64).gpt(Batch.whole(token_BS)).loss) / (3 * 39)


@pytest.mark.parametrize(
    ("model", "router"),
    [
        ({}, {"top_k": 2}),
        ({"dense_layers_first": 1}, {"top_k": 1}),
        ({"moe_every": 2}, {"top_k": 3, "kind": "sigmoid", "bias_update_rate": 0.001}),
        ({}, {"top_k": 2, "renormalize": False, "scale": 4.0}),
        ({}, {"kind": "group_limited", "num_groups": 4, "groups_per_token": 2}),
    ],
)
def test_the_first_loss_is_the_dense_models(dense: Path, tmp_path: Path, model: dict[str, Any], router: dict[str, Any]) -> None:
    target = tmp_path / "moe"
    settings = upcycle(dense, target, model=EIGHT | model, router=router)
    assert abs(loss_of(target) - loss_of(dense)) < 1e-12
    assert faults(target) == [] and read_values(target)["step"] == 0
    tensors, before = read_tensors(target), read_tensors(dense)
    for layer, moe in enumerate(settings.moe):
        if moe:
            for name in ("w1", "w2"):
                mlp = before[f"model/layers.{layer}.mlp.{name}"]
                experts = tensors[f"model/layers.{layer}.experts.{name}"]
                assert len(experts) == 8 and all(torch.equal(expert, mlp.view_as(expert)) for expert in experts)
            assert not tensors[f"model/layers.{layer}.router.weight"].any()


def test_noise_follows_from_the_seed_and_sets_experts_apart(dense: Path, tmp_path: Path) -> None:
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(dense, tmp_path / name, model=EIGHT, router={}, noise=0.01, seed=seed)
        made[name] = read_tensors(tmp_path / name)
    key, router = "model/layers.1.experts.w1", "model/layers.0.router.weight"
    assert all(torch.equal(made["a"][name], made["b"][name]) for name in made["a"])
    assert not torch.equal(made["a"][key], made["c"][key]) and not torch.equal(made["a"][router], made["c"][router])
    mlp = read_tensors(dense)["model/layers.1.mlp.w1"].view(-1, 32)
    relative = made["a"][key] / mlp - 1
    assert relative.std() == pytest.approx(0.01, rel=0.05) and abs(float(relative.mean())) < 0.001
    assert made["a"][router].std() == pytest.approx(0.01 * 0.02, rel=0.2)
    assert 0 < abs(loss_of(tmp_path / "a") - loss_of(dense)) < 0.01


@pytest.mark.parametrize(
    ("model", "router", "problem"),
    [
        (EIGHT, {"renormalize": False}, r"sum to 0\.25 at first .*router\.scale=4"),
        (EIGHT, {"scale": 2.5}, r"sum to 2\.5 at first"),
        (EIGHT, {"kind": "hash"}, "router.kind=hash: upcycling is for topk"),
        (EIGHT | {"d_ff": 24}, {}, "model.d_ff=24, model.dense_d_ff=48: experts"),
        (EIGHT | {"rope_theta": 5.0}, {}, "model.rope_theta=5.0, and the dense model has 10000.0: leave it out"),
        (EIGHT | {"dense_layers_first": 2}, {}, "no layer would be MoE"),
        (EIGHT, {"top_k": 9}, r"router.top_k \(9\) is more than model.num_experts \(8\)"),
    ],
)
def test_what_would_not_be_the_same_model_is_refused(
    dense: Path, tmp_path: Path, model: dict[str, Any], router: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        upcycle(dense, tmp_path / "moe", model=model, router=router)
    assert not list(tmp_path.iterdir())


def test_the_command_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "moe"
    assert tool.main(["upcycle", str(dense), str(target), "model.num_experts=8", "router.top_k=2", "--noise", "0.01"]) == 0
    out = capsys.readouterr().out
    assert "8 experts in 2 of 2 layers" in out and "model.num_experts=8 model.d_ff=48" in out and "train.init_from" in out
    for words, problem in (
        ([str(target), "model.num_experts=8"], "has MoE layers already (2 of 2)"),
        ([str(dense), "model.experts=8"], "experts"),
        ([str(dense), "model.num_experts=eight"], "num_experts"),
        ([str(dense), "train.steps=8"], "train.steps=8 must be model.KEY=VALUE or router.KEY=VALUE"),
    ):
        assert tool.main(["upcycle", words[0], str(tmp_path / "other"), *words[1:]]) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1
