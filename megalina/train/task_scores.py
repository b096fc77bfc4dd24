"""Scores on local tasks while a model is trained, in whatever layout it is.

Choices of all tasks are sequences of their own, cut in front where they are longer than those of training, and padded behind.

B sequences of a rank at a time, S tokens a sequence.
"""

import math
import time
from collections.abc import Sequence

import torch

from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.data.source import TokenData
from megalina.mesh import Mesh, all_gather_object
from megalina.parallel.trainable import Trainable
from megalina.tasks.continuation import Continuation, continuation_of
from megalina.tasks.local import OF_NO_TEXT, LocalTask, make_tasks
from megalina.tasks.scores import ChoiceScores, choice_scores

SHOWN = ("accuracy", "centred_accuracy", "bits_per_byte")  # each with its standard error
ROUNDED_TO = 8  # tokens a sequence are a multiple of this, so that few lengths come


def tasks_of(config: PretrainConfig, data: TokenData) -> list[LocalTask]:
    """What `eval` asks for.  ValueError where the data don't give it, or an answer is longer than a sequence."""
    chosen = config.eval
    if data.tokenizer is None:
        raise ValueError("eval.interval asks for tasks, and the data are token ids without a tokenizer: set data.tokenizer, or 0")
    if data.held_out is None and (text := [name for name in chosen.tasks if name not in OF_NO_TEXT]):
        raise ValueError(
            f"eval.tasks: {', '.join(text)} need held-out text, and data.split={config.data.split} leaves none: hold some out, "
            f"or choose {', '.join(OF_NO_TEXT)}"
        )
    documents = data.held_out.documents(seed=chosen.seed) if data.held_out is not None else []
    tasks = make_tasks(chosen.tasks, documents, examples=chosen.examples, seed=chosen.seed)
    for task in tasks:
        for example in task.examples:
            longest = max(len(continuation_of(data.tokenizer, example.context, text).tokens) for text in example.choices)
            if longest > config.train.seq_len:
                raise ValueError(
                    f"eval.tasks: a choice of {task.name} has {longest} tokens, train.seq_len is {config.train.seq_len}: make it "
                    f"{longest} at least, or leave {task.name} out"
                )
    return tasks


class TaskScores:
    """`eval` of a configuration, on all ranks alike."""

    def __init__(self, config: PretrainConfig, data: TokenData, mesh: Mesh):
        """All ranks together.  ValueError as `tasks_of`, and where ranks have other text."""
        self.tasks = tasks_of(config, data)
        self._length, self._sequences = config.train.seq_len, config.train.micro_batch_size
        tokenizer = data.tokenizer
        assert tokenizer is not None
        self._continuations = [
            continuation_of(tokenizer, e.context, text) for task in self.tasks for e in task.examples for text in e.choices
        ]
        own = [task.sha256 for task in self.tasks]
        if different := [rank for rank, other in enumerate(all_gather_object(mesh, own)) if other != own]:
            raise ValueError(f"eval: rank {different[0]} has other held-out text than rank {mesh.world.rank}: give all the same")

    @property
    def description(self) -> str:
        """A line for the log."""
        return "tasks: " + ", ".join(f"{len(t.examples)} of {t.name} ({t.sha256[:8]})" for t in self.tasks)

    def record(self, trainable: Trainable, device: torch.device) -> dict[str, float]:
        """What a step's record has of it: `eval/TASK/accuracy` and the rest of `SHOWN`, and `eval/seconds`.

        All ranks together."""
        began_s = time.perf_counter()
        out = {}
        for name, scores in self.scores(trainable, device).items():
            for shown in SHOWN:
                mean = getattr(scores, shown)
                out[f"eval/{name}/{shown}"] = mean.value
                if mean.standard_error is not None:
                    out[f"eval/{name}/{shown}_error"] = mean.standard_error
        return {**out, "eval/seconds": time.perf_counter() - began_s}

    def scores(self, trainable: Trainable, device: torch.device) -> dict[str, ChoiceScores]:
        """Of each task, the same on all ranks, which call it together."""
        rest, out = iter(self._nats(trainable, device)), {}
        for task in self.tasks:
            nats = [[next(rest) for _ in example.choices] for example in task.examples]
            out[task.name] = choice_scores(task.examples, nats)
        return out

    def _nats(self, trainable: Trainable, device: torch.device) -> list[float]:
        """Log-likelihood of each continuation."""
        given, mesh, size = self._continuations, trainable.mesh, self._sequences
        unit = math.lcm(ROUNDED_TO, 2 * mesh.cp.size) * mesh.tp.size
        order = sorted(range(len(given)), key=lambda i: (-len(given[i].read(self._length)), i))
        nats = [0.0] * len(given)
        for first in range(0, len(order), size * mesh.readers):
            numbers = order[first : first + size * mesh.readers]
            longest = len(given[numbers[0]].read(self._length))
            length = min(self._length, -(-longest // unit) * unit)
            batch = batch_of([given[i] for i in _own(numbers, mesh, size)], size, length)
            losses = trainable.score(batch.to(device)).tolist()
            for i, loss in zip(numbers, losses, strict=False):  # behind the last one is padding
                nats[i] = -loss
        return nats


def _own(numbers: Sequence[int], mesh: Mesh, size: int) -> Sequence[int]:
    return numbers[mesh.reader * size : (mesh.reader + 1) * size]


def batch_of(continuations: Sequence[Continuation], sequences: int, length: int) -> Batch:
    """Their tokens as labels, in so many `sequences` of `length` tokens; those beyond the last continuation are padding."""
    token_BS = torch.zeros(sequences, length, dtype=torch.int64)
    label_BS, counts_BS = torch.zeros_like(token_BS), torch.zeros_like(token_BS, dtype=torch.bool)
    valid_BS = torch.zeros_like(counts_BS)
    for b, continuation in enumerate(continuations):
        read = continuation.read(length)
        scored = slice(len(read) - len(continuation.tokens), len(read))
        token_BS[b, : len(read)] = torch.tensor(read)
        label_BS[b, scored] = torch.tensor(continuation.tokens)
        counts_BS[b, scored] = True
        valid_BS[b, : len(read)] = True
    position_BS = torch.arange(length).repeat(sequences, 1)
    return Batch(token_BS, label_BS, counts_BS, valid_BS, position_BS, None, torch.zeros(sequences, dtype=torch.int64))
