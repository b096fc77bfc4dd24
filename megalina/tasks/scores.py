"""Scores: how many answers a model gets right, and how many bits the right ones cost it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megalina.tasks.task import MultipleChoice


@dataclass(frozen=True, slots=True)
class Mean:
    value: float
    standard_error: float | None  # sample deviation over the root of the number of tasks; None of a single one


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    num_tasks: int
    accuracy: Mean  # the likeliest choice is the right one; of equally likely ones the first counts
    accuracy_by_bytes: Mean  # likeliest by log-likelihood a byte (UTF-8, spaces in front don't count)
    centred_accuracy: Mean  # 0: as by chance, 1: all right; (accuracy - chance) / (1 - chance), task by task
    log_likelihood: Mean  # of the right choice, nats
    bits_per_byte: Mean  # of the right choice: its bits over its bytes, task by task; comparable between tokenizers


def mean_of(values: Sequence[float]) -> Mean:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(statistics.fmean(values), error)


def choice_scores(tasks: Sequence[MultipleChoice], nats: Sequence[Sequence[float]]) -> ChoiceScores:
    """`nats`: of each task's choices, their log-likelihoods."""
    rows = [_of_one(task, own) for task, own in zip(tasks, nats, strict=True)]
    return ChoiceScores(len(rows), *(mean_of(column) for column in zip(*rows, strict=True)))


def _of_one(task: MultipleChoice, nats: Sequence[float]) -> tuple[float, float, float, float, float]:
    by_bytes = [n / len(text.lstrip().encode()) for n, text in zip(nats, task.choices, strict=True)]
    right, right_by_bytes = (float(values.index(max(values)) == task.answer) for values in (list(nats), by_bytes))
    own = nats[task.answer]
    centred = (right - task.chance) / (1 - task.chance)
    return right, right_by_bytes, centred, own, -own / math.log(2) / task.answer_bytes
