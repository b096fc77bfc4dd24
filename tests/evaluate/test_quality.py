"""Quality: what an engine on ranks measures is what the model on one process gives, token by token."""

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalina.batch import Batch
from megalina.config import InferConfig, ModelConfig, RouterConfig
from megalina.data.bpe import train_bpe
from megalina.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, open_tokenizer
from megalina.evaluate.likelihood import Likelihood, log_likelihoods
from megalina.evaluate.perplexity import (
    Quality,
    held_out_quality,
    open_held_out,
    perplexity,
    read_documents,
    text_quality,
    windows_of,
)
from megalina.evaluate.tasks import read_tasks, score_tasks, summed_up
from megalina.generate import Sampling, generate
from megalina.mesh import build_mesh
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.placement.controller import Policy
from megalina.placement.planners.identity import identity
from megalina.placement.split import even
from megalina.placement.triggers import never
from megalina.serve.engine import Engine
from megalina.serve.load_engine import open_checkpoint
from megalina.tasks.continuation import Continuation, continuation_of
from megalina.tasks.scores import Mean
from megalina.tasks.task import Cloze, MultipleChoice
from tests.parallel.ranks import run_on_ranks
from tests.serve.small_engine import EXPERTS, POSITIONS, small_engine

WORLD = 3
TEXT = Path(__file__).read_text()[:1500] + "naïve café, 中文 🙂\n"
DOCUMENTS = [TEXT, "one ", "def f(x):\n    return x\n" * 5]
HARNESS = importlib.util.find_spec("lm_eval") is not None
TASKS = [
    {"context": "def main(", "choices": ["):", " argv):", "é"], "answer": 0},
    {"context": "", "choices": ["import os", "zzz"], "answer": 1},
    {"context": "from pathlib import ", "target": "Path"},
    {"context": "import " * 60, "choices": ["torch", " torch", "numpy as np"], "answer": 2},
    {"context": "x" * 300, "target": " = 1"},
]


def gpt_of(words: int, dtype: torch.dtype, kind: str = "topk") -> GPT:
    config = ModelConfig(
        num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, num_experts=EXPERTS, d_ff=24, init_std=0.3, shared_d_ff=8
    )
    gpt = GPT(config, RouterConfig(kind=kind), vocab_size=words, max_positions=POSITIONS, seed=1)
    initialize(gpt, seed=1, dtype=dtype)
    gpt.eval()
    return gpt


def engine_of(gpt: GPT) -> Engine:
    world = dist.get_world_size()
    residents = [identity([1.0] * EXPERTS, world, 4)] * len(gpt.moe_layers)
    return small_engine(gpt, Policy(None, None, even, never), residents)


def continuations(tokenizer: Tokenizer, gpt: GPT) -> list[Continuation]:
    """Of many lengths, too long ones among them; the last two are what greedy decoding writes, and nearly that."""
    ids = tokenizer.encode(TEXT)
    some = [Continuation(tuple(ids[i : i + 1 + 7 * i % 60]), tuple(ids[200 + i : 201 + i + i % 6])) for i in range(14)]
    prompt = tuple(ids[:10])
    greedy = tuple(generate(gpt, prompt, Sampling(max_tokens=6, max_positions=POSITIONS, temperature=0.0)))
    return [*some, Continuation(prompt, greedy), Continuation(prompt, (*greedy[:-1], greedy[-1] ^ 1))]


def batches_of_rank(rank: int, words: int) -> list[Batch]:
    """Rank 1 has none; documents, padding and labels that don't count."""
    out = []
    for i in range((2, 0, 3)[rank]):
        random = torch.Generator().manual_seed(10 * rank + i)
        token_BS = torch.randint(0, words, (2, 13), generator=random)
        valid_BS = torch.arange(12) < torch.tensor([[12], [7]])
        mask_BS = valid_BS & (torch.rand(2, 12, generator=random) < 0.8)
        position_BS = torch.arange(12).expand(2, -1)
        document_BS = torch.arange(12).expand(2, -1) // 5 if i % 2 else None
        sample_B = torch.zeros(2, dtype=torch.int64)
        out.append(Batch(token_BS[:, :-1], token_BS[:, 1:], mask_BS, valid_BS, position_BS, document_BS, sample_B))
    return out


def unreadable(rank: int, words: int) -> Any:
    yield batches_of_rank(0, words)[0]
    if rank == 2:
        raise ValueError("planted: the file is damaged")
    yield batches_of_rank(0, words)[1]


def said(work: Any, *arguments: Any, **named: Any) -> str:
    try:
        work(*arguments, **named)
    except ValueError as error:
        return str(error)
    return ""


def jobs(tokenizer_path: str, tasks_path: str, checkpoint: str) -> dict[str, Any]:
    """All that this file asks of ranks."""
    rank, tokenizer = dist.get_rank(), open_tokenizer(tokenizer_path)
    words, out = tokenizer.vocab_size, dict[str, Any]()
    room = {"batch_size": 2, "max_positions": POSITIONS}
    for name in ("float32", "float64"):
        engine, done, lengths = engine_of(gpt_of(words, getattr(torch, name))), list[int](), tokenizer.token_bytes()
        out[name] = {
            "batches": perplexity(engine, batches_of_rank(rank, words), token_bytes=lengths, progress=done.append),
            "done": done,
            "text": text_quality(engine, DOCUMENTS, tokenizer, **room),
        }
        if name == "float32":
            engine.close()
    given = continuations(tokenizer, engine.gpt)
    out["likelihoods"] = {size: log_likelihoods(engine, given, batch_size=size, max_positions=POSITIONS) for size in (1, 3, 64)}
    tasks, seen = read_tasks(Path(tasks_path)), list[tuple[int, int]]()
    out["tasks"] = score_tasks(engine, tokenizer, tasks, **room, progress=lambda done, total: seen.append((done, total)))
    out["seen"] = seen
    if HARNESS:
        out["harness"] = harness(engine, tokenizer, tasks_path)
    ahead = engine_of(gpt_of(words, torch.float64, "expert_choice"))
    out["bad"] = {
        "unreadable": said(perplexity, engine, unreadable(rank, words)),
        "no token": said(perplexity, engine, []),
        "unequal": said(log_likelihoods, engine, given[: 5 + rank // 2], **room),
        "ahead": said(log_likelihoods, ahead, given, **room),
        "long": said(log_likelihoods, engine, [Continuation((1,), (2,) * 49)], **room),
        "batch": said(text_quality, engine, DOCUMENTS, tokenizer, batch_size=0, max_positions=POSITIONS),
        "ids": said(score_tasks, engine_of(gpt_of(256, torch.float32)), tokenizer, tasks, **room),
    }
    opened = open_checkpoint(Path(checkpoint), build_mesh(ep=WORLD))
    config = InferConfig()
    of_run = opened.engine(config, opened.policy(config, None))
    out["run"] = held_out_quality(of_run, open_held_out(Path(checkpoint)), batch_size=2)
    return out


def harness(engine: Engine, tokenizer: Tokenizer, tasks_path: str) -> dict[str, Any]:
    import lm_eval

    from megalina.evaluate.harness import HarnessModel

    model = HarnessModel(engine, tokenizer, batch_size=2, max_positions=POSITIONS)
    pairs = [(task["context"], text) for task in TASKS for text in task.get("choices", [task.get("target")])]
    settings = {"until": ["e", "zz"], "max_gen_toks": 12, "do_sample": False}
    prompts = ["def ", "import " * 40, "", "x"]
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": tasks_path + ".choices"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    whole = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    return {
        "pairs": model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs]),
        "rolling": model.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in DOCUMENTS]),
        "written": model.generate_until([SimpleNamespace(args=(prompt, settings)) for prompt in prompts]),
        "bad": said(model.generate_until, [SimpleNamespace(args=("x", {"num_beams": 4}))]),
        "whole": whole["results"]["local"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    train_bpe([TEXT], vocab_size=420, path=folder / "a.model")
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n\n" for task in TASKS))
    (folder / "tasks.jsonl.choices").write_text("".join(json.dumps(task) + "\n" for task in TASKS if "choices" in task))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return open_tokenizer(str(folder / "a.model"))


@pytest.fixture(scope="module")
def val_loss(folder: Path) -> float:
    """Of the trainer, at the end of a run on one process whose checkpoint the ranks open."""
    from tests.train.small_run import config_of, records_of, write_tokens  # here: each rank imports this file, not the trainer

    write_tokens(folder / "tokens")
    return float(records_of(config_of(folder, "run", steps=3, num_experts=6)).records[-1]["val_loss"])


@pytest.fixture(scope="module")
def found(folder: Path, tokenizer: Tokenizer, val_loss: float) -> list[dict[str, Any]]:
    checkpoint = str(folder / "run" / "checkpoints" / "step_00000003")
    return run_on_ranks(WORLD, jobs, str(folder / "a.model"), str(folder / "tasks.jsonl"), checkpoint)


Found = list[dict[str, Any]]


def loss_of(gpt: GPT, batches: Sequence[Batch]) -> tuple[float, int]:
    """Nats and tokens, as GPT.forward has them on one process."""
    with torch.inference_mode():
        return sum(float(gpt(b).loss) for b in batches), sum(int(b.loss_mask_BS.sum()) for b in batches)


def batch_of(tokens: Sequence[int], labels: Sequence[int]) -> Batch:
    token_BS, label_BS = torch.tensor([list(tokens)]), torch.tensor([list(labels)])
    every = torch.ones_like(token_BS, dtype=torch.bool)
    position_BS = torch.arange(len(tokens))[None]
    return Batch(token_BS, label_BS, every, every, position_BS, None, torch.zeros(1, dtype=torch.int64))


def alone(gpt: GPT, c: Continuation) -> Likelihood:
    """On one process, without padding."""
    read = (c.context + c.tokens)[:-1]
    batch = batch_of(read[-POSITIONS:], read[-POSITIONS:])
    with torch.inference_mode():
        log_SV = gpt.logits(gpt.hidden(batch)[0]).log_softmax(1)[-len(c.tokens) :]
    nats = sum(float(log_SV[i, token]) for i, token in enumerate(c.tokens))
    greedy = tuple(log_SV.argmax(1).tolist()) == c.tokens
    return Likelihood(nats, greedy, max(0, len(read) - POSITIONS))


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-6), ("float64", 1e-10)])
def test_perplexity_is_that_of_one_process(found: Found, tokenizer: Tokenizer, dtype: str, within: float) -> None:
    batches = [batch for rank in range(WORLD) for batch in batches_of_rank(rank, tokenizer.vocab_size)]
    nats, num_tokens = loss_of(gpt_of(tokenizer.vocab_size, getattr(torch, dtype)), batches)
    lengths = tokenizer.token_bytes() or []
    num_bytes = sum(lengths[label] for b in batches for label in b.labels_BS[b.loss_mask_BS].tolist())
    for rank in found:
        quality = rank[dtype]["batches"]
        assert quality == found[0][dtype]["batches"]  # alike on all ranks, bit by bit
        assert quality.nats == pytest.approx(nats, rel=within)
        assert (quality.num_tokens, quality.num_bytes) == (num_tokens, num_bytes)
        assert rank[dtype]["done"] == [1, 2, 3]


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-6), ("float64", 1e-10)])
def test_each_token_of_a_text_is_predicted_once(found: Found, tokenizer: Tokenizer, dtype: str, within: float) -> None:
    documents = [tokenizer.encode(text) for text in DOCUMENTS]
    windows = windows_of(documents, tokenizer.eod, POSITIONS)
    assert [ids[0] for ids in windows].count(tokenizer.eod) == 3 and max(map(len, windows)) == POSITIONS + 1
    nats, num_tokens = loss_of(
        gpt_of(tokenizer.vocab_size, getattr(torch, dtype)), [batch_of(ids[:-1], ids[1:]) for ids in windows]
    )
    for rank in found:
        quality = rank[dtype]["text"]
        assert quality.nats == pytest.approx(nats, rel=within)
        assert quality.num_tokens == num_tokens == sum(map(len, documents))
        assert quality.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_held_out_loss_is_what_training_called_val_loss(found: Found, val_loss: float) -> None:
    for rank in found:
        assert rank["run"].loss == pytest.approx(val_loss, rel=1e-6)
        assert rank["run"].num_tokens == 7 * 16 and rank["run"].bits_per_byte is None  # tokens without a tokenizer


def test_quality_in_other_units() -> None:
    quality = Quality(nats=200 * math.log(2), num_tokens=100, num_bytes=400)
    assert quality.loss == pytest.approx(2 * math.log(2)) and quality.perplexity == pytest.approx(4)
    assert quality.bits_per_byte == pytest.approx(0.5)
    assert replace(quality, nats=1e6).perplexity == math.inf and math.isnan(replace(quality, nats=math.nan).perplexity)


def test_log_likelihoods_are_those_of_each_text_alone_in_any_batch(found: Found, tokenizer: Tokenizer) -> None:
    gpt = gpt_of(tokenizer.vocab_size, torch.float64)
    expected = [alone(gpt, c) for c in continuations(tokenizer, gpt)]
    assert [e.greedy for e in expected[-2:]] == [True, False] and max(e.cut_tokens for e in expected) > 0
    for rank in found:
        for likelihoods in rank["likelihoods"].values():
            for got, one in zip(likelihoods, expected, strict=True):
                assert got.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-10)
                assert (got.greedy, got.cut_tokens) == (one.greedy, one.cut_tokens)


def test_task_scores_are_those_of_one_process(found: Found, folder: Path, tokenizer: Tokenizer) -> None:
    tasks = read_tasks(folder / "tasks.jsonl")
    assert tasks[2] == Cloze("from pathlib import ", "Path") and len(tasks) == len(TASKS)
    texts = [(t.context, x) for t in tasks for x in (t.choices if isinstance(t, MultipleChoice) else (t.target,))]
    gpt = gpt_of(tokenizer.vocab_size, torch.float64)
    expected = summed_up(tasks, [alone(gpt, continuation_of(tokenizer, *text)) for text in texts])
    for rank in found:
        got = rank["tasks"]
        assert got == found[0]["tasks"]
        for kind in ("multiple_choice", "cloze"):
            for name, value in asdict(getattr(got, kind)).items():
                other = asdict(getattr(expected, kind))[name]
                assert value == (pytest.approx(other, rel=1e-10) if isinstance(value, dict) else other)
        assert got.cut_tasks == expected.cut_tasks == 2 and got.cut_tokens == expected.cut_tokens > 0
        assert rank["seen"] == [(3, 5), (5, 5)]  # ten texts, two at a time


def test_scores_by_hand() -> None:
    tasks = [
        MultipleChoice("c", (" ab", " abcdef"), 1),  # likelier a byte alone
        MultipleChoice("c", ("é", "abc"), 0),  # -0.9 a byte against -1
        Cloze("c", "d"),
        MultipleChoice("c", ("x", "y", "z"), 0),  # equally likely: the first
    ]
    nats = [-2.0, -3.0, -1.8, -3.0, -1.5, -1.0, -1.0, -1.0]
    scores = summed_up(tasks, [Likelihood(n, True, 4 * (i == 2)) for i, n in enumerate(nats)])
    assert scores.multiple_choice is not None and scores.cloze is not None
    assert scores.multiple_choice.accuracy.value == pytest.approx(2 / 3)
    assert scores.multiple_choice.accuracy.standard_error == pytest.approx(1 / 3)  # the root of (1/3) / 3
    assert scores.multiple_choice.accuracy_by_bytes == Mean(1.0, 0.0)
    assert scores.multiple_choice.log_likelihood.value == pytest.approx(-5.8 / 3)
    assert scores.cloze.accuracy == Mean(1.0, None) and scores.cloze.log_likelihood == Mean(-1.5, None)
    assert (scores.cut_tasks, scores.cut_tokens) == (1, 4)
    assert summed_up(tasks[2:3], [Likelihood(-1.0, False, 0)]).multiple_choice is None


BAD_LINES = {
    "{": "expected a JSON object, not b'{'",
    "[1]": "expected a JSON object, not a list",
    '{"context": "a"}': "field 'choices' or 'target': expected one of them, the line has neither",
    '{"context": "a", "target": "b", "choices": []}': "field 'choices' or 'target': expected one of them, the line has both",
    '{"context": "a", "target": "b", "id": 3}': "field 'id': expected only context, target",
    '{"target": "b"}': "field 'context': expected a text, not nothing",
    '{"context": 3, "target": "b"}': "field 'context': expected a text, not 3",
    '{"context": "a", "target": " "}': "field 'target': expected a text with more than spaces, not \" \"",
    '{"context": "\\ud800", "target": "b"}': "field 'context': expected a text that UTF-8 can write, not \"\\ud800\"",
    '{"context": "a", "choices": ["b"], "answer": 0}': "field 'choices': expected a list of two or more texts, not [\"b\"]",
    '{"context": "a", "choices": ["b", 1], "answer": 0}': "field 'choices[1]': expected a text, not 1",
    '{"context": "a", "choices": ["b", "c"], "answer": 2}': "field 'answer': expected an index from 0 to 1, not 2",
    '{"context": "a", "choices": ["b", "c"], "answer": true}': "field 'answer': expected an index from 0 to 1, not true",
    '{"context": "a", "choices": ["b", "c"]}': "field 'answer': expected an index from 0 to 1, not nothing",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_wrong_field_is_one_line_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"context": "a", "target": "b"}\n\n' + line + "\n")
    message = said(read_tasks, path)
    assert message.startswith(f"{path}, line 3") and BAD_LINES[line] in message and "\n" not in message


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "void.txt").write_text("")
    assert "holds no task" in said(read_tasks, tmp_path / "empty")
    assert "there is no file" in said(read_tasks, tmp_path / "missing")
    assert "holds no text" in said(read_documents, tmp_path / "void.txt")
    assert "does not exist" in said(read_documents, tmp_path / "missing")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_documents(tmp_path / "a.jsonl") == ["one", "two"]


BAD = {
    "unreadable": "planted: the file is damaged",
    "no token": "there is no token to predict",
    "unequal": "was given",
    "ahead": "looks at later tokens",
    "long": "has 49 tokens, but the model reads at most 48",
    "batch": "batch_size is 0",
    "ids": "the model 256: give the tokenizer",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_on_every_rank(found: Found, case: str) -> None:
    for rank in found:
        assert BAD[case] in rank["bad"][case] and "\n" not in rank["bad"][case]


def test_no_held_out_text_is_said(folder: Path, val_loss: float, tmp_path: Path) -> None:
    source = folder / "run" / "checkpoints" / "step_00000003"
    assert open_held_out(source, num_sequences=5).num_sequences == 5
    assert "-1 sequences: choose 1 or more" in said(open_held_out, source, num_sequences=-1)
    assert "checkpoint" in said(open_held_out, tmp_path)


def test_a_continuation_is_cut_where_the_context_ends(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("from pathlib import Path")
    for context, text in (("from pathlib import", " Path"), ("from pathlib import ", "Path")):
        c = continuation_of(tokenizer, context, text)
        assert [*c.context, *c.tokens] == whole and tokenizer.decode(c.tokens) == " Path"
    assert continuation_of(tokenizer, "", "a").context == (tokenizer.eod,)
    assert tokenizer.decode(continuation_of(tokenizer, " \n", "a").tokens) == " \na"
    assert len(tokenizer.encode("import")) == 1  # so the border vanishes, and the text is cut for itself
    assert continuation_of(tokenizer, "impo", "rt").tokens


def test_token_bytes_sum_to_the_bytes_of_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    byte_level.train_from_iterator([TEXT], trainer)
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"<eos>": 0, "a": 1, "##b": 2}, unk_token="<eos>"))
    vocabulary = {"<eos>": 0, "\u2581": 1, **{f"<0x{b:02X}>": 2 + b for b in range(256)}, "a": 258, "\u2581a": 259}
    merges = [("\u2581", "a")]
    llama = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, byte_fallback=True))
    llama.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    llama.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()])
    llama.add_special_tokens(["<eos>"])
    opened = []
    for name, made in (("byte_level", byte_level), ("llama", llama), ("words", words)):
        made.save(str(tmp_path / f"{name}.json"))
        opened.append(HuggingFaceTokenizer(tmp_path / f"{name}.json"))
    for kind in (tokenizer, ByteTokenizer(), *opened[:2]):
        lengths = kind.token_bytes()
        assert lengths is not None and len(lengths) == kind.vocab_size and lengths[kind.eod] == 0
        for text in (TEXT, " a 中 🙂 a", "\u2581"):
            if kind is opened[1] and "\u2581" in text:
                continue  # which this kind takes for a space
            assert sum(lengths[i] for i in kind.encode(text)) == len(text.encode())
    assert opened[2].token_bytes() is None


@pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")
def test_the_harness_sees_what_the_model_gives_on_one_process(found: Found, tokenizer: Tokenizer) -> None:
    from lm_eval.utils import get_rolling_token_windows

    gpt = gpt_of(tokenizer.vocab_size, torch.float64)
    texts = [(task["context"], text) for task in TASKS for text in task.get("choices", [task.get("target")])]
    expected = [alone(gpt, continuation_of(tokenizer, *text)) for text in texts]
    rolling = []
    for text in DOCUMENTS:
        pairs = get_rolling_token_windows(tokenizer.encode(text), tokenizer.eod, POSITIONS, 1)
        windows = [Continuation(tuple(read[: len(read) - len(tokens) + 1]), tuple(tokens)) for read, tokens in pairs]
        rolling.append(sum(alone(gpt, window).log_likelihood for window in windows))
    written = []
    for prompt in ("def ", "import " * 40, "", "x"):
        ids = (tokenizer.encode(prompt) or [tokenizer.eod])[-(POSITIONS - 12) :]
        tokens = generate(gpt, ids, Sampling(max_tokens=12, max_positions=POSITIONS, temperature=0.0, stop_token=tokenizer.eod))
        written.append(tokenizer.decode([t for t in tokens if t != tokenizer.eod]).split("e")[0].split("zz")[0])
    for rank in found:
        of_rank, scores = rank["harness"], rank["tasks"].multiple_choice
        assert [nats for nats, _ in of_rank["pairs"]] == pytest.approx([e.log_likelihood for e in expected], rel=1e-10)
        assert [greedy for _, greedy in of_rank["pairs"]] == [e.greedy for e in expected]
        assert of_rank["rolling"] == pytest.approx(rolling, rel=1e-10)
        assert of_rank["written"] == written and len(set(written)) > 1
        assert "generation with num_beams=4" in of_rank["bad"]
        assert of_rank["whole"]["acc,none"] == pytest.approx(scores.accuracy.value)
