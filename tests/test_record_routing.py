"""tools/record_routing.py: it records what the routers choose on the text it is given, and a mistake is one line."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalina.checkpoint.loaded_model import load_model
from megalina.checkpoint.profile import PROFILE, find_profile
from megalina.data.gpt_dataset import GPTDataset, Span
from megalina.data.indexed import IndexedDataset, IndexedWriter
from megalina.data.source import PackedSamples, open_data
from megalina.data.tokenizer import open_tokenizer
from megalina.placement.placement import Placement
from megalina.placement.routing_trace import read_trace, traced
from tests.model.test_routing_recorder import by_hand, chosen_by_hand
from tests.train.small_run import LENGTH, VOCABULARY, checkpoint, config_of, records_of, write_tokens
from tools import record_routing as tool

WORDS = "the quick brown fox jumps over the lazy dog and finds that nothing is there\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run, one whose experts choose tokens, and one without a checkpoint."""
    path, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_tokens(path / "tokens")
    records_of(config_of(path, "run", steps=2, interval=1))
    records_of(config_of(path, "experts_choose", steps=1, kind="expert_choice"))
    (path / "empty" / "checkpoints").mkdir(parents=True)
    (path / "text.txt").write_text(WORDS * 5)
    (path / "blank.txt").write_text("")
    with IndexedWriter(path / "large_ids", np.uint16) as writer:
        writer.add_document([VOCABULARY] * 40)
    yield path
    torch.set_num_threads(threads)


def newest(folder: Path) -> Path:
    return checkpoint(config_of(folder, "run"), 2)


def test_a_run_gets_a_profile_of_its_validation_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(folder / "run"), "--tokens", "100", "--devices", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("100 tokens of 7 sequences, 2 MoE layers, 4 experts top-2; most / least popular expert ")
    assert "busiest of 2 devices" in out and out.endswith(f"{newest(folder) / PROFILE}\n") and out.count("\n") == 1
    trace = find_profile(newest(folder))
    assert trace is not None
    config = config_of(folder, "run")
    valid = open_data(config.data, seq_len=LENGTH, seed=config.train.seed).valid
    assert valid is not None
    ids, weights, ahead = by_hand(load_model(newest(folder)).gpt, valid.batch(0, 7))
    assert np.array_equal(trace.expert_ids_TLK, ids[:100].numpy())
    assert trace.ahead_ids_TLK is not None and np.array_equal(trace.ahead_ids_TLK, ahead[:100].numpy())
    assert trace.weights_TLK is not None and np.abs(trace.weights_TLK - weights[:100].numpy()).max() < 1e-3
    assert trace.sample_lengths_S.tolist() == [LENGTH] * 6 + [4] and trace.name == "tiny, step 2, validation text"


def test_text_and_indexed_data_are_recorded_and_no_more_than_there_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "text.npz", tmp_path / "indexed.npz"
    arguments = [str(newest(folder)), "--out", str(out), "--data", str(folder / "text.txt"), "--tokenizer", "bytes"]
    gpt = load_model(newest(folder)).gpt
    assert tool.main(arguments) == 2  # 257 ids for a model of 300 words
    assert "bytes has 257 ids, the model 300" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    text = (WORDS * 5).encode()
    with IndexedWriter(tmp_path / "own", np.uint16) as writer:
        writer.add_document([*text, 256])
    assert tool.main([str(newest(folder)), "--out", str(again), "--data", str(tmp_path / "own")]) == 0
    trace = read_trace(again)
    assert trace.num_tokens == len(text) // LENGTH * LENGTH  # whole sequences, once each; the last token is a label
    dataset = IndexedDataset(tmp_path / "own")
    packed = GPTDataset(dataset, Span(0, 1, 0, len(text) + 1), seq_len=LENGTH, seed=0, repeat=False, cache_dir=tmp_path)
    samples = PackedSamples(
        [packed], [1.0], seq_len=LENGTH, eod=None, reset_positions=True, reset_attention=True, mask_eod=False, cache_dir=tmp_path
    )
    ids, _ = chosen_by_hand(gpt, samples.batch(0, packed.num_sequences))
    assert np.array_equal(trace.expert_ids_TLK, ids.numpy())


def test_text_is_tokenized_as_far_as_it_is_needed(folder: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer("bytes")
    many = tmp_path / "many"
    many.mkdir()
    for i in range(9):
        (many / f"{i}.txt").write_text(WORDS)
    tool.tokenize(str(many), tokenizer, str(tmp_path / "some"), enough_tokens=2 * len(WORDS))
    found = IndexedDataset(tmp_path / "some")
    assert found.num_documents == 2 and bytes(found.document(1)[:-1].astype(np.uint8)).decode() == WORDS
    assert found.document(1)[-1] == tokenizer.eod


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("nowhere", "there is no checkpoint nowhere"),
        ("{runs}/empty", "has no checkpoint yet"),
        ("{run} --devices 5", "--devices is 5: choose 1 to 4, the number of experts"),
        ("{run} --out {tmp}/none/x.npz", "there is no folder {tmp}/none"),
        ("{run} --out {tmp}", "is a folder: name a file in it"),
        ("{run} --data {runs}/none.txt --out {tmp}/x.npz", "was trained on token ids without a tokenizer: name one"),
        ("{run} --data {runs}/large_ids --out {tmp}/x.npz", "holds the token id 300, the model has 300 ids"),
        ("{runs}/experts_choose --out {tmp}/x.npz", "routes with expert_choice"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, problem: str
) -> None:
    names = {"run": folder / "run", "runs": folder, "tmp": tmp_path}
    argv = [word.format(**names) for word in arguments.split()]
    assert tool.main(argv) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("error: ") and found.err.count("\n") == 1
    assert problem.format(**names) in found.err
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_leaves_the_one_before(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(newest(folder), tmp_path / "copy"))
    assert tool.main([str(copy), "--tokens", "40"]) == 0
    before = {p.name: p.read_bytes() for p in copy.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert tool.main([str(copy), "--tokens", "50"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_the_busiest_device_is_found_by_adding_up_its_experts() -> None:
    ids = np.array([[[0, 1]], [[0, 2]], [[0, 3]]], np.uint8)
    found = tool.busiest_over_mean(traced(ids, 4), Placement(4, ((0, 1), (2, 3))))
    assert found.tolist() == [4 / 3]


class Terminal:
    """Of stderr as much as is asked, which is no terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...


def test_a_long_recording_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: list[Any] = [0.0]
    monkeypatch.setattr(tool.time, "monotonic", lambda: clock[0])
    terminal = Terminal()
    monkeypatch.setattr(tool.sys, "stderr", terminal)
    with tool.Shown(400) as shown:
        for second, tokens in ((5.0, 50), (20.0, 100), (25.0, 150)):
            clock[0] = second
            shown.update(tokens)
    assert terminal.text == "tokens 100/400, 1 min 00 s left\n"
