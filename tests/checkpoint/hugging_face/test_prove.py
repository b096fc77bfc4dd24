"""The proof: models that transformers itself has written are the same here, and come back; what is planted is found."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.hugging_face import peer
from megalina.checkpoint.hugging_face.proof import Proof, gradient_difference, prove
from megalina.cli import checkpoint as tool
from megalina.families.family import Family
from megalina.families.links import Link, View
from megalina.families.mixtral import Mixtral
from megalina.families.qwen3_moe import Qwen3Moe
from tests.checkpoint.hugging_face.plain import CONFIGS, config_of, tiny

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers isn't installed")


def written_by_transformers(folder: Path, kind: str, config: dict[str, Any] | None = None, *, seed: int = 0) -> None:
    """A tiny model with random norms, biases and buffers, too, and a router whose scores lie apart."""
    import transformers

    fields = {key: value for key, value in (config or config_of(kind)).items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(kind, **fields)
    random = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            values = torch.randn(tensor.shape, generator=random)
            scale = 0.1 if tensor.dim() == 1 else (3.0 if name.endswith("gate.weight") else 0.5) / tensor.shape[-1] ** 0.5
            tensor.copy_(values * scale + ("norm" in name))
    model.save_pretrained(folder)


@needs_transformers
@pytest.mark.parametrize(
    "kind", ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.full) for kind in sorted(CONFIGS) if kind != "qwen3_moe")]
)
def test_what_transformers_wrote_is_the_same_here(tmp_path: Path, kind: str) -> None:
    written_by_transformers(tmp_path / "hf", kind)
    proof = prove(tmp_path / "hf", scratch=tmp_path)
    assert proof.holds, proof.table()
    assert proof.family == kind and proof.differing_keys == [] and [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert (proof.router_choices > 0) == ("moe" in kind or kind == "mixtral")


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize("seed", range(40))
def test_random_configurations(tmp_path: Path, seed: int) -> None:
    from tests.checkpoint.hugging_face.test_import import random_config

    config = random_config(seed)
    written_by_transformers(tmp_path / "hf", config.pop("model_type"), config, seed=seed)
    proof = prove(tmp_path / "hf", scratch=tmp_path, seed=seed)
    assert proof.holds, f"{config}\n{proof.table()}"


@needs_transformers
@pytest.mark.full
def test_what_goes_out_is_read_by_transformers(tmp_path: Path) -> None:
    """Its config.json means the same there as that which came in."""
    import transformers

    from megalina.checkpoint.hugging_face.exporting import export_checkpoint
    from megalina.checkpoint.hugging_face.importing import import_folder

    for kind in CONFIGS:
        written_by_transformers(tmp_path / kind, kind)
        import_folder(tmp_path / kind, tmp_path / f"{kind} checkpoint")
        export_checkpoint(tmp_path / f"{kind} checkpoint", tmp_path / f"{kind} back", shard_bytes=50_000)
        there, back = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in (kind, f"{kind} back"))
        said = {key: value for key, value in there.items() if value is not None and key != "_name_or_path"}
        assert {key: back[key] for key in said} == said
        one, other = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in (kind, f"{kind} back"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def swapped(links: Iterator[Link], first: str, second: str) -> Iterator[Link]:
    """With two kinds of their tensors mixed up."""
    for link in links:
        key = link.theirs.name
        other = key.replace(first, second) if first in key else key.replace(second, first)
        yield Link(View(other, link.theirs.shape, link.theirs.split, link.theirs.at, link.theirs.order), link.ours)


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "first", "second", "plant"),
    [
        (Mixtral, ".w1.", ".w3.", "gate and up"),
        (Mixtral, "experts.0.", "experts.1.", "two experts"),
        (Qwen3Moe, ".q_norm.", ".k_norm.", "two norms"),
        (Qwen3Moe, "input_layernorm", "post_attention_layernorm", "two norms of a layer"),
    ],
)
def test_tensors_of_the_same_shape_that_are_mixed_up_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: type[Family], first: str, second: str, plant: str
) -> None:
    """All bytes come back: it takes the numbers to see it."""
    written_by_transformers(tmp_path / "hf", family.name)
    links = family.links
    monkeypatch.setattr(family, "links", lambda self, settings: swapped(links(self, settings), first, second))
    proof = prove(tmp_path / "hf", scratch=tmp_path)
    assert proof.bytes_equal and not proof.holds, plant
    assert proof.max_logit_difference > 1e-3 and proof.max_gradient_difference > 1e-2


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("mixtral", "renormalize", False),
        ("qwen3_moe", "renormalize", False),
        ("mixtral", "rope_theta", 1e5),
        ("llama", "norm_eps", 1e-3),
    ],
)
def test_a_setting_that_is_read_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, setting: str, value: Any
) -> None:
    from dataclasses import replace

    from megalina.families.table import family_named

    written_by_transformers(tmp_path / "hf", kind)
    cls = type(family_named(kind))
    read = cls.settings

    def wrong(self: Family, fields: Any) -> Any:
        found = read(self, fields)
        group = "router" if setting == "renormalize" else "model"
        return replace(found, **{group: replace(getattr(found, group), **{setting: value})})

    monkeypatch.setattr(cls, "settings", wrong)
    proof = prove(tmp_path / "hf", scratch=tmp_path)
    assert not proof.holds and proof.bytes_equal and proof.max_logit_difference > 1e-5


@needs_transformers
def test_the_command_prints_one_table_and_writes_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written_by_transformers(tmp_path / "hf", "mixtral")
    capsys.readouterr()
    assert tool.main(["prove", str(tmp_path / "hf"), "--json", str(tmp_path / "proof.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/hf: mixtral, against transformers in float32\n") and out.count("  ok\n") == 6
    found = json.loads((tmp_path / "proof.json").read_text())
    assert found["router_choices_equal"] is True and found["bytes_equal"] is True
    assert found["max_logit_difference"] <= 2e-6 * max(1, found["max_logit"]) and found["max_gradient_difference"] <= 1e-5


def test_without_transformers_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(tmp_path / "hf", "mixtral")
    monkeypatch.setattr(peer, "find_spec", lambda _: None)
    assert tool.main(["prove", str(tmp_path / "hf")]) == 2
    assert "pip install 'megalina[hf]'" in capsys.readouterr().err


def test_a_difference_of_gradients_is_relative_to_their_tensor() -> None:
    theirs = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([1e-9])}
    assert gradient_difference({"a": torch.tensor([2.0, 0.2])}, theirs) == (pytest.approx(0.1), "a")
    found, key = gradient_difference({"a": theirs["a"], "b": torch.tensor([2e-9])}, theirs)
    assert key == "b" and found == pytest.approx(5e-8)  # of numbers that are rounding
    assert gradient_difference({"c": torch.zeros(1)}, theirs) == (float("inf"), "c")
    nan = {"a": torch.tensor([float("nan"), 0.0])}
    assert gradient_difference(nan | {"b": theirs["b"]}, theirs) == (float("inf"), "a")


def test_a_table_says_what_fails() -> None:
    proof = Proof(
        *("mixtral", 3e-6, 2.0, 1e-9, 2e-5, "model.x", 100, False, 41, False, ["model.y"]),
        *(8, ["layers.0.experts.3"], "experts of layer 0"),
    )
    assert not proof.holds and proof.logit_bar == 4e-6
    text = proof.table()
    assert text.count("FAILS") == 4 and "the gradient of model.x differs most" in text and "other bytes: model.y" in text
    assert text.endswith("other experts: layers.0.experts.3\nthe two models part in experts of layer 0")
