"""Path table predictor: each token is expected to do what those did that came the same path (Lina, section 5).

A token adds its path's distribution over experts, so the features are the rows that the experts are expected to get, and a batch
is expected to be their sum.  Paths that the profile doesn't know are looked up one layer shorter, down to the layer's marginal.
Learns nothing online: the profile is counted before (`megalina.placement.path_counts`).

Shapes: T tokens of a rank, K choices a token, E experts, P paths of a length in a layer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.path_counts import Int64s, PathTable, Profile, path_codes
from megalina.placement.predictors.predictor import Floats, Ids, Seen


@dataclass(frozen=True, slots=True, eq=False)
class PathShares:
    """What a token that came a path is expected to choose, for paths of one length."""

    codes_P: Int64s  # rising
    shares_PE: NDArray[np.float32]  # each row sums to 1, or to less where only some experts are kept and not renormalised


class PathTablePredictor:
    """`longest`: paths of up to so many layers (None: as many as the profile has).  `kept`: only a path's so many likeliest
    experts count, of equals the lower ids (the paper: the gate's k; None: all).  `renormalise`: these then sum to 1, so that a
    token counts the same whatever its path; without it, as in the paper, they keep their probabilities.  `least_rows`: a path by
    which fewer rows came in the profile counts as not met.

    ValueError where the profile is empty, or has no paths so long."""

    def __init__(
        self,
        profile: Profile,
        *,
        longest: int | None = None,
        kept: int | None = None,
        renormalise: bool = False,
        least_rows: int = 1,
    ):
        if longest is not None and not 1 <= longest <= profile.longest:
            raise ValueError(f"paths of {longest} layers: the profile has those of 1 to {profile.longest}; profile longer ones")
        if kept is not None and not 1 <= kept <= profile.num_experts:
            raise ValueError(f"{kept} experts of a path are to be kept: take 1 to {profile.num_experts}")
        if empty := [layer for layer, tables in enumerate(profile.tables) if not tables[0].counts_PE.any()]:
            raise ValueError(f"the profile has counted nothing in MoE layers {empty}: it needs more than {profile.tokens} tokens")
        self.num_experts = profile.num_experts
        lengths = 1 + (profile.longest if longest is None else longest)
        self._shares = tuple(
            tuple(
                _shares(table, kept=kept, renormalise=renormalise, least_rows=least_rows if length else 1)
                for length, table in enumerate(tables[:lengths])
            )
            for tables in profile.tables
        )
        self._marginals = tuple(
            tables[0].counts_PE[0] / tables[0].counts_PE[0].sum() for tables in profile.tables
        )  # whole ones, whatever is kept

    def start(self, layer: int) -> None:
        return None

    def features(self, layer: int, seen: Seen) -> Floats:
        """[E], rows expected of this rank's tokens, in units of a token's.  Before the first layer nothing is known: zeros."""
        if not seen.chosen or not len(seen.chosen[-1]):
            return np.zeros(self.num_experts)
        chosen = seen.chosen
        longest = min(len(chosen), len(self._shares[layer]) - 1)
        chosen = chosen[len(chosen) - longest :]
        there_T = (chosen[-1] != self.num_experts).any(axis=1)
        if not there_T.all():  # padding
            chosen = tuple(chosen_TK[there_T] for chosen_TK in chosen)
        sum_E = np.zeros(self.num_experts)
        codes_T = path_codes(chosen, longest, self.num_experts)
        for length in range(longest, -1, -1):
            shares = self._shares[layer][length]
            if length == 0:
                codes_T = np.zeros_like(codes_T)
            elif length < longest:
                codes_T = codes_T % (self.num_experts + 1) ** length  # without the earliest layer
            if not len(shares.codes_P):
                continue
            at_T = np.searchsorted(shares.codes_P, codes_T)
            at_T[at_T == len(shares.codes_P)] = 0
            found_T = shares.codes_P[at_T] == codes_T
            tokens_P = np.bincount(at_T[found_T], minlength=len(shares.codes_P))
            met = np.flatnonzero(tokens_P)
            sum_E += tokens_P[met].astype(np.float32) @ shares.shares_PE[met]
            codes_T = codes_T[~found_T]
            if not len(codes_T):
                break
        return sum_E

    def expect(self, layer: int, features: Floats, state: Any) -> Floats:
        """The features as shares; the layer's marginal where there is nothing to go by."""
        total = float(features.sum())
        return features / total if total > 0 else self._marginals[layer].copy()

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        return np.zeros(0)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Any) -> Any:
        return state


def _shares(table: PathTable, *, kept: int | None, renormalise: bool, least_rows: int) -> PathShares:
    rows_P = table.counts_PE.sum(axis=1)
    enough_P = rows_P >= max(1, least_rows)
    counts_PE, rows_P = table.counts_PE[enough_P], rows_P[enough_P]
    if kept is not None and kept < counts_PE.shape[1]:
        likeliest_PE = np.argsort(-counts_PE, axis=1, kind="stable")
        counts_PE = counts_PE.copy()
        np.put_along_axis(counts_PE, likeliest_PE[:, kept:], 0, axis=1)
        if renormalise:
            rows_P = counts_PE.sum(axis=1)
    return PathShares(table.codes_P[enough_P], (counts_PE / rows_P[:, None]).astype(np.float32))
