"""Code of one's own in a configuration: found, or refused in one line before anything starts."""

from pathlib import Path

import pytest

from megalina.blocks.model import blocks_of, check_layer
from megalina.blocks.moe import RouterLoss
from megalina.blocks.routers import check_router
from megalina.config import ModelConfig, PretrainConfig, RouterConfig
from megalina.reference import is_reference, load
from megalina.validate import check_config


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
        ("own.py", "own.py names no code: write folder/file.py:Name or package.module:Name"),
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
        check_router(RouterConfig(kind="megalina.config:ModelConfig"), 4, 64)
    with pytest.raises(ValueError, match="router.kind is 'top': choose one of topk, sigmoid"):
        check_router(RouterConfig(kind="top"), 4, 64)


LOSS = """
from megalina.blocks.moe import RouterLoss
Own, Same = (RouterLoss("own_loss", 0.1, "nowhere.py:own") for _ in range(2))
Other = 3
"""


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (["own.py:Own", "own.py:Same"], "router.losses are named own_loss, own_loss: each needs a name of its own"),
        (["own.py:Other"], "router.losses: .*own.py:Other is no megalina.blocks.moe.RouterLoss"),
        (["own.py:None"], "own.py has no None"),
    ],
)
def test_losses_are_refused_before_anything_starts(tmp_path: Path, losses: list[str], message: str) -> None:
    (tmp_path / "own.py").write_text(LOSS)
    config = PretrainConfig(router=RouterConfig(losses=[f"{tmp_path}/{loss}" for loss in losses]))
    with pytest.raises(ValueError, match=message):
        check_config(config, 1)


@pytest.mark.parametrize("name", ["z_loss", "aux_loss", "lr"])
def test_a_loss_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="choose a name of its own that ends in _loss"):
        RouterLoss(name, 0.1, "own.py:own")


BLOCK = """
from megalina.blocks.block import Block
from megalina.blocks.block import Loss
class Own(Block):
    name = "own"
    losses = [Loss("own_loss", ("own",), 1.0, "valid_tokens")]
"""


def test_a_block_with_a_loss_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(BLOCK)
    config = PretrainConfig(model=ModelConfig(layer=["attention", f"{tmp_path}/own.py:Own", "ffn"]))
    with pytest.raises(ValueError, match=r"block own declares losses \(own_loss\): auxiliary losses are of routers alone"):
        check_config(config, 1)


@pytest.mark.parametrize("layer", [[], ["attention"], ["ffn", "ffn"], ["attention", "fnn"]])
def test_lists_that_make_no_layer(layer: list[str]) -> None:
    with pytest.raises(ValueError, match="model.layer"):
        check_layer(layer)


ROUTER = """\
from megalina.blocks.routers import RouterKind

class Own(RouterKind):
    functions = "megalina.model.routers:TopK"
    settings = {settings}
"""


def test_settings_that_a_router_of_your_own_lacks_or_invents_are_named(tmp_path: Path) -> None:
    for name, settings in (("none", "()"), ("invented", "('temperature', 'sharpness')")):
        (tmp_path / f"{name}.py").write_text(ROUTER.format(settings=settings))
    none, invented = (RouterConfig(kind=f"{tmp_path}/{name}.py:Own", temperature=0.5) for name in ("none", "invented"))
    with pytest.raises(ValueError, match="router.temperature .* if it does, add temperature to its `settings`"):
        check_router(none, 4, 64)
    with pytest.raises(ValueError, match="declares settings that `router` doesn't have: sharpness; see docs/config.md"):
        check_router(invented, 4, 64)
