"""Training begins with the weights of an imported model, in any layout; of another model it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.files import read_values
from megalina.checkpoint.hugging_face.importing import import_folder
from megalina.checkpoint.stored import read_tensors
from megalina.checkpoint.upcycling import upcycle
from megalina.config import ModelConfig, PretrainConfig, RouterConfig
from megalina.train.resume import check_settings, check_start
from tests.checkpoint.hugging_face.plain import tiny
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import VOCABULARY, config_of, records_of, start, weights_of, write_tokens

LAYOUTS: dict[str, dict[str, Any]] = {
    "two ep": {"ep": 2},
    "two tp, two ep, ZeRO-1": {"tp": 2, "ep": 2, "zero": 1, "micro_batch_size": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_tokens(path / "tokens")
    tiny(path / "hf", "mixtral", vocab_size=VOCABULARY)
    import_folder(path / "hf", path / "mixtral")
    tiny(path / "dense hf", "llama", vocab_size=VOCABULARY)
    import_folder(path / "dense hf", path / "dense")
    upcycle(path / "dense", path / "upcycled", model={"num_experts": 4}, router={"top_k": 2})
    return path


def run_of(folder: Path, name: str, checkpoint: str, **settings: Any) -> PretrainConfig:
    """Of the checkpoint's own model and router."""
    config = config_of(folder, name, init_from=str(folder / checkpoint), dtype="float64", steps=3, clip_norm=0.0, **settings)
    saved = read_values(folder / checkpoint)["config"]
    config.model, config.router = ModelConfig(**saved["model"]), RouterConfig(**saved["router"])
    return config


@pytest.mark.parametrize("checkpoint", ["mixtral", "upcycled"])
def test_a_run_starts_with_these_weights_and_a_fresh_optimizer(folder: Path, checkpoint: str) -> None:
    config = run_of(folder, f"starts {checkpoint}", checkpoint)
    check_settings(config)
    check_start(config, vocab_size=VOCABULARY)
    run = start(config)
    there = read_tensors(folder / checkpoint)
    for name, weight in weights_of(run).items():
        wanted = there[f"model/{name}"].double()
        assert torch.equal(weight.view(-1)[: wanted.numel()], wanted.view(-1)), name  # behind it padding of the vocabulary
    assert run.state.step == run.built.optimizer.step_count == 0
    run.loop()


@pytest.mark.parametrize(
    ("group", "setting", "value", "problem"),
    [
        ("model", "rope_theta", 1e4, "model.rope_theta 1e.06 -> 10000: set back"),
        ("model", "norm_eps", 1e-6, "model.norm_eps 1e-05 -> 1e-06"),
        ("model", "num_heads", 8, r"another model: model.num_heads 4 -> 8"),
        ("router", "renormalize", False, "router.renormalize true -> false"),
        ("router", "top_k", 1, "router.top_k 2 -> 1"),
        ("model", "d_ff", 24, "model.d_ff 48 -> 24"),
        ("model", "num_experts", 8, "model.num_experts 4 -> 8"),
    ],
)
def test_another_model_is_refused_with_both_numbers(folder: Path, group: str, setting: str, value: Any, problem: str) -> None:
    config = run_of(folder, "refused", "mixtral")
    setattr(getattr(config, group), setting, value)
    for check in (lambda: check_settings(config), lambda: check_start(config, vocab_size=VOCABULARY)):
        with pytest.raises(ValueError, match=problem):
            check()
    if setting in ("rope_theta", "norm_eps", "renormalize", "top_k"):  # the same tensors: whoever means it says so
        config.train.allow_changes = True
        check_start(config, vocab_size=VOCABULARY)
        start(config)


def test_another_vocabulary_is_refused_with_both_numbers(folder: Path) -> None:
    config = run_of(folder, "words", "mixtral")
    config.model.vocab_size = 0
    with pytest.raises(ValueError, match="a vocabulary of 300 there and of 512 here"):
        check_start(config, vocab_size=512)


def losses(folder: Path, name: str, checkpoint: str, layout: dict[str, Any]) -> list[float]:
    found: list[float] = records_of(run_of(folder, name, checkpoint, **layout)).of("loss")
    return found


@pytest.mark.full
@pytest.mark.parametrize("checkpoint", ["mixtral", "upcycled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_with_the_same_model(folder: Path, checkpoint: str, layout: str) -> None:
    one = losses(folder, f"{checkpoint} one {layout}", checkpoint, {})
    ranks = 4 if "tp" in LAYOUTS[layout] else 2
    for found in run_on_ranks(ranks, losses, folder, f"{checkpoint} {layout}", checkpoint, LAYOUTS[layout]):
        assert found == pytest.approx(one, rel=1e-11)
