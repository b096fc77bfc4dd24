"""The profile of a checkpoint: found, or missing, or refused in one line; a checkpoint with one is as whole as before."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megalina.checkpoint.checksums import sum_of, write_sums
from megalina.checkpoint.profile import PROFILE, find_profile
from megalina.config import ModelConfig, RouterConfig
from megalina.placement.routing_trace import traced, write_trace


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint's description, without tensors."""
    path = tmp_path / "step_00000020"
    path.mkdir()
    config = {"model": asdict(ModelConfig(num_layers=4, moe_every=2)), "router": asdict(RouterConfig())}
    (path / ".metadata").touch()
    (path / "values.json").write_text(json.dumps({"values": {"step": 20, "config": config}, "tensors": {}}))
    write_sums(path, {p.name: sum_of(p) for p in list(path.iterdir())})
    return path


def write(path: Path, *, experts: int = 4, top_k: int = 2, layers: tuple[int, ...] = (1, 3)) -> None:
    ids = (np.arange(6)[:, None, None] + np.arange(len(layers))[:, None] + np.arange(top_k)) % experts
    write_trace(path / PROFILE, traced(ids.astype(np.uint8), experts, layers=layers, name="six"))


def test_a_profile_is_found_where_there_is_one(checkpoint: Path) -> None:
    assert find_profile(checkpoint) is None
    write(checkpoint)
    found = find_profile(checkpoint)
    assert found is not None and (found.name, found.num_tokens, found.layers) == ("six", 6, (1, 3))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"experts": 8}, "experts: 8 there, 4 in the model"),
        ({"top_k": 1}, "choices a token: 1 there, 2 in the model"),
        ({"layers": (0, 3)}, r"MoE layers: \[0, 3\] there, \[1, 3\] in the model"),
    ],
)
def test_a_profile_of_another_model_is_refused(checkpoint: Path, wrong: dict, problem: str) -> None:
    write(checkpoint, **wrong)
    with pytest.raises(ValueError, match=rf"routing.npz is the profile of another model \({problem}\): remove it") as raised:
        find_profile(checkpoint)
    assert "\n" not in str(raised.value)


def test_what_is_no_profile_or_no_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    write(checkpoint)
    whole = (checkpoint / PROFILE).read_bytes()
    (checkpoint / PROFILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"step_00000020/routing.npz is no routing trace, or damaged"):
        find_profile(checkpoint)
    (checkpoint / PROFILE).unlink()
    (checkpoint / PROFILE).mkdir()
    with pytest.raises(ValueError, match=r"routing.npz can't be read: Is a directory"):
        find_profile(checkpoint)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        find_profile(tmp_path / "none")
