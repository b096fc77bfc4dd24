"""tools/import_routing.py, compare_routing.py, and what record_routing.py adds: files that go round, mistakes in one line."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megalina.data.source import open_data
from megalina.placement.routing_trace import read_trace
from tests.train.small_run import LENGTH, config_of, records_of, write_tokens
from tools import compare_routing, import_routing, record_routing

SEQUENCES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run, and what its model in bfloat16 chooses in training sequences."""
    path, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_tokens(path / "tokens")
    records_of(config_of(path, "run", steps=2))
    arguments = [str(path / "run"), "--training", "5", "--tokens", str(SEQUENCES * LENGTH), "--out", str(path / "server.npz")]
    assert record_routing.main([*arguments, "--dtype", "bfloat16", "--logprobs"]) == 0
    yield path
    torch.set_num_threads(threads)


def test_training_sequences_are_recorded_with_their_tokens_and_what_was_said_of_them(folder: Path) -> None:
    trace, config = read_trace(folder / "server.npz"), config_of(folder, "run")
    batch = open_data(config.data, seq_len=LENGTH, seed=config.train.seed).train.batch(5, SEQUENCES)
    text = trace.text
    assert text is not None and np.array_equal(text.tokens_T, batch.tokens_BS.flatten()) and text.tokens_T.dtype == np.uint16
    assert text.positions_T is not None and np.array_equal(text.positions_T, batch.position_BS.flatten())
    assert batch.document_BS is not None and text.documents_T is not None
    assert np.array_equal(text.documents_T, batch.document_BS.flatten())
    assert text.logprobs_T is not None and text.logprobs_T.dtype == np.float32
    assert np.array_equal(~np.isnan(text.logprobs_T), batch.loss_mask_BS.flatten())
    assert trace.samples_S is not None and trace.samples_S.tolist() == [5, 6, 7]


def test_a_trainer_is_compared_with_a_server(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "run"), str(folder / "server.npz")]
    assert compare_routing.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{SEQUENCES * LENGTH} tokens of {SEQUENCES} sequences, 2 MoE layers\n")
    files = ["--json", str(tmp_path / "twin.json"), "--png", str(tmp_path / "twin.png")]
    assert compare_routing.main([*arguments, "--server-dtype", "bfloat16", *files]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "twin.json").read_text())
    assert (tmp_path / "twin.png").read_bytes().startswith(b"\x89PNG")
    assert [layer["layer"] for layer in found["layers"]] == [0, 1] and found["own"]["divergence"] > 0
    assert f"{found['tokens']:.2%} have other experts" in out and "KL(server || trainer), next token" in out


def test_vllms_arrays_go_out_and_come_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, back = tmp_path / "arrays.npz", tmp_path / "back.npz"
    assert import_routing.main(["export", str(folder / "server.npz"), "--out", str(arrays)]) == 0
    assert capsys.readouterr().out.startswith(f"routed_experts {SEQUENCES} x {LENGTH} x 2 x 2 ")
    assert import_routing.main(["vllm", str(arrays), "--model", str(folder / "run"), "--out", str(back)]) == 0
    assert capsys.readouterr().out.startswith(
        f"{SEQUENCES * LENGTH} tokens of {SEQUENCES} sequences, 2 MoE layers, 4 experts top-2;"
    )
    want, got = read_trace(folder / "server.npz"), read_trace(back)
    assert np.array_equal(want.expert_ids_TLK, got.expert_ids_TLK) and want.layers == got.layers
    assert want.text is not None and got.text is not None and np.array_equal(want.text.tokens_T, got.text.tokens_T)
    with np.load(arrays) as found:
        np.save(tmp_path / "ids.npy", found["routed_experts"])
        np.save(tmp_path / "tokens.npy", found["tokens"])
    apart = [str(tmp_path / "ids.npy"), "--tokens", str(tmp_path / "tokens.npy"), "--experts", "4", "--out", str(back)]
    assert import_routing.main(["vllm", *apart]) == 0
    assert np.array_equal(read_trace(back).expert_ids_TLK, want.expert_ids_TLK)


def test_megatrons_trace_is_put_in_the_order_of_sequences(folder: Path, tmp_path: Path) -> None:
    """Its routers see the first token of all sequences of a micro-batch, then the second of all."""
    trace = read_trace(folder / "server.npz")
    ids = trace.expert_ids_TLK.reshape(SEQUENCES, LENGTH, 2, 2)
    assert trace.text is not None
    np.save(tmp_path / "tokens.npy", trace.text.tokens_T.reshape(SEQUENCES, LENGTH))
    records = []
    for sequences in ([0, 1], [2]):  # two micro-batches of one step
        of_batch = ids[sequences].swapaxes(0, 1).reshape(-1, 2, 2)
        records += [
            {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0, "num_tokens": len(of_batch),
             "topk": 2, "top_indices": of_batch[:, layer].tolist()}
            for layer in range(2)
        ]  # fmt: skip
    (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(map(json.dumps, records)))
    out = tmp_path / "replay.npz"
    arguments = ["megatron", str(tmp_path / "router_trace_rank0.jsonl"), "--tokens", str(tmp_path / "tokens.npy")]
    assert import_routing.main([*arguments, "--model", str(folder / "run"), "--out", str(out)]) == 0
    found = read_trace(out)
    assert np.array_equal(found.expert_ids_TLK, trace.expert_ids_TLK) and found.sample_lengths_S.tolist() == [LENGTH] * SEQUENCES


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("import vllm {runs}/none.npz --experts 4 --out {tmp}/x", "none.npz can't be read: No such file"),
        ("import vllm {runs}/tokens.bin --model {run} --out {tmp}/x", "tokens.bin"),
        ("import vllm {runs}/server.npz --model {run} --out {tmp}/x", "server.npz has no array routed_experts"),
        ("import vllm {runs}/server.npz --model {run} --experts 4 --out {tmp}/x", "leave out --experts, --layers and"),
        ("import vllm {runs}/server.npz --out {tmp}/x", "give --model CHECKPOINT, or --experts N"),
        ("import megatron {runs}/server.npz --tokens {runs}/server.npz --experts 4 --out {tmp}/x", "server.npz"),
        ("import export {runs}/tokens.bin --out {tmp}/x", "tokens.bin is no routing trace"),
        ("compare {run} {runs}/none.npz", "none.npz"),
        ("compare {run} {runs}/server.npz --server {run}", "give --server-dtype"),
        ("compare {runs}/nowhere {runs}/server.npz", "there is no checkpoint"),
        ("record {run} --training 0 --data {runs}/tokens --out {tmp}/x", "--training 0 and --data {runs}/tokens: give one"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, problem: str
) -> None:
    names = {"run": folder / "run", "runs": folder, "tmp": tmp_path}
    tool, *argv = [word.format(**names) for word in arguments.split()]
    main = {"import": import_routing.main, "compare": compare_routing.main, "record": record_routing.main}[tool]
    assert main(argv) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and problem.format(**names) in found.err
    assert list(tmp_path.iterdir()) == []
