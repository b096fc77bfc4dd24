"""Local tasks as files of lm-evaluation-harness: they hold what our own scorer is given, and are scored alike."""

import random
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megalina.evaluate.tasks import read_tasks
from megalina.tasks.harness_files import write_tasks
from megalina.tasks.harness_functions import process_results
from megalina.tasks.local import LocalTask, make_tasks
from megalina.tasks.scores import choice_scores
from megalina.tasks.task import MultipleChoice

TASK = LocalTask("brackets", (MultipleChoice('a\n("é', (")", '\n"]'), 1), MultipleChoice("b", (" x", " yz", " u"), 0)))


class Loader(yaml.SafeLoader):
    """Knows `!function`."""


Loader.add_constructor("!function", lambda loader, node: f"!{node.value}")


def test_files_hold_the_examples(tmp_path: Path) -> None:
    written = write_tasks([TASK], tmp_path / "new")
    assert [path.name for path in written] == ["megalina_tasks.py", "megalina_brackets.yaml", "megalina_brackets.jsonl"]
    assert tuple(read_tasks(written[2])) == TASK.examples
    config = yaml.load(written[1].read_text(), Loader)
    assert (config["task"], config["tag"], config["target_delimiter"]) == ("megalina_brackets", "megalina_local", "")
    assert config["metadata"]["sha256"] == TASK.sha256 and config["custom_dataset"] == "!megalina_tasks.documents"
    functions = runpy.run_path(str(written[0]))
    datasets = pytest.importorskip("datasets")
    (split,) = functions["documents"]("megalina_brackets.jsonl", version=1).values()
    assert isinstance(split, datasets.Dataset) and split[0]["choices"] == list(TASK.examples[0].choices)


def test_the_harness_scores_as_we_do() -> None:
    draw = random.Random(0)
    examples = make_tasks(["arithmetic"], [], examples=20, seed=0)[0].examples
    nats = [[draw.uniform(-9, 0) for _ in example.choices] for example in examples]
    ours = choice_scores(examples, nats)
    theirs = [
        process_results({field.name: getattr(e, field.name) for field in fields(e)}, [(n, False) for n in own])
        for e, own in zip(examples, nats, strict=True)
    ]
    for name, mean in (("acc", ours.accuracy), ("centred_acc", ours.centred_accuracy), ("bits_per_byte", ours.bits_per_byte)):
        assert sum(row[name] for row in theirs) / 20 == pytest.approx(mean.value, rel=1e-12)
