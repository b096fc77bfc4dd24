"""tools/checkpoint.py: exit codes, one line for a mistake, and checkpoints that training and generation take."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalina.checkpoint.loaded_model import load_model
from megalina.checkpoint.stored import read_tensors
from megalina.cli import checkpoint as tool
from megalina.train.resume import check_fit, check_start
from tests.checkpoint.planted import flip
from tests.train.small_run import checkpoint, config_of, records_of, start, weights_of, write_tokens

RUN = {"kind": "sigmoid", "bias_update_rate": 0.01, "dtype": "bfloat16", "steps": 4, "interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_tokens(path / "tokens")
    records_of(config_of(path, "run", **RUN))
    yield path
    torch.set_num_threads(threads)


def test_inspect_shows_step_layout_parameters_state_ledger_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["inspect", str(folder / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["consumed_samples"], found["tokens"]) == (4, 32, 4 * 8 * 16)
    assert found["layout"]["tp"] == 1 and found["layout"]["tensor_files"] == 1
    tensors = {t["name"]: t for t in found["tensors"]}
    assert tensors["model/embedding"] == {
        "name": "model/embedding", "shape": [300, 32], "dtype": "bfloat16", "num_bytes": 19200,
    }  # fmt: skip
    assert found["optimizer"]["master"]["num_bytes"] == 4 * found["optimizer"]["master"]["elements"]
    assert [line["step"] for line in found["ledger"]] == [2, 3, 4]
    there = {p.name: p.stat().st_size for p in checkpoint(config_of(folder, "run"), 4).iterdir()}
    assert found["files"] == there
    assert tool.main(["inspect", str(checkpoint(config_of(folder, "run"), 2))]) == 0
    text = capsys.readouterr().out
    for part in ("step             2", "sigmoid", "model/layers.1.experts.w1", "4x32x32", "exp_avg_sq", "values.json", "ledger"):
        assert part in text


def test_verify_tells_good_from_damaged_by_its_exit_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    assert tool.main(["verify", str(run)]) == 0
    assert [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(run / "checkpoints" / name) for name in ("step_00000004", "step_00000002")
    ]
    flip(run / "checkpoints" / "step_00000002" / "__0_0.distcp", 5000)
    (run / "checkpoints" / "step_00000004" / "values.json").unlink()
    assert tool.main(["verify", str(run)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{run}/checkpoints/step_00000004/values.json: there is no such file",
        f"{run}/checkpoints/step_00000002/__0_0.distcp: its checksum is not the one in SHA256SUMS",
    ]


def test_converted_and_averaged_checkpoints_start_a_run_and_can_be_generated_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(config_of(folder, "run"), 4)
    file, back, mean = tmp_path / "w.safetensors", tmp_path / "back", tmp_path / "mean"
    assert tool.main(["convert", str(folder / "run"), str(file)]) == 0
    assert tool.main(["convert", str(file), str(back), "--ranks", "3"]) == 0
    assert tool.main(["average", str(source), str(source), "--out", str(mean), "--weights", "0.25,0.75"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [str(file), str(back)]
    want = {name: tensor for name, tensor in read_tensors(source).items() if name.startswith("model/")}
    stored = load_file(file)
    loaded = load_model(source)
    parameters = dict(loaded.gpt.named_parameters())
    assert parameters.keys() <= stored.keys()  # and router biases
    expected = weights_of(start(config_of(folder, "from the source", init_from=str(source), **RUN)))
    for path in (back, mean):
        found = read_tensors(path)
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
        assert all(torch.equal(p, parameters[name]) for name, p in load_model(path).gpt.named_parameters())
        config = config_of(folder, f"from {path.name}", init_from=str(path), **RUN)
        check_start(config, vocab_size=300)
        started = weights_of(start(config))
        assert all(torch.equal(started[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="another model"):
        check_fit(mean, config_of(folder, "wide", d_ff=24, kind="sigmoid"), vocab_size=300)


@pytest.mark.full
def test_rewriting_for_ranks_keeps_a_run_resumable_to_the_bit(folder: Path, tmp_path: Path) -> None:
    source, five = checkpoint(config_of(folder, "run"), 2), tmp_path / "five"
    assert tool.main(["convert", str(source), str(five), "--ranks", "5"]) == 0
    assert len(list(five.glob("*.distcp"))) == 5
    losses = [records_of(config_of(folder, f"goes on {p.name}", **RUN), p).of("loss") for p in (source, five)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_everything_goes_through_safetensors_and_back(folder: Path, tmp_path: Path) -> None:
    source, file, back = checkpoint(config_of(folder, "run"), 2), tmp_path / "all.safetensors", tmp_path / "back"
    assert tool.main(["convert", str(source), str(file), "--optimizer"]) == 0
    assert tool.main(["convert", str(file), str(back)]) == 0
    before, after = read_tensors(source), read_tensors(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    losses = [records_of(config_of(folder, f"again {p.name}", **RUN), p).of("loss") for p in (source, back)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("inspect nowhere", "there is no checkpoint nowhere"),
        ("verify .", "neither a checkpoint nor a run folder"),
        ("convert {run} {tmp}/new", "nothing to convert without --ranks"),
        (
            "convert {run} {tmp}/new --ranks 1000000",
            "1000000 tensor files: a checkpoint has at least 1, and at most as many as its",
        ),
        ("convert {run} {run} --ranks 2", "is there already"),
        ("convert {run} {tmp}/new --ranks 2 --optimizer", "--optimizer is for the way to a .safetensors"),
        ("convert {run} {tmp}/w.safetensors --ranks 2", "--ranks is for checkpoint folders"),
        ("convert a.safetensors b.safetensors", "are both .safetensors"),
        ("convert nowhere.safetensors {tmp}/new", "nowhere.safetensors can't be read as a safetensors file"),
        ("average {run} {run} --out {tmp}/new --weights 1,x", "could not convert string to float"),
        ("average {run} {run} --out {tmp}/new --weights 1", "1 weights for 2 checkpoints"),
        ("average {run} --out {tmp}/no/folder/new", ""),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, problem: str
) -> None:
    argv = [word.format(run=folder / "run", tmp=tmp_path) for word in arguments.split()]
    code = tool.main(argv)
    found = capsys.readouterr()
    if problem:
        assert (code, found.err.count("\n"), found.out) == (2, 1, "") and found.err.startswith("error: ") and problem in found.err
        assert list(tmp_path.iterdir()) == []
    else:  # folders above are made
        assert code == 0 and (tmp_path / "no" / "folder" / "new" / "SHA256SUMS").exists()


def test_a_damaged_source_is_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(checkpoint(config_of(folder, "run"), 4), tmp_path / "bad"))
    flip(path / "__0_0.distcp", 5000)
    for arguments in (["convert", str(path), f"{tmp_path}/w.safetensors"], ["average", str(path), "--out", f"{tmp_path}/mean"]):
        assert tool.main(arguments) == 2
        err = capsys.readouterr().err
        assert f"{path}/__0_0.distcp is damaged: its checksum" in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="__0_0.distcp is damaged"):
        load_model(path)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]
