"""Code of one's own in a configuration: found, or refused in one line before anything starts."""

from pathlib import Path

import pytest

from megalina.blocks.model import blocks_of, check_layer
from megalina.blocks.reference import is_reference, load
from megalina.blocks.routers import check_router
from megalina.config import ModelConfig, RouterConfig


def test_a_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("class Own:\n    pass\n")
    reference = f"{tmp_path}/own.py:Own"
    assert is_reference(reference) and not is_reference("attention")
    assert load(reference) is load(reference) and load(reference).__name__ == "Own"
    assert load("megalina.blocks.mlp:DenseMlp").__name__ == "DenseMlp"


def test_a_file_that_fails_may_be_mended_and_read_again(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("raise RuntimeError('not yet')\n")
    with pytest.raises(RuntimeError, match="not yet"):
        load(f"{own}:Own")
    own.write_text("Own = 3\n\n\n")
    assert load(f"{own}:Own") == 3


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere.py:Own", "nowhere.py: there is no such file"),
        ("no.such.module:Own", "no.such.module:Own: No module named 'no'"),
        ("megalina.blocks.mlp:Own", "megalina.blocks.mlp has no Own"),
    ],
)
def test_references_that_lead_nowhere(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(reference)


def test_a_class_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is no block: derive it from megalina\.blocks\.block\.Block"):
        blocks_of(ModelConfig(layer=["attention", "megalina.config:ModelConfig", "ffn"]), RouterConfig(), vocab_size=10)
    with pytest.raises(ValueError, match=r"is no RouterKind: derive it from megalina\.blocks\.routers\.RouterKind"):
        check_router(RouterConfig(kind="megalina.config:ModelConfig"), 4)
    with pytest.raises(ValueError, match="router.kind is 'top': choose one of topk, sigmoid"):
        check_router(RouterConfig(kind="top"), 4)


@pytest.mark.parametrize("layer", [[], ["attention"], ["ffn", "ffn"], ["attention", "fnn"]])
def test_lists_that_make_no_layer(layer: list[str]) -> None:
    with pytest.raises(ValueError, match="model.layer"):
        check_layer(layer)
