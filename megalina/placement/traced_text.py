"""The text of a routing trace: what the tokens of a trace were, so that their choices can be found again by them.

T tokens, those of the trace, sample after sample.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.predictors.predictor import Ids

ARRAYS = ("tokens", "positions", "documents", "logprobs", "known")  # of the file, in the order of the fields


@dataclass(frozen=True, slots=True, eq=False)
class TracedText:
    """As its reader had it.  The arrays are not copied: leave them as they are."""

    tokens_T: Ids  # token ids
    positions_T: Ids | None = None  # of each token, as the model gets them; None: its index within the sample
    documents_T: Ids | None = None  # equal within a document of the sample, which tokens can't see beyond; None: there is one
    # what the reader gave the token behind each, in nats; NaN: nothing is known
    logprobs_T: NDArray[np.floating[Any]] | None = None
    known_T: NDArray[np.bool_] | None = None  # False: the token's choices are made up, as nobody knows them; None: all are known

    def check(self, where: str, num_tokens: int) -> None:
        """ValueError, in one line, where it isn't the text of so many tokens."""
        for key, array in zip(ARRAYS, (self.tokens_T, self.positions_T, self.documents_T), strict=False):
            if array is None:
                continue
            if array.shape != (num_tokens,) or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"{where}: {key} must be integers [{num_tokens}], not {array.dtype} {list(array.shape)}")
            if array.size and int(array.min()) < 0:
                raise ValueError(f"{where}: {key} must be at least 0, but one is {int(array.min())}")
        logprobs = self.logprobs_T
        if logprobs is not None and (logprobs.shape != (num_tokens,) or not np.issubdtype(logprobs.dtype, np.floating)):
            raise ValueError(f"{where}: logprobs must be floats [{num_tokens}], not {logprobs.dtype} {list(logprobs.shape)}")
        if logprobs is not None and (above := np.nan_to_num(logprobs, nan=0.0) > 1e-3).any():
            token = int(above.argmax())
            raise ValueError(f"{where}: logprobs must be at most 0, but that behind token {token} is {float(logprobs[token]):g}")
        known = self.known_T
        if known is not None and (known.shape != (num_tokens,) or known.dtype != np.bool_):
            raise ValueError(f"{where}: known must be bool [{num_tokens}], not {known.dtype} {list(known.shape)}")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Those that there are, by their names in a file."""
        there = (self.tokens_T, self.positions_T, self.documents_T, self.logprobs_T, self.known_T)
        return {key: array for key, array in zip(ARRAYS, there, strict=True) if array is not None}
