"""Workloads: routing made to order, top-1, whose loads are known exactly, in whole rows, before a token is drawn.

    balanced        every expert gets as many rows
    hot_expert      one expert gets a share of all rows
    hot_rank        the experts of one device get a share of all rows
    spread_heat     one expert on each of several devices is hot; together they get a share of all rows
    ragged_source   ranks have unequal numbers of tokens, which change with the batch; experts are unequally popular
    zero_load_rank  one rank has no tokens, and nobody chooses the experts of its device
    rotating        the hot expert sits on another device in each batch, in the order of devices
    burst           balanced, but for the batches in the middle, which have a hot expert

Two things make one.  A `Workload` says how many tokens each rank has and how many rows each expert gets, and holds no chance at
all: what it says is what an oracle knows.  `drawn` then deals the experts out to the tokens, by a seed, exactly so many times.

Devices are those of the identity placement: experts sit in blocks by their number.  From layer to layer heat moves to the next
expert of the same device, and so do tokens: of a batch a share `follow` goes from expert e to `next_E[e]`, the others wherever
there is room.  So predictors have paths to learn from, and a device's load without replicas is the same in all layers.

Rows that don't divide evenly are laid on one by one, from the first expert or rank on.

Shapes: B batches, T tokens of a batch, R ranks, each a device, N of them, L MoE layers, K = 1 choice a token, E experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megalina.placement.placement import EMPTY
from megalina.placement.planners.identity import identity
from megalina.placement.predictors.predictor import Ids, check_part
from megalina.placement.routing_trace import Counts, RoutingTrace, traced

HOT_EXPERT, HOT_RANK, SPREAD_HEAT = 0.25, 0.5, 0.75  # shares of all rows; of 16 experts, 4 times an even share for one
FOLLOW = 0.75  # of tokens go where the last layer's choice leads


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """ValueError unless all are at least 1, and every device has an expert."""

    num_experts: int
    num_devices: int
    num_layers: int
    batch_tokens: int  # of all ranks together
    num_batches: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_devices", "num_layers", "batch_tokens", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"a workload's {name} is {getattr(self, name)}: choose 1 or more")
        if self.num_devices > self.num_experts:
            raise ValueError(
                f"a workload's {self.num_devices} devices can't each have one of {self.num_experts} experts: choose fewer devices"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What is asked of experts and devices.  ValueError where rows and tokens don't match, or `next_E` is no permutation."""

    name: str
    num_layers: int
    tokens_BR: Counts  # of each rank
    first_BE: Counts  # rows of each expert in the first MoE layer
    next_E: Ids  # the expert of the next layer that has what this one has here

    def __post_init__(self) -> None:
        rows_B, tokens_B = self.first_BE.sum(axis=1), self.tokens_BR.sum(axis=1)
        if rows_B.shape != tokens_B.shape or (rows_B != tokens_B).any():
            raise ValueError(f"workload {self.name}: batches of {tokens_B.tolist()} tokens have {rows_B.tolist()} rows, top-1")
        if sorted(self.next_E.tolist()) != list(range(self.first_BE.shape[1])):
            raise ValueError(f"workload {self.name}: next experts {self.next_E.tolist()} are no permutation")

    def counts_BLE(self) -> Counts:
        """[B, L, E], rows of each expert, of all ranks together: what an oracle knows."""
        counts_BLE = np.zeros((len(self.first_BE), self.num_layers, len(self.next_E)), np.int64)
        now_E: Ids = np.arange(len(self.next_E))
        for layer in range(self.num_layers):
            counts_BLE[:, layer, now_E] = self.first_BE
            now_E = self.next_E[now_E]
        return counts_BLE

    def static_load_BLN(self) -> Counts:
        """[B, L, N], rows of each device while experts sit in blocks by their number, once each."""
        homes = _homes(len(self.next_E), self.tokens_BR.shape[1])
        return np.stack([self.counts_BLE()[:, :, list(experts)].sum(axis=2) for experts in homes], axis=2)


# tokens


def drawn(workload: Workload, seed: int, *, follow: float = FOLLOW) -> list[Ids]:
    """The batches, int64 [T, L, 1] each, tokens of rank 0 first (`own_part`); their counts are the workload's, row for row.

    Equal seeds give equal batches, also where more of them follow.  ValueError unless 0 <= follow <= 1."""
    check_part("follow", follow)
    random, experts = np.random.default_rng(seed), np.arange(len(workload.next_E))
    batches = []
    for counts_LE in workload.counts_BLE():
        tokens = int(counts_LE[0].sum())
        chosen_T = random.permutation(np.repeat(experts, counts_LE[0]))
        layers = [chosen_T]
        for count_E in counts_LE[1:]:
            order_T = random.permutation(tokens)
            following_T, other_T = np.split(order_T, [round(follow * tokens)])
            next_T = workload.next_E[chosen_T]
            # There is room for all who follow: an expert's rows are those of the one before it.
            room_E = count_E - np.bincount(next_T[following_T], minlength=len(experts))
            next_T[other_T] = random.permutation(np.repeat(experts, room_E))
            chosen_T = next_T
            layers.append(chosen_T)
        batches.append(np.stack(layers, axis=1)[:, :, None])
    return batches


def own_part(tokens_R: Counts, rank: int) -> slice:
    """The rank's tokens in a batch."""
    end = int(tokens_R[: rank + 1].sum())
    return slice(end - int(tokens_R[rank]), end)


def trace_of(workload: Workload, seed: int, *, follow: float = FOLLOW) -> RoutingTrace:
    """The batches as a trace, one sample each: a profile, where the seed is another than that of what is served."""
    batches = drawn(workload, seed, follow=follow)
    return traced(
        np.concatenate(batches), len(workload.next_E), sample_lengths_S=workload.tokens_BR.sum(axis=1), name=workload.name
    )


# workloads


def balanced(size: Size) -> Workload:
    """T / E rows for each expert, T / R tokens of each rank."""
    return _made("balanced", size, [_evenly(size.batch_tokens, size.num_experts)] * size.num_batches)


def hot_expert(size: Size, *, share: float = HOT_EXPERT, expert: int = 0) -> Workload:
    """round(share T) rows for the expert in the first layer, and for those after it in the next ones; all else is even."""
    _check_among("expert", expert, size.num_experts)
    return _made("hot_expert", size, [_heated(size, [expert], share)] * size.num_batches)


def hot_rank(size: Size, *, share: float = HOT_RANK, device: int = 0) -> Workload:
    """round(share T) rows for the device, even among its experts; all else is even.  ValueError for one device."""
    _check_among("device", device, size.num_devices)
    _check_devices("hot_rank", size)
    hot = _homes(size.num_experts, size.num_devices)[device]
    return _made("hot_rank", size, [_heated(size, hot, share)] * size.num_batches)


def spread_heat(size: Size, *, share: float = SPREAD_HEAT) -> Workload:
    """round(share T) rows, even among one expert on every second device, but two at least; all else is even.  ValueError for
    one device."""
    _check_devices("spread_heat", size)
    hot_devices = max(2, size.num_devices // 2)
    homes = _homes(size.num_experts, size.num_devices)
    hot = [homes[i * size.num_devices // hot_devices][0] for i in range(hot_devices)]
    return _made("spread_heat", size, [_heated(size, hot, share)] * size.num_batches)


def ragged_source(size: Size) -> Workload:
    """In batch b, rank r has tokens in proportion to 1 + (r + b) mod R; in the first layer, expert e has rows in proportion to
    1 / (1 + e).  Both are rounded by largest remainders."""
    ranks, experts = size.num_devices, size.num_experts
    common = math.lcm(*range(1, experts + 1))
    tokens = [_apportioned(size.batch_tokens, [1 + (r + b) % ranks for r in range(ranks)]) for b in range(size.num_batches)]
    first = [_apportioned(size.batch_tokens, [common // (1 + e) for e in range(experts)])] * size.num_batches
    return _made("ragged_source", size, first, tokens)


def zero_load_rank(size: Size, *, rank: int = -1) -> Workload:
    """The rank (-1: the last one) has 0 tokens and its device's experts 0 rows; the others have all, evenly.  ValueError for
    one device."""
    rank = size.num_devices - 1 if rank == -1 else rank
    _check_among("rank", rank, size.num_devices)
    _check_devices("zero_load_rank", size)
    tokens = np.insert(_evenly(size.batch_tokens, size.num_devices - 1), rank, 0)
    idle = _homes(size.num_experts, size.num_devices)[rank]
    return _made("zero_load_rank", size, [_heated(size, idle, 0.0)] * size.num_batches, [tokens] * size.num_batches)


def rotating(size: Size, *, share: float = HOT_EXPERT) -> Workload:
    """`hot_expert`, of batch b the first expert of device b mod N; a cycle has N batches."""
    homes = _homes(size.num_experts, size.num_devices)
    hot = [homes[b % size.num_devices][0] for b in range(size.num_batches)]
    return _made("rotating", size, [_heated(size, [expert], share) for expert in hot])


def burst(size: Size, *, share: float = HOT_EXPERT, expert: int = 0) -> Workload:
    """`balanced`, but `hot_expert` from batch B // 3 to before batch B - B // 3.  ValueError for fewer than 3 batches."""
    _check_among("expert", expert, size.num_experts)
    third = size.num_batches // 3
    if not third:
        raise ValueError(f"workload burst has {size.num_batches} batches: before, in and after it there must be one, choose 3")
    hot, even = _heated(size, [expert], share), _evenly(size.batch_tokens, size.num_experts)
    return _made("burst", size, [hot if third <= b < size.num_batches - third else even for b in range(size.num_batches)])


WORKLOADS: dict[str, Callable[[Size], Workload]] = {
    "balanced": balanced,
    "hot_expert": hot_expert,
    "hot_rank": hot_rank,
    "spread_heat": spread_heat,
    "ragged_source": ragged_source,
    "zero_load_rank": zero_load_rank,
    "rotating": rotating,
    "burst": burst,
}


def _made(name: str, size: Size, first: Sequence[Counts], tokens: Sequence[Counts] | None = None) -> Workload:
    """`first`: rows of each expert, `tokens`: of each rank, for each batch; evenly where they are not given."""
    if tokens is None:
        tokens = [_evenly(size.batch_tokens, size.num_devices)] * size.num_batches
    next_E = np.arange(size.num_experts)
    for experts in _homes(size.num_experts, size.num_devices):
        next_E[list(experts)] = np.roll(experts, -1)
    return Workload(name, size.num_layers, np.stack(tokens), np.stack(first), next_E)


def _homes(num_experts: int, num_devices: int) -> list[tuple[int, ...]]:
    """The experts of each device, as training has them."""
    placement = identity(np.ones(num_experts), num_devices, -(-num_experts // num_devices))
    return [tuple(expert for expert in experts if expert != EMPTY) for experts in placement.slots]


def _heated(size: Size, hot: Sequence[int], share: float) -> Counts:
    """[E], round(share T) rows evenly among some experts, the rest evenly among the others."""
    check_part("share", share)
    others = [expert for expert in range(size.num_experts) if expert not in hot]
    if not others:
        raise ValueError(f"all {size.num_experts} experts are hot: choose more experts")
    hot_rows, count_E = round(share * size.batch_tokens), np.zeros(size.num_experts, np.int64)
    count_E[list(hot)] = _evenly(hot_rows, len(hot))
    count_E[others] = _evenly(size.batch_tokens - hot_rows, len(others))
    return count_E


def _evenly(rows: int, parts: int) -> Counts:
    """[parts], sum `rows`; they differ by 1 at most, the first ones have more."""
    least, more = divmod(rows, parts)
    return least + (np.arange(parts) < more).astype(np.int64)


def _apportioned(rows: int, weights: Sequence[int]) -> Counts:
    """[len(weights)], sum `rows`, in proportion: rounded down, and one more where most was cut off.  In Python's integers."""
    total = sum(weights)
    whole, cut = zip(*(divmod(rows * weight, total) for weight in weights), strict=True)
    count = np.array(whole, np.int64)
    most_cut = sorted(range(len(weights)), key=lambda i: -cut[i])
    count[most_cut[: rows - sum(whole)]] += 1
    return count


def _check_among(what: str, number: int, many: int) -> None:
    if not 0 <= number < many:
        raise ValueError(f"{what} {number} is none of {many}: choose 0 to {many - 1}")


def _check_devices(name: str, size: Size) -> None:
    if size.num_devices < 2:
        raise ValueError(f"workload {name} is about one device among others, but there is {size.num_devices}: choose 2 or more")
