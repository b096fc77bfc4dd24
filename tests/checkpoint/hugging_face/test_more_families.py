"""Models of tiny/*.json, of every family that there is: bytes come back, and what transformers has written is the same here."""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from megalina.checkpoint.files import read_values
from megalina.checkpoint.hugging_face.exporting import export_checkpoint
from megalina.checkpoint.hugging_face.importing import import_folder
from megalina.checkpoint.hugging_face.linked import Linked
from megalina.checkpoint.hugging_face.proof import prove
from megalina.checkpoint.inspection import faults
from megalina.checkpoint.stored import Stored
from megalina.checkpoint.streaming_writer import from_stored, write_checkpoint
from megalina.families.table import FAMILIES, family_for, family_of
from tests.checkpoint.hugging_face.plain import CONFIGS as PLAIN
from tests.checkpoint.hugging_face.plain import config_of, write
from tests.checkpoint.hugging_face.test_import import same_bytes
from tests.checkpoint.hugging_face.test_prove import needs_transformers, written_by_transformers

# A config.json of each, as small as can be; a new family's file brings it into all tests here.
CONFIGS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "tiny").glob("*.json"))
}
SEEDS = 4  # random models of each


def random_state(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Under the family's keys."""
    family = family_of(config)
    random = torch.Generator().manual_seed(0)
    shapes = Linked(family, family.read(config)).key_shapes()
    return {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}


def test_every_family_is_tried() -> None:
    kinds = {config["model_type"] for config in (*CONFIGS.values(), *map(config_of, PLAIN))}
    assert {family.model_types[0] for family in FAMILIES} <= kinds


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_come_back(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    state = random_state(config)
    write(tmp_path / "hf", config, state, shards=2)
    done = import_folder(tmp_path / "hf", tmp_path / "checkpoint", box_bytes=5000)
    assert faults(tmp_path / "checkpoint") == []
    back = export_checkpoint(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=60_000)
    same_bytes(tmp_path / "hf", tmp_path / "back")
    assert back.experts == done.experts
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    family = family_of(config)
    assert family.read(written).math() == family.read(config).math()
    assert family_for(family.read(config)) is family and family in FAMILIES


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_of_multi_token_prediction_come_and_go(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name] | {"num_nextn_predict_layers": 1}
    state = random_state(config)
    assert state["model.layers.2.eh_proj.weight"].shape == (32, 64) and "model.layers.2.shared_head.norm.weight" in state
    write(tmp_path / "hf", config, state)
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert read_values(tmp_path / "checkpoint")["config"]["model"]["mtp_layers"] == 1
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    same_bytes(tmp_path / "hf", tmp_path / "back")
    copies = {
        "model.layers.2.embed_tokens.weight": state["model.embed_tokens.weight"].clone(),
        "model.layers.2.shared_head.head.weight": state["lm_head.weight"].clone(),
    }
    write(tmp_path / "released", config, state | copies)
    assert import_folder(tmp_path / "released", tmp_path / "other").ignored == list(copies)
    copies["model.layers.2.embed_tokens.weight"][0, 0] += 1
    write(tmp_path / "tuned", config, state | copies)
    with pytest.raises(ValueError, match=r"model.layers.2.embed_tokens.weight is not model.embed_tokens.weight"):
        import_folder(tmp_path / "tuned", tmp_path / "none")
    main = {key: tensor for key, tensor in state.items() if not key.startswith("model.layers.2.")}
    write(tmp_path / "without", config, main)  # as transformers writes it, whatever config.json says
    import_folder(tmp_path / "without", tmp_path / "short")
    assert read_values(tmp_path / "short")["config"]["model"]["mtp_layers"] == 0


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, .*only null"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True, and transformers ignores it"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0"),
        (
            "gpt_oss",
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
            "full_attention in layers .0.",
        ),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("llama_with_yarn", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_type is 'longrope'"),
        ("llama_with_yarn", {"rope_parameters": {"short_factor": [1]}}, "rope_parameters: llama knows no field short_factor"),
    ],
)
def test_what_is_not_there_is_named(name: str, changes: dict[str, Any], problem: str) -> None:
    config = CONFIGS[name] | changes
    with pytest.raises(ValueError, match=problem):
        family_of(config).read(config)


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_wrote_is_the_same_here(tmp_path: Path, name: str) -> None:
    config = dict(CONFIGS[name])
    written_by_transformers(tmp_path / "hf", config.pop("model_type"), config)
    proof = prove(tmp_path / "hf", scratch=tmp_path)
    assert proof.holds, proof.table()


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_goes_out_as_the_same_model(tmp_path: Path, name: str) -> None:
    """Its config.json is written from settings alone, as of a run that began anew."""
    import transformers

    config = dict(CONFIGS[name])
    family = family_of(config)
    written_by_transformers(tmp_path / "hf", config.pop("model_type"), config)
    import_folder(tmp_path / "hf", tmp_path / "start")
    stored = Stored(tmp_path / "start")
    values = {key: value for key, value in stored.values.items() if key != "hugging_face"}
    write_checkpoint(tmp_path / "run", values, stored.listing, from_stored(stored))
    export_checkpoint(tmp_path / "run", tmp_path / "back", family=family.name)
    token_BS = torch.arange(48).view(2, 24)
    with torch.no_grad():
        one, other = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f)(token_BS).logits for f in ("hf", "back"))
    assert torch.equal(one, other)


def random_config(name: str, seed: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(SEEDS * crc32(name.encode()) + seed)

    def one(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    config = dict(CONFIGS[name])
    config |= {
        "num_hidden_layers": one(1, 2, 4),
        "vocab_size": one(40, 64, 130),
        "rms_norm_eps": one(1e-6, 1e-5, 1e-4),
        "tie_word_embeddings": one(True, False),
    }
    if "mlp_only_layers" in config:
        config["mlp_only_layers"] = one([], [0])
    if "first_k_dense_replace" in config:
        config |= {"first_k_dense_replace": one(0, 1), "n_shared_experts": one(1, 2), "num_experts_per_tok": one(1, 2, 3)}
    if config.get("routed_scaling_factor", 1) > 4:  # 16 in four layers: float32 is 5e-6 off float64 here, and 3e-6 there
        config["routed_scaling_factor"] = 1.0
    if "norm_topk_prob" in config:
        config["norm_topk_prob"] = one(True, False)
    if "qk_rope_head_dim" in config:
        config |= {"qk_rope_head_dim": one(2, 4, 8), "qk_nope_head_dim": one(4, 8), "v_head_dim": one(6, 12)}
    return config


@needs_transformers
@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_configurations(tmp_path: Path, name: str, seed: int) -> None:
    config = random_config(name, seed)
    written_by_transformers(tmp_path / "hf", config.pop("model_type"), config, seed=seed)
    proof = prove(tmp_path / "hf", scratch=tmp_path, seed=seed)
    assert proof.holds, f"{config}\n{proof.table()}"
