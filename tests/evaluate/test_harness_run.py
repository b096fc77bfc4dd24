"""lm-evaluation-harness on a run: local tasks in one command, the same scores as ours, results in its format."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megalina.cli.evaluate import BAD_INPUT, main
from megalina.config import EvalConfig
from megalina.data.indexed import IndexedWriter
from megalina.data.tokenizer import ByteTokenizer
from megalina.evaluate.tasks import read_tasks, score_tasks
from megalina.tasks.task import MultipleChoice
from tests.train.small_run import config_of, records_of

ROOT = Path(__file__).resolve().parents[2]
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
LENGTH, EXAMPLES = 96, 6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small: two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a step on bytes of some source, with scores of its own."""
    folder = tmp_path_factory.mktemp("harness")
    with IndexedWriter(folder / "tokens", np.uint16) as writer:
        for source in sorted((ROOT / "megalina" / "data").glob("*.py")):
            writer.add_document([*source.read_bytes()[:6000], ByteTokenizer.eod])
    config = config_of(folder, "run", seq_len=LENGTH, steps=1, num_layers=2, bias=True)
    config = replace(config, data=replace(config.data, tokenizer="bytes"), eval=EvalConfig(interval=1, examples=EXAMPLES))
    (record,) = records_of(config).records
    (folder / "run" / "record.json").write_text(json.dumps({k: v for k, v in record.items() if k.startswith("eval/")}))
    return folder / "run"


def test_tasks_of_a_run_are_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--write-tasks", str(tmp_path / "tasks")]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 9
    tasks = read_tasks(tmp_path / "tasks" / "megalina_next_line.jsonl")
    assert len(tasks) == EXAMPLES  # as the run's own
    assert main([str(run), "--write-tasks", str(tmp_path / "more"), "--examples", "9"]) == 0
    assert len(read_tasks(tmp_path / "more" / "megalina_next_line.jsonl")) == 9


def test_without_the_harness_one_line_says_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megalina.cli.harness.find_spec", lambda name: None)
    assert main([str(run), "--lm-eval", "megalina_local"]) == BAD_INPUT
    assert capsys.readouterr().err == ("--lm-eval: lm-evaluation-harness is not installed: pip install 'megalina[lm-eval]'\n")


@needs_harness
def test_the_harness_and_our_scorer_agree_with_what_training_said(run: Path, tmp_path: Path) -> None:
    from megalina.evaluate.harness import open_harness_model
    from megalina.evaluate.harness_run import HarnessRun, run_harness

    assert main([str(run), "--write-tasks", str(tmp_path)]) == 0
    found = run_harness(HarnessRun(str(run), ["megalina_local"], include_path=str(tmp_path), batch_size=3))
    results = found["results"]
    assert {"results", "configs", "versions", "n-shot", "n-samples", "config", "task_hashes", "lm_eval_version"} <= set(results)
    assert results["model_source"] == "megalina" and results["config"]["training_step"] == 1
    assert found["name"].startswith("results_") and "megalina_cloze" in found["table"]
    record, model = json.loads((run / "record.json").read_text()), open_harness_model(run)
    for name in ("cloze", "brackets", "next_line", "arithmetic"):
        theirs = results["results"][f"megalina_{name}"]
        tasks = read_tasks(tmp_path / f"megalina_{name}.jsonl")
        assert all(isinstance(task, MultipleChoice) for task in tasks) and len(tasks) == EXAMPLES
        ours = score_tasks(model.engine, ByteTokenizer(), tasks, batch_size=4, max_positions=LENGTH).multiple_choice
        assert ours is not None
        for key, mean, own in (
            ("acc", ours.accuracy, "accuracy"),
            ("centred_acc", ours.centred_accuracy, "centred_accuracy"),
            ("bits_per_byte", ours.bits_per_byte, "bits_per_byte"),
        ):
            assert theirs[f"{key},none"] == pytest.approx(mean.value, rel=1e-5)
            assert record[f"eval/{name}/{own}"] == pytest.approx(mean.value, rel=1e-5)
            assert theirs[f"{key}_stderr,none"] == pytest.approx(record[f"eval/{name}/{own}_error"], rel=1e-4, abs=1e-6)
    model.engine.close()


@needs_harness
@pytest.mark.full
def test_in_one_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--lm-eval", "megalina_arithmetic", "--limit", "3", "--out", str(tmp_path)]) == 0
    assert "centred_acc" in capsys.readouterr().out
    (path,) = tmp_path.glob("lm_eval/*/results_*.json")
    results = json.loads(path.read_text())
    assert results["n-samples"]["megalina_arithmetic"] == {"original": EXAMPLES, "effective": 3}
    assert (
        main([str(run), "--lm-eval", "megalina_arithmetic", "--ranks", "2", "--limit", "3", "--out", str(tmp_path / "two")]) == 0
    )
    (path,) = (tmp_path / "two").glob("lm_eval/*/results_*.json")
    other = json.loads(path.read_text())
    for key, value in results["results"]["megalina_arithmetic"].items():
        assert other["results"]["megalina_arithmetic"][key] == (pytest.approx(value, rel=1e-5) if type(value) is float else value)


@needs_harness
@pytest.mark.full
def test_the_harness_own_command_knows_the_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megalina.evaluate import lm_eval

    assert main([str(run), "--write-tasks", str(tmp_path)]) == 0
    words = ["--model", "megalina", "--model_args", f"checkpoint={run},max_length=80", "--include_path", str(tmp_path)]
    monkeypatch.setattr(
        sys, "argv", ["lm_eval", *words, "--tasks", "megalina_brackets", "--output_path", str(tmp_path / "o.json")]
    )
    assert lm_eval.main() == 0
    (path,) = tmp_path.glob("o_*.json")
    assert json.loads(path.read_text())["config"]["model"] == "megalina"


@needs_harness
def test_requests_at_the_edges(run: Path) -> None:
    from megalina.evaluate.harness import HarnessModel

    model = HarnessModel.create_from_arg_obj({"checkpoint": str(run)}, {"batch_size": "auto", "device": "cuda:0"})
    assert (model.max_length, model.eot_token_id, model.rank, model.world_size) == (LENGTH, 256, 0, 1)
    pairs = [("a", ""), ("a ", ""), ("", "b"), ("", ""), ("x" * 300, "yz")]
    found = model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    assert found[0] == found[3] == (0.0, True)  # nothing to write
    space = model.loglikelihood([SimpleNamespace(args=("a", " "))])[0]
    assert found[1] == pytest.approx(space, rel=1e-5)  # at the end of a context it is scored
    assert found[4] == pytest.approx(model.loglikelihood([SimpleNamespace(args=("x" * 95, "yz"))])[0], rel=1e-5)
    rolling = model.loglikelihood_rolling([SimpleNamespace(args=("",)), SimpleNamespace(args=("b",))])
    assert rolling == pytest.approx([0.0, found[2][0]], rel=1e-5)
    long = [SimpleNamespace(args=("x" * 300, {"until": ["\n"]})), SimpleNamespace(args=("", {"max_gen_toks": 2}))]
    first, second = model.generate_until(long)
    assert "\n" not in first and len(second.encode("utf-8", "surrogateescape")) <= 6
    with pytest.raises(ValueError, match="only checkpoint, pretrained, batch_size"):
        HarnessModel.create_from_arg_string(f"checkpoint={run},dtype=float16")
    with pytest.raises(ValueError, match="give checkpoint=PATH of a run or a checkpoint, once"):
        HarnessModel.create_from_arg_string("")
    with pytest.raises(ValueError, match="max_length is 97, and the model reads at most 96"):
        HarnessModel.create_from_arg_string(f"pretrained={run},max_length=97")
    model.engine.close()


@needs_harness
@pytest.mark.full
def test_an_unknown_task_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--write-tasks", str(tmp_path)]) == 0
    capsys.readouterr()
    for words, said in (
        (["--lm-eval", "megalina_bracket", "--include-path", str(tmp_path)], "(did you mean megalina_brackets?)"),
        (["--lm-eval", "x", "--include-path", str(tmp_path / "none")], "there is no such folder"),
    ):
        assert main([str(run), *words]) == BAD_INPUT
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
