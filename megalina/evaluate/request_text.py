"""The served text of an evaluation: batches to be timed, prompts, and what a profile is recorded from.

It is the run's held-out text, or one that somebody gives, in sequences of one length.  A profile comes from its first half,
timed batches from the second, so that what was foreseen was not seen before.

Shapes: B sequences, S tokens a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.data.source import Samples
from megalina.data.tokenizer import Tokenizer
from megalina.evaluate.perplexity import HeldOut, windows_of
from megalina.mesh import Axis

LONGEST_PROMPT = 32
PER_TOKEN = ("tokens_BS", "labels_BS", "loss_mask_BS", "valid_BS", "position_BS", "document_BS", "replay_BSLK")


class Windows:
    """Sequences of one length, cut from a text; after the last the first comes again."""

    def __init__(self, windows: Sequence[Sequence[int]], length: int):
        """`windows` as `windows_of`; a text shorter than a sequence is repeated."""
        whole = [list(window) for window in windows if len(window) == length + 1]
        tokens = [token for window in windows for token in window]
        self._windows = whole or [(tokens * (-(-(length + 1) // len(tokens))))[: length + 1]]
        self.num_sequences = len(self._windows)

    def batch(self, first: int, count: int, stride: int = 1) -> Batch:
        token_Bs = torch.tensor([self._windows[(first + stride * i) % self.num_sequences] for i in range(count)])
        read_BS = token_Bs[:, :-1]
        everything_BS = torch.ones_like(read_BS, dtype=torch.bool)
        position_BS = torch.arange(read_BS.shape[1]).expand_as(read_BS)
        return Batch(
            read_BS, token_Bs[:, 1:], everything_BS, everything_BS, position_BS, None, torch.zeros(count, dtype=torch.int64)
        )


@dataclass(frozen=True, slots=True)
class ServedText:
    samples: Samples
    length: int  # tokens of a sequence
    world: Axis

    def timed(self, number: int, sequences: int) -> Batch:
        """This rank's part of a batch, of the second half of the text; after its end it begins anew."""
        half = self.samples.num_sequences // 2
        at = (number * self.world.size + self.world.rank) * sequences
        return self._batch(half, self.samples.num_sequences - half, at, sequences)

    def profiled(self, number: int, sequences: int) -> Batch:
        """This rank's part of a batch of the first half."""
        at = (number * self.world.size + self.world.rank) * sequences
        return self._batch(0, self.num_profiled, at, sequences)

    @property
    def num_profiled(self) -> int:
        """Sequences of the first half."""
        return max(1, self.samples.num_sequences // 2)

    def prompts(self, number: int, sequences: int, *, room: int) -> list[list[int]]:
        """The beginnings of a batch's sequences, of at most `room` tokens."""
        length = max(1, min(LONGEST_PROMPT, self.length, room))
        found: list[list[int]] = self.timed(number, sequences).tokens_BS[:, :length].tolist()
        return found

    def _batch(self, begin: int, room: int, at: int, count: int) -> Batch:
        """`count` of the `room` sequences from `begin` on; those that are left where there are fewer."""
        first = begin + at % max(1, room - count + 1)
        return _cut(self.samples.batch(first, min(count, room)), self.length)


def text_of_run(held_out: HeldOut, world: Axis, *, length: int = 0) -> ServedText:
    """`length`: tokens of a sequence; 0: as in training.  ValueError where the run's sequences are shorter."""
    whole = held_out.samples.batch(0, 1).tokens_BS.shape[1]
    if length > whole:
        raise ValueError(f"sequences of {length} tokens: those of the run have {whole}; shorten them, or give a text")
    return ServedText(held_out.samples, length or whole, world)


def given_text(documents: Sequence[str], tokenizer: Tokenizer, world: Axis, *, length: int) -> ServedText:
    """`length`: tokens of a sequence."""
    windows = windows_of([tokenizer.encode(text) for text in documents], tokenizer.eod, length)
    return ServedText(Windows(windows, length), length, world)


def _cut(batch: Batch, length: int) -> Batch:
    """The beginnings of the sequences."""

    def cut(name: str, value: Tensor | None) -> Tensor | None:
        return value[:, :length] if value is not None and name in PER_TOKEN else value

    return Batch(**{f.name: cut(f.name, getattr(batch, f.name)) for f in fields(Batch)})  # type: ignore[arg-type]
