"""Scores on local tasks in training: those of each choice by itself, in every layout, and training stays as it is."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalina.batch import Batch
from megalina.config import EvalConfig, PretrainConfig
from megalina.data.indexed import IndexedWriter
from megalina.data.source import open_data
from megalina.data.tokenizer import ByteTokenizer
from megalina.model.block_functions import Seen
from megalina.model.gpt import GPT
from megalina.model.tokens import TokenShare
from megalina.model.vocabulary import head_stat
from megalina.tasks.continuation import Continuation, continuation_of
from megalina.tasks.scores import choice_scores
from megalina.train.task_scores import batch_of, tasks_of
from megalina.validate import check_config
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import config_of, random_batch, records_of, start, weights_of

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"seq_len": 96, "steps": 2, "num_layers": 2, "d_model": 32, "dtype": "float64", "micro_batch_size": 2, "bias": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep": (2, {"ep": 2, "zero": 1}),
    "tp": (2, {"tp": 2, "sequence": False}),
    "tp_sequence": (2, {"tp": 2, "sequence": True, "zero": 1}),
    "all": (4, {"tp": 2, "ep": 2, "sequence": True}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small: two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes of some source, a document a file; the last files are held out."""
    folder = tmp_path_factory.mktemp("tasks")
    with IndexedWriter(folder / "tokens", np.uint16) as writer:
        for source in sorted((ROOT / "megalina" / "data").glob("*.py")):
            writer.add_document([*source.read_bytes()[:6000], ByteTokenizer.eod])
    return folder


def with_tasks(folder: Path, run: str, *, interval: int = 1, examples: int = 6, **settings: Any) -> PretrainConfig:
    config = config_of(folder, run, **SETTINGS | settings)
    return replace(config, data=replace(config.data, tokenizer="bytes"), eval=EvalConfig(interval=interval, examples=examples))


def alone(gpt: GPT, c: Continuation, length: int) -> float:
    """Nats of a continuation on one device, without padding and without a batch."""
    read = torch.tensor([c.read(length)])
    with torch.inference_mode():
        log_SV = gpt.logits(gpt.hidden(Batch.whole(read))[0])[:, : gpt.vocab_size].log_softmax(1)[-len(c.tokens) :]
    return float(log_SV[torch.arange(len(c.tokens)), torch.tensor(c.tokens)].sum())


def test_scores_are_those_of_each_choice_by_itself(folder: Path) -> None:
    config = with_tasks(folder, "alone")
    run = start(config)
    run.loop()
    gpt, tokenizer = run.built.trainable.gpt, ByteTokenizer()
    gpt.eval()
    tasks = tasks_of(config, run.data)
    assert [task.name for task in tasks] == ["cloze", "brackets", "next_line", "arithmetic"]
    cut, record = 0, run.tracker.records[-1]  # type: ignore[union-attr]
    for task in tasks:
        given = [[continuation_of(tokenizer, e.context, text) for text in e.choices] for e in task.examples]
        cut += sum(c.cut_tokens(96) > 0 for own in given for c in own)
        expected = choice_scores(task.examples, [[alone(gpt, c, 96) for c in own] for own in given])
        for name in ("accuracy", "centred_accuracy", "bits_per_byte"):
            mean = getattr(expected, name)
            assert record[f"eval/{task.name}/{name}"] == pytest.approx(mean.value, rel=1e-12)
            assert record[f"eval/{task.name}/{name}_error"] == pytest.approx(mean.standard_error, rel=1e-9)
    assert cut > 0  # some contexts were too long


@pytest.mark.full
def test_training_is_the_same_with_and_without(folder: Path) -> None:
    runs = []
    for name, interval in (("with", 1), ("without", 0)):
        run = start(with_tasks(folder, name, interval=interval, zero=1, micro_batch_size=4))
        run.loop()
        runs.append((weights_of(run), run.tracker.of("loss"), run.tracker.records))  # type: ignore[union-attr]
    (first, losses, records), (second, others, without) = runs
    assert all(torch.equal(first[name], second[name]) for name in second) and losses == others
    made = {key for key in records[-1] if key.startswith("eval/")}
    assert len(made) == 4 * 6 + 1 and not any(key.startswith("eval/") for key in without[-1])
    assert all(math.isfinite(records[-1][key]) for key in made)


def of_layout(config: PretrainConfig) -> tuple[dict[str, float], list[float]]:
    recorder = records_of(config)
    scores = {key: value for key, value in recorder.records[-1].items() if key.startswith("eval/") and key != "eval/seconds"}
    return scores, recorder.of("loss")


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_one_process_in_every_layout(folder: Path, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    scores, losses = of_layout(with_tasks(folder, "one"))
    for other, other_losses in run_on_ranks(world, of_layout, with_tasks(folder, layout, **parallel)):
        assert other == pytest.approx(scores, rel=1e-10) and other_losses == pytest.approx(losses, rel=1e-12)


def test_losses_by_sequence_are_the_loss_and_tensor_parallel_ranks_have_a_part_each(folder: Path) -> None:
    gpt = start(with_tasks(folder, "parts", interval=0)).built.trainable.gpt
    gpt.eval()
    batch, head = random_batch(3, length=8), gpt.output
    batch = replace(batch, tokens_BS=batch.tokens_BS % 257, labels_BS=batch.labels_BS % 257, loss_mask_BS=batch.tokens_BS % 3 > 0)
    with torch.inference_mode():
        x_TD = gpt._stream(batch, Seen())
        whole_B = head.sequence_losses(x_TD, batch)
        assert float(whole_B.sum()) == pytest.approx(float(head.loss(x_TD, batch)), rel=1e-12)
        assert whole_B[1:2].tolist() == pytest.approx([float(gpt(batch.split(1)[1]).loss)], rel=1e-12)
        halves, n_TD = head.weight_VD.chunk(2), head.head_norm(x_TD)
        words = [len(halves[0]), gpt.vocab_size - len(halves[0])]
        labels_T = batch.labels_BS.flatten()
        stats = [head_stat(n_TD, halves[r], labels_T - r * words[0], words[r]) for r in range(2)]
        parts = []
        for rank in range(2):
            gpt.share = TokenShare(2, rank)
            parts.append(head.sequence_losses(torch.cat(stats), batch))
    assert (parts[0] + parts[1]).tolist() == pytest.approx(whole_B.tolist(), rel=1e-12)
    assert parts[0][2] == 0 and parts[1][0] == 0  # each has half of the tokens


def test_a_batch_is_padded_behind_and_beyond() -> None:
    batch = batch_of([Continuation((7, 8, 9), (5, 6)), Continuation((3,), (4,))], 3, 3)
    assert batch.tokens_BS.tolist() == [[8, 9, 5], [3, 0, 0], [0, 0, 0]]  # cut in front
    assert batch.labels_BS.tolist() == [[0, 5, 6], [4, 0, 0], [0, 0, 0]]
    assert batch.loss_mask_BS.tolist() == [[False, True, True], [True, False, False], [False] * 3]
    assert batch.valid_BS.tolist() == [[True] * 3, [True, False, False], [False] * 3]


BAD = {
    "must name tasks, each once": {"tasks": []},
    "there is no task bracket (did you mean brackets?)": {"tasks": ["bracket"]},
    "eval.tasks=[cloze,cloze]": {"tasks": ["cloze", "cloze"]},
}


@pytest.mark.parametrize("words", BAD)
def test_wrong_settings_are_one_line(folder: Path, words: str) -> None:
    config = with_tasks(folder, "wrong")
    with pytest.raises(ValueError, match="eval.tasks") as raised:
        check_config(replace(config, eval=EvalConfig(interval=5, **BAD[words])), 1)  # type: ignore[arg-type]
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_what_tasks_can_not_be_made_of_is_one_line(folder: Path) -> None:
    config = with_tasks(folder, "wrong")
    for changed, words in (
        (replace(config, router=replace(config.router, kind="expert_choice")), "looks at later tokens, and so at the answers"),
        (replace(config, data=replace(config.data, tokenizer="")), "needs data.tokenizer"),
    ):
        with pytest.raises(ValueError, match="eval.interval=1 ") as raised:
            check_config(changed, 1)
        assert words in str(raised.value)
    short = replace(config, train=replace(config.train, seq_len=16))
    with pytest.raises(ValueError, match="a choice of next_line has .* tokens, train.seq_len is 16"):
        tasks_of(short, open_data(config.data, seq_len=16, seed=1))
    none = replace(config, data=replace(config.data, split="100,0"))
    with pytest.raises(ValueError, match="cloze, brackets, next_line need held-out text, and data.split=100,0 leaves none"):
        tasks_of(none, open_data(none.data, seq_len=96, seed=1))
