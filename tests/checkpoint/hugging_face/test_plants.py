"""Bugs built into an import: each is found, and named by what finds it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.hugging_face import importing
from megalina.checkpoint.hugging_face.expert_sums import ExpertSums
from megalina.checkpoint.hugging_face.exporting import export_checkpoint
from megalina.checkpoint.hugging_face.importing import import_folder
from megalina.checkpoint.hugging_face.proof import prove
from megalina.checkpoint.hugging_face.views import ours_from
from megalina.families import decoder, deepseek_v2, deepseek_v3, qwen3_moe
from megalina.families.links import Link, View
from megalina.families.mixtral import Mixtral
from megalina.families.shared_experts import latent_links
from megalina.model import routers
from tests.checkpoint.hugging_face.plain import tiny
from tests.checkpoint.hugging_face.test_more_families import CONFIGS
from tests.checkpoint.hugging_face.test_prove import needs_transformers, written_by_transformers

LOST = 2  # the expert that is lost, of layer 1
INIT_STD = 0.02


def test_an_expert_that_a_family_forgets_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path / "hf", "mixtral")
    links = Mixtral.links

    def without(self: Mixtral, settings: Any) -> Iterator[Link]:
        return (link for link in links(self, settings) if f"layers.1.block_sparse_moe.experts.{LOST}." not in link.theirs.name)

    monkeypatch.setattr(Mixtral, "links", without)
    with pytest.raises(
        AssertionError, match=r"mixtral: elements of ours are not linked once: 3,072 of layers.1.experts.w1, all of .2."
    ):
        import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_expert_that_is_not_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All links are there; of one expert's the import makes no use, and it would stay as it was initialised."""
    tiny(tmp_path / "hf", "mixtral")

    def skipping(links: list[Link], *rest: Any) -> torch.Tensor:
        return ours_from([link for link in links if f"layers.1.block_sparse_moe.experts.{LOST}." not in link.theirs.name], *rest)

    monkeypatch.setattr(importing, "ours_from", skipping)
    with pytest.raises(AssertionError, match=r"not read as linked: .*experts.2.w1.weight .0 of 1 times.*, 3 of 41 tensors"):
        import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_expert_that_is_lost_on_its_way_to_the_disk_has_another_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path / "hf", "mixtral")
    add = ExpertSums.add

    def losing(self: ExpertSums, name: str, first: int, rows: torch.Tensor) -> None:
        add(self, name, first, rows)
        if name == "layers.1.experts.w2":
            rows[LOST].normal_(0, INIT_STD)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertSums, "add", losing)
        import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    came, went = (
        json.loads((tmp_path / file).read_text())["experts"]
        for file in ("checkpoint/import_report.json", "back/export_report.json")
    )
    assert [name for name in came if came[name] != went[name]] == [f"layers.1.experts.{LOST}"]


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize("after_its_sum", [True, False])
def test_an_expert_that_stays_at_its_initial_value_is_named_by_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_its_sum: bool
) -> None:
    written_by_transformers(tmp_path / "hf", "qwen3_moe")
    add = ExpertSums.add

    def losing(self: ExpertSums, name: str, first: int, rows: torch.Tensor) -> None:
        if after_its_sum:
            add(self, name, first, rows)
        if name.startswith("layers.1.experts.") and not during_export:
            rows[LOST - first].normal_(0, INIT_STD)
        if not after_its_sum:
            add(self, name, first, rows)

    during_export: list[int] = []
    fetch = export_checkpoint.__globals__["_fetch"]
    monkeypatch.setitem(export_checkpoint.__globals__, "_fetch", lambda *a: (during_export.append(1), fetch(*a))[1])
    monkeypatch.setattr(ExpertSums, "add", losing)
    proof = prove(tmp_path / "hf", scratch=tmp_path)
    at = f"model.layers.1.mlp.experts.{LOST}."
    assert not proof.holds and proof.first_apart == "experts of layer 1"
    assert proof.differing_keys == [f"{at}{name}_proj.weight" for name in ("down", "gate", "up")]
    assert proof.differing_experts == ([f"layers.1.experts.{LOST}"] if after_its_sum else [])


def odd_ones_first(theirs: str, ours: str, heads: int, still: int, turned: int, width: int) -> Iterator[Link]:
    """As `turned_links`, with the two of each pair of neighbours mixed up."""
    shape, split, half = (heads * (still + turned), width), (heads, still + turned, width), still + turned // 2
    for there, here in (
        (slice(0, still), slice(0, still)),
        (slice(still + 1, None, 2), slice(still, half)),
        (slice(still, None, 2), slice(half, None)),
    ):
        views = (View(name, shape, split=split, at=(slice(None), at)) for name, at in ((theirs, there), (ours, here)))
        yield Link(*views)


def as_they_lie(theirs: str, ours: str, heads: int, still: int, turned: int, width: int) -> Iterator[Link]:
    shape = heads * (still + turned), width
    yield Link(View(theirs, shape), View(ours, shape))


def sorted_as_deepseeks(layer: int, settings: Any) -> Iterator[Link]:
    """Queries and keys of families whose halves turn together, sorted as if neighbours did."""
    for link in decoder.attention_links(layer, settings):
        name, (rows, *width) = link.theirs.name, link.theirs.shape
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            split = rows // settings.head_dim, settings.head_dim // 2, 2, *width
            ours = View(link.ours.name, link.ours.shape, split=(split[0], 2, split[1], *width))
            yield Link(View(name, link.theirs.shape, split=split, order=(0, 2, 1, 3)), ours)
        else:
            yield link


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("deepseek_v2", odd_ones_first),
        ("deepseek_v3", odd_ones_first),
        ("deepseek_v3", as_they_lie),
        ("qwen3_moe", sorted_as_deepseeks),
    ],
)
def test_rows_that_rope_turns_in_a_wrong_order_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, links: Callable[..., Iterator[Link]]
) -> None:
    """All bytes come back, the model is another one, and it is so from the first attention on."""
    config = dict(CONFIGS[name]) if name in CONFIGS else None
    written_by_transformers(tmp_path / "hf", name, config)
    if name == "qwen3_moe":
        monkeypatch.setattr(qwen3_moe, "attention_links", links)
    else:
        monkeypatch.setitem(latent_links.__globals__, "turned_links", links)
    proof = prove(tmp_path / "hf", scratch=tmp_path)
    assert proof.bytes_equal and not proof.holds and proof.max_logit_difference > 1e-4
    assert proof.first_apart == "attention of layer 0"


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "rule", "other"),
    [("deepseek_v2", "groups_of_best", "best_groups"), ("deepseek_v3", "best_groups", "groups_of_best")],
)
def test_the_group_rule_of_another_family_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rule: str, other: str
) -> None:
    written_by_transformers(tmp_path / "hf", name, dict(CONFIGS[name]))
    monkeypatch.setattr(routers, rule, getattr(routers, other))
    proof = prove(tmp_path / "hf", scratch=tmp_path)
    assert proof.bytes_equal and not proof.router_choices_equal and proof.first_apart == "experts of layer 1"
    assert "router choices" in next(line for line in proof.table().splitlines() if "FAILS" in line and "choices" in line)


def test_names_that_plants_patch_are_those_that_are_used() -> None:
    """Else a plant would do nothing, and its test say so only where transformers is."""
    assert deepseek_v2.latent_links is deepseek_v3.latent_links is latent_links
    assert qwen3_moe.attention_links is decoder.attention_links and {"groups_of_best", "best_groups"} < vars(routers).keys()
