"""The SHA-256 of every expert: of the bytes of its rows of our tensors, in the order of their names (b1, b2, w1, w2), each row by
row.  For an expert without biases that is gate, up and down as most Hugging Face models have them, one after the other."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megalina.checkpoint.safetensors_file import raw

EXPERTS = ".experts."


class ExpertSums:
    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Any] = {}

    def add(self, name: str, first: int, rows: Tensor) -> None:
        """Rows `first` and on of the tensor `name`; of other tensors than experts' nothing is kept.  Those of one expert come in
        the order above."""
        if EXPERTS in name:
            layer = name.partition(EXPERTS)[0]
            for i, row in enumerate(rows):
                self._sums.setdefault((layer, first + i), hashlib.sha256()).update(raw(row.contiguous()))

    def found(self) -> Mapping[str, str]:
        """ "layers.0.experts.3" -> sum."""
        return {f"{layer}{EXPERTS}{e}": sum_.hexdigest() for (layer, e), sum_ in self._sums.items()}
