"""`megalina.open_checkpoint`: logits, routing and text of a checkpoint, without a word about ranks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megalina
from megalina.checkpoint.hugging_face.importing import import_folder
from tests.checkpoint.hugging_face.plain import answers, config_of, state_of, tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opened")
    tiny(folder / "hf", "qwen3_moe")
    import_folder(folder / "hf", folder / "checkpoint")
    return folder / "checkpoint"


def tokens(sequences: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(64, (sequences, length), generator=torch.Generator().manual_seed(3))


def test_logits_and_choices_are_those_of_plain_torch(checkpoint: Path) -> None:
    model = megalina.open_checkpoint(str(checkpoint), dtype=torch.float64)
    config = config_of("qwen3_moe")
    wanted = answers({key: value.double() for key, value in state_of(config).items()}, config, tokens())
    found = model.logits(tokens())
    assert found.shape == (2, 20, 64) and found.dtype == torch.float32 and not found.is_inference()
    torch.testing.assert_close(found, wanted.logits_BSV.float(), rtol=1e-6, atol=1e-6)
    routing = model.routing(tokens())
    assert list(routing) == model.moe_layers == [1] and model.num_experts == 4
    assert routing[1].expert_BSK.shape == (2, 20, 2) and routing[1].expert_BSK.dtype == torch.int64
    assert torch.equal(routing[1].expert_BSK.view(-1, 2).sort(dim=1).values, wanted.choice_LTK[0])
    assert routing[1].weight_BSK.dtype == torch.float32
    torch.testing.assert_close(routing[1].weight_BSK.sum(2), torch.ones(2, 20))
    assert bool((routing[1].weight_BSK.diff(dim=2) <= 0).all())  # best first
    assert (model.vocab_size, model.max_positions, model.step) == (64, 64, 0)


def test_what_is_recorded_can_be_replayed(checkpoint: Path) -> None:
    model = megalina.open_checkpoint(checkpoint)
    trace = model.record(tokens(), logprobs=True)
    routing = model.routing(tokens())
    assert np.array_equal(trace.expert_ids_TLK[:, 0], routing[1].expert_BSK.flatten(0, 1)) and trace.layers == (1,)
    assert torch.equal(model.logits(tokens(), replay=trace), model.logits(tokens()))
    logprob = model.logits(tokens()).log_softmax(2)[:, :-1].gather(2, tokens()[:, 1:, None]).squeeze(2)
    assert trace.text is not None and trace.text.logprobs_T is not None
    np.testing.assert_allclose(trace.text.logprobs_T.reshape(2, 20)[:, :-1], logprob, atol=1e-5)
    others = np.array([[sorted({0, 1, 2, 3} - set(ids)) for ids in layers] for layers in trace.expert_ids_TLK.tolist()], np.uint8)
    moved = model.logits(tokens(), replay=replace(trace, expert_ids_TLK=others, weights_TLK=None, ahead_ids_TLK=None))
    assert float((moved - model.logits(tokens())).abs().max()) > 1e-4
    for given, problem in ((tokens()[:, 1:], "first differs in token 0"), (tokens()[:, :-1], "has 20 tokens instead of 19")):
        with pytest.raises(ValueError, match=problem):
            model.logits(given, replay=trace)
    with pytest.raises(ValueError, match="it is of 8 experts, and model.num_experts is 4"):
        model.logits(tokens(), replay=replace(trace, num_experts=8, ahead_ids_TLK=None))


def test_text_goes_on_with_the_likeliest_token(checkpoint: Path) -> None:
    model = megalina.open_checkpoint(checkpoint)
    prompt = [5, 6, 7]
    written = model.generate(prompt, max_tokens=6)
    for i, token in enumerate(written):
        assert int(model.logits(torch.tensor([prompt + written[:i]]))[0, -1].argmax()) == token
    assert len(written) == 6 and model.generate(prompt, max_tokens=100, stop_token=written[2]) == written[:3]
    assert len(model.generate(prompt, max_tokens=100)) == 61  # max_positions
    drawn = [model.generate(prompt, max_tokens=20, temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (torch.zeros(4, dtype=torch.int64), r"tokens are torch.int64 \[4\]: int64 \[sequences, tokens\]"),
        (torch.zeros(1, 4), r"tokens are torch.float32 \[1, 4\]"),
        (torch.zeros(1, 0, dtype=torch.int64), "one at least"),
        (torch.zeros(1, 65, dtype=torch.int64), "sequences have 65 tokens, and the model reads at most 64"),
        (torch.tensor([[3, 64]]), "token ids are from 3 to 64, and the model has those from 0 to 63"),
        (torch.tensor([[-1, 2]]), "token ids are from -1 to 2"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(checkpoint: Path, given: torch.Tensor, problem: str) -> None:
    model = megalina.open_checkpoint(checkpoint)
    for ask in (model.logits, model.routing):
        with pytest.raises(ValueError, match=problem):
            ask(given)


def test_what_cannot_be_asked_is_said(checkpoint: Path, tmp_path: Path) -> None:
    model = megalina.open_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="the checkpoint names no tokenizer"):
        _ = model.tokenizer
    with pytest.raises(ValueError, match="temperature is -1"):
        model.generate([1], max_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match=r"tokens are .*\[1, 0\]"):
        model.generate([], max_tokens=1)
    with pytest.raises(ValueError, match=r"python tools/checkpoint.py import"):
        megalina.open_checkpoint(checkpoint.parent / "hf")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        megalina.open_checkpoint(tmp_path)
    tiny(tmp_path / "hf", "llama")
    import_folder(tmp_path / "hf", tmp_path / "dense")
    with pytest.raises(ValueError, match="no token is routed in this model"):
        megalina.open_checkpoint(tmp_path / "dense").routing(tokens())


def test_a_run_folder_is_its_newest_checkpoint_and_the_tokenizer_is_at_hand(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    tiny(tmp_path / "hf", "mixtral")
    vocab = {chr(97 + i): i for i in range(26)} | {"</s>": 26}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False},
    }  # fmt: skip
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer))
    import_folder(tmp_path / "hf", tmp_path / "run" / "checkpoints" / "step_00000000")
    model = megalina.open_checkpoint(tmp_path / "run")
    assert model.tokenizer.encode("abc") == [0, 1, 2] and model.tokenizer.eod == 26


def test_importing_megalina_takes_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, megalina; assert 'torch' not in sys.modules"], check=True)
