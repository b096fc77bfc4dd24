"""Conversions lose no bit, averages are means, and both hold one tensor in memory at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalina.checkpoint import safetensors_file, streaming_writer, tensor_files
from megalina.checkpoint.average import average
from megalina.checkpoint.files import read_values
from megalina.checkpoint.inspection import faults
from megalina.checkpoint.safetensors_file import from_safetensors, to_safetensors
from megalina.checkpoint.stored import Stored, read_tensors
from megalina.checkpoint.streaming_writer import rewrite, write_checkpoint
from tests.checkpoint.planted import CONFIG, STATE, WEIGHTS, flip, names, saved


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the last bit, types too."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bytes(_raw(a[n])) == bytes(_raw(b[n])) for n in a
    )


def _raw(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@pytest.mark.sampled(2)
@pytest.mark.parametrize("files", [1, 2, 3, 7, 64])
def test_rewriting_changes_no_bit_and_evens_out_the_files(tmp_path: Path, files: int) -> None:
    source = saved(tmp_path, 1, STATE | {"exp_avg/large": torch.randn(97, 1001)})
    rewrite(source, tmp_path / "new", files=files)
    assert equal(read_tensors(tmp_path / "new"), read_tensors(source)) and read_values(tmp_path / "new") == read_values(source)
    assert faults(tmp_path / "new") == [] and names(tmp_path) == ["new", "step_00000001"]
    sizes = [(tmp_path / "new" / f"__{i}_0.distcp").stat().st_size for i in range(files)]
    assert len(list((tmp_path / "new").glob("*.distcp"))) == files
    assert max(sizes) - min(sizes) < 16_000, sizes  # each box has a header of 1.2 KB or so


def test_it_goes_to_safetensors_and_back(tmp_path: Path) -> None:
    source, file = saved(tmp_path, 1), tmp_path / "w.safetensors"
    to_safetensors(source, file)
    assert equal(load_file(file), {name.removeprefix("model/"): tensor for name, tensor in WEIGHTS.items()})
    from_safetensors(file, tmp_path / "back", files=2)
    assert equal(read_tensors(tmp_path / "back"), WEIGHTS) and read_values(tmp_path / "back") == read_values(source)
    assert faults(tmp_path / "back") == []
    everything = tmp_path / "all.safetensors"
    to_safetensors(source, everything, optimizer=True)
    from_safetensors(everything, tmp_path / "whole")
    assert equal(read_tensors(tmp_path / "whole"), STATE)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    assert json.loads(header["__metadata__"]["config"]) == CONFIG
    assert all(entry["data_offsets"][0] % 8 == 0 for entry in header.values() if entry.get("dtype") == "F64")


def test_a_file_of_another_origin_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no config and values in its metadata"):
        from_safetensors(tmp_path / "other.safetensors", tmp_path / "new")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-3])
    for name in ("cut.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=f"{name} can't be read"):
            from_safetensors(tmp_path / name, tmp_path / "new")
    source = saved(tmp_path, 1)
    with pytest.raises(ValueError, match="other.safetensors is there already"):
        to_safetensors(source, tmp_path / "other.safetensors")
    flip(source / "__0_0.distcp", 400)
    with pytest.raises(ValueError, match="__0_0.distcp is damaged"):
        to_safetensors(source, tmp_path / "new.safetensors")
    assert names(tmp_path) == ["cut.safetensors", "other.safetensors", "step_00000001"]


def test_an_average_is_the_mean_in_float64(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    several = [
        {n: torch.randn(t.shape, generator=random, dtype=torch.float64).to(t.dtype) for n, t in STATE.items()} for _ in "123"
    ]
    paths = [saved(tmp_path, step, tensors) for step, tensors in zip((10, 20, 30), several)]
    average(paths, tmp_path / "mean")
    average(paths, tmp_path / "weighted", weights=[0.5, 0.3, 0.2])
    mean, weighted = read_tensors(tmp_path / "mean"), read_tensors(tmp_path / "weighted")
    assert mean.keys() == weighted.keys() == WEIGHTS.keys()  # no optimizer state
    for name, whole in WEIGHTS.items():
        stack = torch.stack([tensors[name].double() for tensors in several])
        assert mean[name].dtype == whole.dtype
        tolerance = 0.004 if whole.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(mean[name].double(), stack.mean(0), rtol=tolerance, atol=1e-7)
        want = 0.5 * stack[0] + 0.3 * stack[1] + 0.2 * stack[2]
        torch.testing.assert_close(weighted[name].double(), want, rtol=tolerance, atol=1e-7)
    values = read_values(tmp_path / "weighted")
    assert values["step"] == 30 and values["config"] == CONFIG and values["averaged_weights"] == [0.5, 0.3, 0.2]
    average([paths[0]] * 4, tmp_path / "same")
    assert equal(read_tensors(tmp_path / "same"), {n: several[0][n] for n in WEIGHTS})


def test_only_checkpoints_of_one_model_are_averaged(tmp_path: Path) -> None:
    one = saved(tmp_path, 1)
    wide = saved(tmp_path, 2, STATE | {"model/a": torch.ones(3, 4, 6)})
    other = saved(tmp_path, 3, config={**CONFIG, "router": {"kind": "sigmoid"}})
    for paths, weights, problem in (
        ([one, wide], None, r"model/a: \[3, 4, 6\] in the checkpoint, \[3, 4, 5\] here"),
        ([one, other], None, "router.kind=sigmoid, not topk"),
        ([one, one], [0.5], "1 weights for 2 checkpoints"),
        ([one, one], [0.5, 0.6], "sum to 1.1"),
        ([saved(tmp_path, 4, {"exp_avg/a": torch.ones(2)})], None, "has no weights"),
    ):
        with pytest.raises(ValueError, match=problem):
            average(paths, tmp_path / "mean", weights=weights)
    assert not (tmp_path / "mean").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files._HashedFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        rewrite(source, tmp_path / "new", files=2)
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.full
def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 tensors of 8 MB; what is mapped from a file does not count.  The allocator keeps some that were freed: 40 to 64 MB,
    however many tensors there are."""
    listing = {f"model/{i:02d}": ((2048, 1024), torch.float32) for i in range(32)}
    write_checkpoint(tmp_path / "new", {"config": CONFIG}, listing, lambda _, box: torch.ones(box.data.shape))
    seen = []

    def anonymous_mb() -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) / 1024

    save = torch.save
    monkeypatch.setattr(tensor_files.torch, "save", lambda *given: (seen.append(anonymous_mb()), save(*given)))
    monkeypatch.setattr(safetensors_file, "raw", lambda t, raw=safetensors_file.raw: (seen.append(anonymous_mb()), raw(t))[1])
    before = anonymous_mb()
    rewrite(tmp_path / "new", tmp_path / "again", files=1)
    to_safetensors(tmp_path / "again", tmp_path / "w.safetensors")
    from_safetensors(tmp_path / "w.safetensors", tmp_path / "back")
    assert len(seen) >= 96 and max(seen) - before < 96


@given(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=5), st.integers(1, 9))
def test_shares_are_each_element_once(shapes: list[list[int]], files: int) -> None:
    types = (torch.float64, torch.bfloat16, torch.float32)
    listing = {f"t{i}": (tuple(shape), types[i % 3]) for i, shape in enumerate(shapes)}
    count = {name: torch.zeros(shape) for name, (shape, _) in listing.items()}
    loads = []
    for share in streaming_writer._shares(listing, files):
        loads.append(0)
        for name, part in share.items():
            for box in part.boxes:
                count[name][tuple(slice(o, o + n) for o, n in zip(box.offsets, box.data.shape))] += 1
                loads[-1] += box.data.nbytes
    assert all(bool((times == 1).all()) for times in count.values())
    assert max(loads) - min(loads) <= 16  # bytes: two elements


def test_wholeness_finds_holes_overlaps_and_values_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, 1, WEIGHTS | {"exp_avg/bad": torch.tensor([1.0, float("nan"), float("inf")])})
    assert faults(path) == [f"{path}: tensor exp_avg/bad: 2 of 3 values are not finite"]
    good = tmp_path / "good"
    rewrite(saved(tmp_path, 2), good, files=3)
    assert faults(good) == []
    chunks = Stored.chunks

    def spoiled(change: Any) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(
                Stored, "chunks", lambda self, name: change(chunks(self, name)) if name == "model/a" else chunks(self, name)
            )
            return faults(good)

    assert len(Stored(good).chunks("model/a")) > 1  # it is cut between files
    assert "of 60 elements are in no box" in spoiled(lambda found: found[:1])[0]
    assert "covers what another one covers" in spoiled(lambda found: [*found, found[0]])[0]
    flip(good / "__1_0.distcp", 700)
    assert faults(good) == [f"{good}/__1_0.distcp: its checksum is not the one in SHA256SUMS"]
