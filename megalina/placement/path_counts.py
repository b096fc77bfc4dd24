"""Path profile: what tokens choose next, by the path that they have come (Lina, section 5).

A token's path of length j is its first choices in the last j MoE layers.  For each layer and each length from 0 to `longest`
the profile counts the choices of the tokens that came each path.  Length 0 is one path, that all share: the layer's marginal.
A path that was not met is looked up one layer shorter, and so on: each table counts all tokens, so nothing is lost by that.

Memory is bounded: there are as many paths of length j as E ** j, but at most `most_paths` are kept of a length and layer.  Where
there are more, only the three quarters of `most_paths` that most rows came by stay, of equal ones those with the lower code; the
free quarter gives new paths the time to grow.  A layer's tables take at most (1 + longest x most_paths) x 8 x (1 + E) bytes, and
of length 1 there are no more than E + 1 paths: with 128 experts, longest 3 and 4096 paths at most 8.6 MB a layer.

A path is one number, its code, in base E + 1, the latest choice as the last digit.  E as a digit says that the token went to
nobody (dropped).  A token whose last layer, all K, went to nobody is padding or as good as, and isn't counted.

Shapes: T tokens, L MoE layers, K choices a token, E experts, P paths of a length in a layer, sorted by code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import RoutingTrace

Int64s = NDArray[np.int64]

LONGEST = 3  # Lina's l (section 7.1)
MOST_PATHS = 4096  # all that Lina's 16 experts can have


@dataclass(frozen=True, slots=True, eq=False)
class PathTable:
    """Choices of a layer by the path before it, for paths of one length.  `pruned`: some paths have been left out."""

    codes_P: Int64s  # rising
    counts_PE: Int64s
    pruned: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """What was counted, and of which model."""

    num_experts: int
    top_k: int
    layers: tuple[int, ...]  # of the model: the MoE layers
    longest: int
    most_paths: int
    tokens: int  # counted
    tables: tuple[tuple[PathTable, ...], ...]  # [layer][length]; of length 0 to min(layer, longest)

    @property
    def pruned(self) -> bool:
        return any(table.pruned for tables in self.tables for table in tables)

    @property
    def num_bytes(self) -> int:
        return sum(table.codes_P.nbytes + table.counts_PE.nbytes for tables in self.tables for table in tables)


def empty_profile(
    *,
    num_experts: int,
    top_k: int,
    layers: Sequence[int],
    longest: int = LONGEST,
    most_paths: int = MOST_PATHS,
) -> Profile:
    """Nothing counted yet.  ValueError where a path's code has no room in 63 bits, or the numbers make no sense."""
    if not 1 <= top_k <= num_experts or not layers:
        raise ValueError(f"a profile needs layers and 1 to {num_experts} choices a token, not {len(layers)} layers, top-{top_k}")
    if longest < 1 or most_paths < 4:
        raise ValueError(f"longest path {longest}, most_paths {most_paths}: they must be at least 1 and 4")
    if longest > 62 or (num_experts + 1) ** longest >= 2**63:
        raise ValueError(f"paths of {longest} layers of {num_experts} experts have no room in 63 bits: lower the longest path")
    none = PathTable(np.zeros(0, np.int64), np.zeros((0, num_experts), np.int64))
    tables = tuple((none,) * (1 + min(layer, longest)) for layer in range(len(layers)))
    return Profile(num_experts, top_k, tuple(layers), longest, most_paths, 0, tables)


def profile_of(trace: RoutingTrace, *, longest: int = LONGEST, most_paths: int = MOST_PATHS) -> Profile:
    """The whole trace counted.  Where its choices aren't sorted by weight, take `routing_trace.best_first` before."""
    empty = empty_profile(
        num_experts=trace.num_experts, top_k=trace.top_k, layers=trace.layers, longest=longest, most_paths=most_paths
    )
    return counted(empty, tuple(np.moveaxis(trace.expert_ids_TLK, 1, 0)))


def path_codes(chosen: Sequence[Ids], length: int, num_experts: int) -> Int64s:
    """[T], the code of each token's path through the last `length` of the layers, each [T, K].

    The first choice that is an expert counts (the id `num_experts` is none)."""
    codes_T = np.zeros(len(chosen[-1]) if chosen else 0, np.int64)
    for chosen_TK in chosen[len(chosen) - length :]:
        codes_T *= num_experts + 1
        codes_T += first_choice(chosen_TK, num_experts)
    return codes_T


def first_choice(chosen_TK: Ids, num_experts: int) -> Ids:
    """[T], the first that is an expert, or `num_experts` where none is."""
    first_T = chosen_TK[:, 0]
    if chosen_TK.shape[1] == 1 or not (first_T == num_experts).any():
        return first_T
    column_T = (chosen_TK != num_experts).argmax(axis=1)
    return np.take_along_axis(chosen_TK, column_T[:, None], axis=1)[:, 0]


def counted(profile: Profile, chosen: Sequence[Ids]) -> Profile:
    """With the choices of some tokens, [T, K] of each MoE layer, the first layer's first; ids of `num_experts` are no expert."""
    if len(chosen) != len(profile.layers):
        raise ValueError(f"choices of {len(chosen)} layers can't be counted in a profile of {len(profile.layers)}")
    tokens = len(chosen[0])
    for layer, chosen_TK in enumerate(chosen):
        if chosen_TK.shape != (tokens, profile.top_k):
            raise ValueError(
                f"layer {layer}'s choices are {list(chosen_TK.shape)}, but the profile counts [{tokens}, {profile.top_k}]"
            )
        if tokens and not 0 <= int(chosen_TK.min()) <= int(chosen_TK.max()) <= profile.num_experts:
            raise ValueError(
                f"layer {layer}'s choices go from {int(chosen_TK.min())} to {int(chosen_TK.max())}, but the profile has "
                f"experts 0 to {profile.num_experts - 1}"
            )
    tables = tuple(
        tuple(
            _added(table, _table(chosen, layer, length, profile.num_experts), profile.most_paths)
            for length, table in enumerate(of_layer)
        )
        for layer, of_layer in enumerate(profile.tables)
    )
    return replace(profile, tokens=profile.tokens + tokens, tables=tables)


# tables


def _table(chosen: Sequence[Ids], layer: int, length: int, num_experts: int) -> PathTable:
    """Of these tokens alone, not yet pruned."""
    chosen_TK = chosen[layer]
    codes_T = path_codes(chosen[:layer], length, num_experts) if layer else np.zeros(len(chosen_TK), np.int64)
    if layer:  # padding
        there_T = (chosen[layer - 1] != num_experts).any(axis=1)
        if not there_T.all():
            chosen_TK, codes_T = chosen_TK[there_T], codes_T[there_T]
    codes_P, path_T = np.unique(codes_T, return_inverse=True)
    # nobody is counted as one more expert, who is then left out
    flat = path_T.reshape(-1, 1) * (num_experts + 1) + chosen_TK
    counts = np.bincount(flat.ravel(), minlength=len(codes_P) * (num_experts + 1)).reshape(-1, num_experts + 1)
    return PathTable(codes_P, counts[:, :num_experts].astype(np.int64))


def _added(a: PathTable, b: PathTable, most_paths: int) -> PathTable:
    codes_P = np.union1d(a.codes_P, b.codes_P)
    counts_PE = np.zeros((len(codes_P), a.counts_PE.shape[1]), np.int64)
    counts_PE[np.searchsorted(codes_P, a.codes_P)] += a.counts_PE  # codes of one table are distinct
    counts_PE[np.searchsorted(codes_P, b.codes_P)] += b.counts_PE
    pruned = a.pruned or b.pruned
    if len(codes_P) > most_paths:
        most_first = np.argsort(-counts_PE.sum(axis=1), kind="stable")
        stay = np.sort(most_first[: most_paths - most_paths // 4])
        codes_P, counts_PE, pruned = codes_P[stay], counts_PE[stay], True
    return PathTable(codes_P, counts_PE, pruned)
