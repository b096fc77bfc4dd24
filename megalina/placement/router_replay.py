"""A router replay: the experts that somebody else's router has chosen for sequences of tokens, found again by the tokens.

So neither the order of the data nor the layout matters, and a replay for other tokens can't happen.  A reader that samples text
never reads its last token, so a sequence of the trace may lack the last token of the one that asks.

Shapes: n tokens of a sequence, L MoE layers, K experts a token.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import RoutingTrace, read_trace


class RouterReplay:
    """Of a trace that has its tokens.  ValueError where it lacks them, or has one sequence twice with other experts."""

    def __init__(self, trace: RoutingTrace):
        where = f"trace {trace.name}"
        if trace.text is None:
            raise ValueError(
                f"{where} does not say which tokens it is of, so it can't be replayed: make one with tools/record_routing.py or "
                "tools/import_routing.py"
            )
        self.trace, self._tokens_T, self._known_T = trace, trace.text.tokens_T.astype(np.int64), trace.text.known_T
        self._ends_S = np.cumsum(trace.sample_lengths_S.astype(np.int64))
        self._found: dict[bytes, int] = {}  # digest of a sequence's tokens -> its number in the trace
        for number in range(len(self._ends_S)):
            there = self._found.setdefault(_digest(self.tokens(number)), number)
            if there != number and not np.array_equal(self._choices(there), self._choices(number)):
                raise ValueError(f"{where}: sequences {there} and {number} have the same tokens and other experts: leave one out")

    def tokens(self, number: int) -> Ids:
        """int64 [n], of a sequence of the trace."""
        return self._tokens_T[self._span(number)]

    def choices(self, tokens: Ids, what: str) -> Ids:
        """[n, L, K] or [n - 1, L, K]: the experts of a sequence's tokens, -1 where nobody knows them; the last may be left out.

        ValueError, naming the sequence that is nearest to `what` and the first token that differs, where it isn't there."""
        for length in (len(tokens), len(tokens) - 1):
            number = self._found.get(_digest(tokens[:length])) if length else None
            if number is not None:
                return self._choices(number)
        raise ValueError(self._missing(tokens, what))

    def check(self, *, num_experts: int, top_k: int, layers: Sequence[int]) -> None:
        """ValueError unless the choices are of a model with this many experts, choices and these MoE layers."""
        trace = self.trace
        if trace.num_experts != num_experts:
            raise ValueError(f"it is of {trace.num_experts} experts, and model.num_experts is {num_experts}")
        if trace.top_k != top_k:
            raise ValueError(f"it has {trace.top_k} experts a token, and router.top_k is {top_k}")
        if list(trace.layers) != list(layers):
            raise ValueError(
                f"it has {trace.num_layers} MoE layers, {_listed(trace.layers)}, and the model {len(layers)}, {_listed(layers)}"
            )

    def _choices(self, number: int) -> Ids:
        ids_nLK = self.trace.expert_ids_TLK[self._span(number)]
        if self._known_T is None:
            return ids_nLK
        return np.where(self._known_T[self._span(number), None, None], ids_nLK.astype(np.int32), -1)

    def _span(self, number: int) -> slice:
        end = int(self._ends_S[number])
        return slice(end - int(self.trace.sample_lengths_S[number]), end)

    def _missing(self, tokens: Ids, what: str) -> str:
        common_S = [_common(self.tokens(number), tokens) for number in range(len(self._ends_S))]
        number = int(np.argmax(common_S))
        nearest, place = self.tokens(number), common_S[number]
        if place < min(len(nearest), len(tokens)):
            differs = f"first differs in token {place}, {int(nearest[place])} instead of {int(tokens[place])}"
        else:
            differs = f"begins alike, but has {len(nearest)} tokens instead of {len(tokens)}"
        return (
            f"{what} isn't among the {len(self._ends_S)} sequences of trace {self.trace.name}: the one nearest to it, number "
            f"{number}, {differs}; record the routing of this text"
        )


def read_replay(path: Path, setting: str, *, num_experts: int, top_k: int, layers: Sequence[int]) -> RouterReplay:
    """ValueError, naming `setting` and the file, where there is no such file, it is damaged, or of another model."""
    try:
        replay = RouterReplay(read_trace(path))
        replay.check(num_experts=num_experts, top_k=top_k, layers=layers)
    except OSError as error:
        raise ValueError(f"{setting}={path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{setting}={path}: {error}") from error
    return replay


def _digest(tokens: Ids) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


def _common(a: Ids, b: Ids) -> int:
    """Tokens at the beginning that are alike."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def _listed(layers: Sequence[int]) -> str:
    """Few numbers in full, many by their ends."""
    return ", ".join(map(str, layers)) if len(layers) <= 8 else f"{layers[0]} to {layers[-1]}"
