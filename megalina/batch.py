"""A batch: the tokens of some sequences and what must be known about each.  B sequences, S tokens a sequence."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    tokens_BS: Tensor  # int64, what the model reads
    labels_BS: Tensor  # int64, the token after each
    loss_mask_BS: Tensor  # bool, False: this position's label does not count in the loss
    valid_BS: Tensor  # bool, False: padding; it goes to no expert and counts nowhere
    position_BS: Tensor  # int64, for RoPE or learned positions; starts anew at document ends if so configured
    document_BS: Tensor | None  # int64, equal within a document of the sequence; None: plain causal attention
    sample_B: Tensor  # int64, number of the sequence since the start of training: seeds dropout and noise

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(v if v is None else v.to(device, non_blocking=True) for v in self._values()))

    def split(self, size: int) -> "list[Batch]":
        """Cut into batches of `size` sequences each."""
        columns = [v if v is None else v.split(size) for v in self._values()]
        return [Batch(*(c if c is None else c[i] for c in columns)) for i in range(-(-len(self.tokens_BS) // size))]

    def _values(self) -> list[Tensor | None]:
        return [getattr(self, f.name) for f in fields(self)]
