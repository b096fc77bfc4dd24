"""A batch: the tokens of some sequences and what must be known about each.  B sequences, S tokens a sequence."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

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
        return self._map(lambda v: v.to(device, non_blocking=True))

    def split(self, size: int) -> "list[Batch]":
        """Cut into batches of `size` sequences each."""
        return [self._map(lambda v, i=i: v[i : i + size]) for i in range(0, len(self.tokens_BS), size)]  # type: ignore[misc]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return Batch(**changed)
