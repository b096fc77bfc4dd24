"""Tasks: multiple choice and cloze, from a local file of JSON lines, and how many of them a model gets right.

A line is one task, with just these fields.  What is scored follows the context as it stands, so one of them has the space:

    {"context": "The capital of France is", "choices": [" Rome", " Paris"], "answer": 1}      answer: an index, from 0
    {"context": "Two, four, six,", "target": " eight"}                                        cloze
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalina.data.tokenizer import Tokenizer
from megalina.evaluate.likelihood import Likelihood, Progress, check_tokenizer, log_likelihoods, no_progress
from megalina.serve.engine import Engine
from megalina.tasks.continuation import continuation_of
from megalina.tasks.scores import ChoiceScores, Mean, choice_scores, mean_of
from megalina.tasks.task import Cloze, MultipleChoice, Task, texts_of

FIELDS = {"choices": ("context", "choices", "answer"), "target": ("context", "target")}  # by the field that tells the kind


@dataclass(frozen=True, slots=True)
class ClozeScores:
    num_tasks: int
    accuracy: Mean  # greedy decoding writes exactly the target's tokens
    log_likelihood: Mean  # of the target, nats


@dataclass(frozen=True, slots=True)
class TaskScores:
    multiple_choice: ChoiceScores | None  # None: there was no such task
    cloze: ClozeScores | None
    cut_tasks: int  # whose context was too long for the model and was cut in front
    cut_tokens: int  # most that were cut from one


def read_tasks(path: Path) -> list[Task]:
    """ValueError with file, line, field and what was expected, for the first line that isn't a task; empty lines are none."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give JSON lines with tasks")
    tasks = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if raw.strip():
            tasks.append(_task_of(raw, f"{path}, line {number}"))
    if not tasks:
        raise ValueError(f"{path} holds no task: give a line of JSON for each")
    return tasks


def check_tasks(tasks: Sequence[Task], tokenizer: Tokenizer, *, num_ids: int, max_positions: int) -> None:
    """ValueError for what `score_tasks` would refuse, before there is an engine; `num_ids`: that the model has."""
    if tokenizer.vocab_size > num_ids:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {num_ids}: give the tokenizer it was trained with"
        )
    for i, task in enumerate(tasks, start=1):
        for text in texts_of(task):
            if (length := len(continuation_of(tokenizer, task.context, text).tokens)) > max_positions:
                raise ValueError(
                    f"task {i} has a text of {length} tokens after its context ({_shown(text)}), the model reads at most "
                    f"{max_positions}: shorten it"
                )


def score_tasks(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    max_positions: int,
    progress: Progress = no_progress,
) -> TaskScores:
    """All ranks call it together, with the same tasks, and get the same.

    `batch_size`: texts of a rank at a time; `progress`: in batches of all ranks.  ValueError as `log_likelihoods`, and for a
    tokenizer of more ids than the model has."""
    check_tokenizer(engine, tokenizer)
    texts = [(task.context, text) for task in tasks for text in texts_of(task)]
    continuations = [continuation_of(tokenizer, context, text) for context, text in texts]
    found = log_likelihoods(
        engine,
        continuations,
        batch_size=batch_size,
        max_positions=max_positions,
        num_ids=tokenizer.vocab_size,
        progress=progress,
    )
    return summed_up(tasks, found)


def summed_up(tasks: Sequence[Task], found: Sequence[Likelihood]) -> TaskScores:
    """`found`: of each task's texts in turn, choices in their order."""
    rest = iter(found)
    scored = [(task, [next(rest) for _ in texts_of(task)]) for task in tasks]
    choice = [(task, [found.log_likelihood for found in own]) for task, own in scored if isinstance(task, MultipleChoice)]
    cloze = [(float(own[0].greedy), own[0].log_likelihood) for task, own in scored if isinstance(task, Cloze)]
    cut = [max(likelihood.cut_tokens for likelihood in own) for _, own in scored]
    return TaskScores(
        choice_scores(*zip(*choice, strict=True)) if choice else None,
        ClozeScores(len(cloze), *(mean_of(column) for column in zip(*cloze, strict=True))) if cloze else None,
        cut_tasks=sum(tokens > 0 for tokens in cut),
        cut_tokens=max(cut, default=0),
    )


def _task_of(raw: bytes, place: str) -> Task:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: expected a JSON object, not {raw[:60]!r} ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object, not a {type(record).__name__}")
    kinds = [field for field in FIELDS if field in record]
    if len(kinds) != 1:
        has = "has both" if kinds else "has neither"
        raise ValueError(f"{place}, field 'choices' or 'target': expected one of them, the line {has}")
    fields = FIELDS[kinds[0]]
    if unknown := [field for field in record if field not in fields]:
        raise ValueError(f"{place}, field {unknown[0]!r}: expected only {', '.join(fields)}")
    context = _text(record, "context", place)
    if kinds[0] == "target":
        return Cloze(context, _scored_text(record["target"], "target", place))
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{place}, field 'choices': expected a list of two or more texts, not {_shown(choices)}")
    texts = tuple(_scored_text(text, f"choices[{i}]", place) for i, text in enumerate(choices))
    answer = record.get("answer")
    if type(answer) is not int or not 0 <= answer < len(texts):  # True is an int, too
        what = _shown(answer) if "answer" in record else "nothing"
        raise ValueError(f"{place}, field 'answer': expected an index from 0 to {len(texts) - 1}, not {what}")
    return MultipleChoice(context, texts, answer)


def _scored_text(value: Any, field: str, place: str) -> str:
    text = _text({field: value}, field, place)
    if not text.strip():
        raise ValueError(f"{place}, field '{field}': expected a text with more than spaces, not {_shown(text)}")
    return text


def _text(record: Mapping[str, Any], field: str, place: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{place}, field '{field}': expected a text, not {_shown(value) if field in record else 'nothing'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}, field '{field}': expected a text that UTF-8 can write, not {_shown(value)}") from error
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)  # on one line, in ASCII
    return text if len(text) <= 60 else text[:57] + "..."
