"""Models of every family come in and go out: the same logits, gradients and choices as plain torch in float64, the same bytes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalina.checkpoint.checksums import damaged
from megalina.checkpoint.files import is_complete, read_values
from megalina.checkpoint.hugging_face import importing, progress
from megalina.checkpoint.hugging_face.exporting import export_checkpoint
from megalina.checkpoint.hugging_face.importing import import_folder
from megalina.checkpoint.hugging_face.linked import Linked, settings_of
from megalina.checkpoint.hugging_face.progress import Progress
from megalina.checkpoint.hugging_face.proof import ask_gpt, gradient_difference
from megalina.checkpoint.hugging_face.source import Source
from megalina.checkpoint.inspection import faults
from megalina.checkpoint.loaded_model import load_model
from megalina.cli import checkpoint as tool
from megalina.families.table import family_named
from tests.checkpoint.hugging_face.plain import CONFIGS, answers, config_of, state_of, tiny, write

KINDS = sorted(CONFIGS)


def same_as_plain(folder: Path, checkpoint: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """In float64, of the very numbers that the file has."""
    token_BS = torch.randint(config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(5))
    loaded = load_model(checkpoint, dtype=torch.float64)
    values = read_values(checkpoint)
    linked = Linked(family_named(values["hugging_face"]["family"]), settings_of(values["config"], values["vocab_size"]))
    ours = ask_gpt(loaded.gpt, token_BS, linked)
    theirs = answers({key: value.double() for key, value in state.items()}, config, token_BS)
    scale = float(theirs.logits_BSV.abs().max())
    assert float((ours.logits_BSV - theirs.logits_BSV).abs().max()) < 1e-12 * max(1.0, scale)
    assert abs(ours.loss - theirs.loss) < 1e-12
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert gradient_difference(ours.gradients, theirs.gradients)[0] < 1e-11, folder
    assert len(ours.choice_LTK) == len(theirs.choice_LTK)
    assert all(torch.equal(a, b) for a, b in zip(ours.choice_LTK, theirs.choice_LTK, strict=True))


def same_bytes(one: Path, other: Path) -> None:
    first, second = Source(one), Source(other)
    assert first.listing.keys() == second.listing.keys()
    for key in first.listing:
        a, b = first.tensor(key), second.tensor(key)
        assert a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_the_same_here_and_its_bytes_come_back(tmp_path: Path, kind: str) -> None:
    config, state = tiny(tmp_path / "hf", kind, shards=2)
    done = import_folder(tmp_path / "hf", tmp_path / "checkpoint", box_bytes=4096, file_bytes=60_000)
    assert faults(tmp_path / "checkpoint") == [] and len(list((tmp_path / "checkpoint").glob("*.distcp"))) > 1
    same_as_plain(tmp_path / "hf", tmp_path / "checkpoint", config, state)
    exported = export_checkpoint(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=50_000)
    same_bytes(tmp_path / "hf", tmp_path / "back")
    assert exported.shards > 1 and exported.experts == done.experts and exported.keys == done.keys == len(state)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in config} == config  # none of its fields is lost
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]  # of transformers 4, of 5
    assert written["torch_dtype"] == written["dtype"] == "float32"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.num_bytes == sum(t.nbytes for t in state.values())
    assert index["weight_map"].keys() == state.keys()


def test_each_expert_has_its_sum(tmp_path: Path) -> None:
    _, state = tiny(tmp_path / "hf", "mixtral")
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    report = json.loads((tmp_path / "checkpoint" / "import_report.json").read_text())
    assert len(report["experts"]) == 8 and len(set(report["experts"].values())) == 8
    at = "model.layers.1.block_sparse_moe.experts.3."
    whole = b"".join(state[f"{at}{name}.weight"].numpy().tobytes() for name in ("w1", "w3", "w2"))
    assert report["experts"]["layers.1.experts.3"] == hashlib.sha256(whole).hexdigest()
    assert (report["family"], report["keys"], report["ignored"]) == ("mixtral", len(state), [])


def test_numbers_of_all_types_come_back_as_they_are(tmp_path: Path) -> None:
    config = config_of("mixtral")
    for dtype in (torch.bfloat16, torch.float16):
        state = state_of(config, dtype=dtype)
        state["model.norm.weight"] = state["model.norm.weight"].float()
        state["lm_head.weight"][0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-7]).to(dtype)
        folder = write(tmp_path / str(dtype), config, state)
        import_folder(folder, tmp_path / f"{dtype} checkpoint")
        export_checkpoint(tmp_path / f"{dtype} checkpoint", tmp_path / f"{dtype} back")
        same_bytes(folder, tmp_path / f"{dtype} back")
        assert json.loads((tmp_path / f"{dtype} back" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert read_values(tmp_path / "torch.bfloat16 checkpoint")["config"]["train"]["dtype"] == "bfloat16"


def test_tokenizer_files_go_along_unchanged(tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    tiny(folder, "qwen3_moe")
    vocab = {f"t{i}": i for i in range(60)}
    text = json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": [{"id": 60, "content": "<|endoftext|>"}]})
    (folder / "tokenizer.json").write_text(text)
    (folder / "generation_config.json").write_text("{}  ")
    (folder / "README.md").write_text("not one of them")
    done = import_folder(folder, checkpoint)
    assert done.files == ["config.json", "generation_config.json", "tokenizer.json"] and "61 ids, the model 64" in done.notes[0]
    assert load_model(checkpoint).tokenizer_path == str(checkpoint / "hugging_face" / "tokenizer.json")
    export_checkpoint(checkpoint, tmp_path / "back")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert tool.main(["convert", str(checkpoint), str(tmp_path / "two"), "--ranks", "2"]) == 0  # they stay with it
    assert load_model(tmp_path / "two").tokenizer_path == str(tmp_path / "two" / "hugging_face" / "tokenizer.json")


def test_copies_and_tables_of_rope_are_left_out(tmp_path: Path) -> None:
    config, state = tiny(tmp_path / "hf", "llama")
    more = {
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    with_tensors(tmp_path / "hf", lambda s: s.update(more))
    done = import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert sorted(done.ignored) == sorted(more) and done.keys == len(state)


def test_fields_that_change_no_logit_stay_as_they_were(tmp_path: Path) -> None:
    tiny(
        tmp_path / "hf",
        "mixtral",
        initializer_range=0.03,
        router_aux_loss_coef=0.02,
        eos_token_id=[2, 3],
        transformers_version="4.36",
    )
    done = import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert "model.init_std=0.03" in done.overrides and "router.balance_loss=0.02" in done.overrides
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["eos_token_id"] == [2, 3] and written["initializer_range"] == 0.03 and written["router_aux_loss_coef"] == 0.02


def test_a_trained_model_goes_out_to_the_first_family_that_has_it(tmp_path: Path) -> None:
    """Without a word of Hugging Face in its checkpoint; `like` gives tokenizer and fields."""
    config, state = tiny(tmp_path / "hf", "qwen3_moe", eos_token_id=7)
    (tmp_path / "hf" / "vocab.json").write_text("{}")
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    values = read_values(tmp_path / "checkpoint")
    del values["hugging_face"]
    from megalina.checkpoint.stored import Stored
    from megalina.checkpoint.streaming_writer import from_stored, write_checkpoint

    stored = Stored(tmp_path / "checkpoint")
    write_checkpoint(tmp_path / "trained", values, stored.listing, from_stored(stored))
    assert export_checkpoint(tmp_path / "trained", tmp_path / "alone").family == "qwen3_moe"
    assert "eos_token_id" not in json.loads((tmp_path / "alone" / "config.json").read_text())
    export_checkpoint(tmp_path / "trained", tmp_path / "back", like=tmp_path / "hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 7
    assert (tmp_path / "back" / "vocab.json").read_text() == "{}"
    same_bytes(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(ValueError, match=r"a mixtral model can't have .*model.qk_norm="):
        export_checkpoint(tmp_path / "trained", tmp_path / "other", family="mixtral")
    with pytest.raises(ValueError, match="there is no family 'gpt2'; there are llama, qwen3, mixtral, qwen3_moe"):
        export_checkpoint(tmp_path / "trained", tmp_path / "other", family="gpt2")
    values["config"]["model"]["activation"] = "gelu"
    write_checkpoint(tmp_path / "gelu", values, stored.listing, from_stored(stored))
    with pytest.raises(ValueError, match=r"no family has this model: a llama .*model.activation=gelu"):
        export_checkpoint(tmp_path / "gelu", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    """Of the largest of ours, 6 MB, one at a time, and of theirs what it is made of."""
    shape = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 1024, "num_local_experts": 6}
    tiny(tmp_path / "hf", "mixtral", **shape)
    seen = []

    def anonymous_mb() -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) / 1024

    class Watched(Progress):
        def add(self, num_bytes: int) -> None:
            seen.append(anonymous_mb())

    before = anonymous_mb()
    with pytest.MonkeyPatch.context() as patch:
        for module in (importing, sys.modules[export_checkpoint.__module__]):
            patch.setattr(module, "Progress", Watched)
        import_folder(tmp_path / "hf", tmp_path / "checkpoint", box_bytes=1 << 20)
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=20_000_000)
    assert len(seen) > 100 and max(seen) - before < 45, max(seen) - before  # of 57 MB; the allocator keeps some that were freed


def test_a_bar_shows_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    class Line:
        shown: list[str] = []

        def show(self, text: str) -> None:
            self.shown.append(text)

    times = iter([0.0, 0.1, 10.0])
    bar = Progress("import model", 4_000_000_000, line=Line(), clock=lambda: next(times))  # type: ignore[arg-type]
    bar.add(10_000_000)
    bar.add(990_000_000)
    assert Line.shown == ["import model: 1.00 of 4.00 GB (25%), 100 MB/s, 0:30 left"]


@pytest.mark.full
@pytest.mark.parametrize("moment_s", [0.0, 0.05, 0.2])
def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path, moment_s: float) -> None:
    tiny(tmp_path / "hf", "mixtral", num_hidden_layers=8, hidden_size=128, intermediate_size=1024, num_local_experts=8)
    target = tmp_path / "checkpoint"
    command = [sys.executable, "tools/checkpoint.py", "import", str(tmp_path / "hf"), str(target)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()})
    hidden = tmp_path / ".checkpoint.partial"
    while not hidden.exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(moment_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists() or (is_complete(target) and not damaged(target))
    if not target.exists():
        import_folder(tmp_path / "hf", target)  # what was left is no obstacle
    assert faults(target) == [] and not hidden.exists()


def unknown_family(folder: Path) -> None:
    change(folder, model_type="gpt2")


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def with_tensors(folder: Path, edit: Any) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pickle_by_another_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()  # not written over: its tensors are mapped
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")


def second_shard(folder: Path, change_file: Callable[[Path], None]) -> None:
    """A folder of two shards, of which the second is changed."""
    config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    write(folder, config, state, shards=2)
    change_file(folder / "model-00002-of-00002.safetensors")


def cut_in_half(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n")


def index(folder: Path, **weight_map: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tokenizer(folder: Path, ids: int) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(i): i for i in range(ids)}}}))


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
BAD = {
    "model_type is 'gpt2': there is no such family here; there are llama, qwen3, mixtral, qwen3_moe": unknown_family,
    r"no field attn_logit_softcapping=30.0: it may change the math": lambda f: change(f, attn_logit_softcapping=30.0),
    "hidden_act is 'gelu', .*only silu": lambda f: change(f, hidden_act="gelu"),
    "rope_type is 'dynamic'": lambda f: change(f, rope_scaling={"type": "dynamic", "factor": 4.0}),
    "rope_theta is 1000000.0, and rope_parameters says 5.0": lambda f: change(f, rope_parameters={"rope_theta": 5.0}),
    "there is no hidden_size: a mixtral model has one": lambda f: change(f, hidden_size="absent"),
    "num_hidden_layers is '2': a number is needed": lambda f: change(f, num_hidden_layers="2"),
    r"num_kv_heads \(3\)": lambda f: change(f, num_key_value_heads=3),
    f"{EXPERT} is missing .of 41 tensors 1 missing": lambda f: with_tensors(f, lambda s: s.pop(EXPERT)),
    r"extra.weight \[3\] is unknown": lambda f: with_tensors(f, lambda s: s.update({"extra.weight": torch.ones(3)})),
    r"w3.weight is \[48, 31\], not \[48, 32\]": lambda f: with_tensors(
        f, lambda s: s.update({EXPERT: s[EXPERT][:, :31].clone()})
    ),
    "w3.weight is torch.bfloat16: they are one tensor": lambda f: with_tensors(
        f, lambda s: s.update({EXPERT: s[EXPERT].bfloat16()})
    ),
    "model.safetensors can't be read as a safetensors file .*cut off or damaged": cut_off,
    "pytorch_model.bin, a pickle, which can run code": pickled,
    "model.safetensors is a pickle, which can run code": pickle_by_another_name,
    r"model-00002-of-00002.safetensors can't be read .*cut off": lambda f: second_shard(f, cut_in_half),
    r"model-00002-of-00002.safetensors can't be read .*0 bytes": lambda f: second_shard(f, lambda file: file.write_bytes(b"")),
    "has no model-00002-of-00002.safetensors: take the whole model": lambda f: second_shard(f, Path.unlink),
    "model-00002-of-00002.safetensors is a pointer of Git LFS": lambda f: second_shard(f, pointer),
    "tokenizer.json is no Hugging Face tokenizer file": lambda f: (f / "tokenizer.json").write_text("{}"),
    "has neither model.safetensors nor model.safetensors.index.json": lambda f: (f / "model.safetensors").unlink(),
    "has no model-00002-of-00002.safetensors: take the whole": lambda f: index(f, a="model-00002-of-00002.safetensors"),
    "says that a is in model.safetensors: it has no such tensor": lambda f: index(f, a="model.safetensors"),
    "is damaged: its weight_map doesn't name files of this": lambda f: index(f, a="../model.safetensors"),
    r"is quantized \(mxfp4\): .*Mxfp4Config": lambda f: change(f, quantization_config={"quant_method": "mxfp4"}),
    "is F8_E4M3, which is quantized: ": lambda f: with_tensors(
        f, lambda s: s.update({EXPERT: s[EXPERT].to(torch.float8_e4m3fn)})
    ),
    r"tokenizer.json has 65 ids, and the model 64 rows": lambda f: tokenizer(f, 65),
    "lm_head.weight is not model.embed_tokens.weight, as config.json": lambda f: change(f, tie_word_embeddings=True),
    "config.json is no JSON": lambda f: (f / "config.json").write_text("{"),
    "has no config.json": lambda f: (f / "config.json").unlink(),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_is_one_line_that_names_it(tmp_path: Path, problem: str) -> None:
    tiny(tmp_path / "hf", "mixtral")
    BAD[problem](tmp_path / "hf")
    with pytest.raises(ValueError, match=problem) as raised:
        import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert "\n" not in str(raised.value) and [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path / "hf", "llama")
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    usage = progress.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for attempt in (
        lambda: import_folder(tmp_path / "hf", tmp_path / "far" / "new"),
        lambda: export_checkpoint(tmp_path / "checkpoint", tmp_path / "far" / "new"),
    ):
        with pytest.raises(ValueError, match=r"far/new needs 0\.00 GB, and 0\.00 GB are free there: make room"):
            attempt()
    assert not (tmp_path / "far").exists()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path / "hf", "mixtral")
    assert tool.main(["import", str(tmp_path / "hf"), str(tmp_path / "checkpoint")]) == 0
    out = capsys.readouterr().out
    assert "mixtral, 47,520 parameters from 41 tensors" in out and "SHA-256 of 8 experts" in out
    assert f"train.init_from={tmp_path}/checkpoint model.name=mixtral model.d_model=32" in out
    assert tool.main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "back"), "--shard-gb", "0.0001"]) == 0
    assert "mixtral, 41 tensors in 2 safetensors files" in capsys.readouterr().out
    assert tool.main(["import", str(tmp_path / "hf"), str(tmp_path / "checkpoint")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert tool.main(["inspect", str(tmp_path / "checkpoint")]) == 0 and tool.main(["verify", str(tmp_path / "checkpoint")]) == 0


def random_config(seed: int) -> dict[str, Any]:
    """Of any family, within what a test can afford."""
    random = torch.Generator().manual_seed(seed)

    def one(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    kind, groups, layers = one(*KINDS), one(1, 2, 3), one(1, 2, 3, 4)
    changes = {
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "num_attention_heads": groups * one(1, 2),
        "hidden_size": 24 * groups,
        "head_dim": one(4, 8, 10),
        "vocab_size": one(17, 64, 130),
        "rms_norm_eps": one(1e-6, 1e-5, 1e-3),
        "tie_word_embeddings": one(True, False),
        "intermediate_size": one(5, 24, 40),
    }
    theta = float(one(100.0, 1e4, 1e6))
    changes |= one({"rope_theta": theta}, {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "rope_theta": theta})
    if kind == "mixtral":
        changes |= {"num_local_experts": one(2, 5), "num_experts_per_tok": one(1, 2)}
    if kind == "qwen3_moe":
        changes |= {"num_experts": one(3, 8), "num_experts_per_tok": one(1, 2, 3), "norm_topk_prob": one(True, False)}
        changes |= {"moe_intermediate_size": one(6, 16)} | one(
            {"mlp_only_layers": list(range(one(0, 1)))}, {"decoder_sparse_step": min(layers, 2), "mlp_only_layers": []}
        )
    config = config_of(kind, **changes)
    if "rope_parameters" in config and "rope_theta" in config:
        config["rope_parameters"] = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    return config


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40))
def test_random_configurations_are_the_same_here_and_come_back(tmp_path: Path, seed: int) -> None:
    config = random_config(seed)
    state = state_of(config, seed=seed)
    write(tmp_path / "hf", config, state, shards=1 + seed % 3)
    import_folder(tmp_path / "hf", tmp_path / "checkpoint", box_bytes=2000 + 500 * seed, file_bytes=30_000)
    same_as_plain(tmp_path / "hf", tmp_path / "checkpoint", config, state)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=20_000)
    same_bytes(tmp_path / "hf", tmp_path / "back")
