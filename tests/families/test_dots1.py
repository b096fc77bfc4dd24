"""dots.llm1: what its config.json says, and what of it can't be taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalina.blocks.counts import count_parameters
from megalina.checkpoint.hugging_face.exporting import export_checkpoint
from megalina.checkpoint.hugging_face.importing import import_folder
from megalina.checkpoint.stored import Stored
from megalina.checkpoint.streaming_writer import from_stored, write_checkpoint
from megalina.families.family import Settings
from megalina.families.table import family_for, family_named, family_of
from tests.checkpoint.hugging_face.plain import write
from tests.checkpoint.hugging_face.test_import import same_bytes
from tests.checkpoint.hugging_face.test_more_families import random_state

TINY = json.loads((Path(__file__).parents[1] / "checkpoint" / "hugging_face" / "tiny" / "dots1.json").read_text())
CARD = {  # its card: 62 layers, 32 heads, 6 of 128 experts and 2 shared ones, 142 B parameters of which 14 B are active
    **{"model_type": "dots1", "hidden_size": 4096, "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    **{"first_k_dense_replace": 1, "intermediate_size": 10944, "num_hidden_layers": 62, "num_attention_heads": 32},
    **{"vocab_size": 152064, "max_position_embeddings": 32768, "sliding_window": None, "norm_topk_prob": True},
}


def read(**changes: Any) -> Settings:
    config = {key: value for key, value in {**TINY, **changes}.items() if value != "absent"}
    return family_of(config).read(config)


def test_it_has_the_size_that_its_card_says() -> None:
    settings = family_of(CARD).read(CARD)
    counts = count_parameters(settings.model, settings.router, vocab_size=152064, seq_len=4096)
    words = 152064 * 4096  # looked up, so no work
    assert (round((counts.total - words) / 1e9), round(counts.active / 1e9)) == (142, 14)
    assert settings.model.window == 0 and settings.router.kind == "sigmoid"


def test_what_is_absent_has_the_value_of_the_class() -> None:
    """Of Dots1Config in transformers 5.23."""
    found = read(norm_topk_prob="absent", routed_scaling_factor="absent", num_key_value_heads=None, n_group="absent")
    assert (found.router.renormalize, found.router.scale, found.router.kind) == (False, 1.0, "sigmoid")
    assert found.model.num_kv_heads == 4
    assert read(sliding_window="absent", max_position_embeddings=8192).model.window == 4096
    assert read(max_window_layers="absent").model.window == 0  # the first 62 layers see all
    for name in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok"):
        with pytest.raises(ValueError, match=f"there is no {name}: a dots1 model has one"):
            read(**{name: "absent"})


def test_windows_are_those_of_layer_types() -> None:
    found = read(layer_types=["sliding_attention", "full_attention"], max_window_layers=None)
    assert (found.model.window, found.model.full_attention_every) == (8, 2)
    assert family_named("dots1").written(found)["layer_types"] == ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer_types has full_attention in layers .0.: only every n-th can be taken"):
        read(max_window_layers=1, num_hidden_layers=3)
    with pytest.raises(ValueError, match="layer_types has sliding_attention, and there is no sliding_window"):
        read(layer_types=["sliding_attention"] * 2, sliding_window=None)


def test_without_a_window_and_biases_it_is_a_model_of_glm_too() -> None:
    """Whose name comes first: one that was imported keeps its own, of another `--family dots1` makes one."""
    settings = read(sliding_window=None, attention_bias=False)
    assert family_for(settings).name == "glm4_moe"
    assert family_of(family_named("dots1").written(settings)).name == "dots1"
    assert family_for(read()).name == "dots1"


def test_a_run_that_began_with_it_goes_out_as_it_came(tmp_path: Path) -> None:
    """Its checkpoints don't know where their weights came from; `like` does."""
    config = TINY | {"sliding_window": None, "attention_bias": False}
    write(tmp_path / "hf", config, random_state(config))
    import_folder(tmp_path / "hf", tmp_path / "start")
    stored = Stored(tmp_path / "start")
    values = {key: value for key, value in stored.values.items() if key != "hugging_face"}
    write_checkpoint(tmp_path / "trained", values, stored.listing, from_stored(stored))
    assert export_checkpoint(tmp_path / "trained", tmp_path / "glm").family == "glm4_moe"
    assert export_checkpoint(tmp_path / "trained", tmp_path / "dots", like=tmp_path / "hf").family == "dots1"
    same_bytes(tmp_path / "hf", tmp_path / "dots")
