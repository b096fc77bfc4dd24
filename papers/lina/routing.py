"""Routing for the paper's inference rows: made, with paths to learn from, or of traces, and brought to the paper's skew.

Made: tokens are of hidden types, of which each text has its own mixture.  Types belong to families, which mostly stay together
from layer to layer.  In each layer a type has an expert that most of its tokens choose; the rest choose by popularity, which
falls geometrically from the most to the least popular expert.  So tokens that shared an expert tend to share the next one, a
longer path says more of a token, and batches differ.  How many are faithful is chosen so that tokens of an expert go on together
about as in Figure 9 (41.94% to their favourite, 54.59% to two).  Nobody claims that TXL's or BERT's tokens do just this.

Shapes: T tokens, L MoE layers, E experts, S texts, Z types of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import (
    RoutingTrace,
    batches,
    best_first,
    halves,
    merged_experts,
    probability_for_skew,
    read_trace,
    rerouted_evenly,
    skew,
    top1,
    traced,
)

TEXTS, TEXT_TOKENS = 256, 512  # one half is profiled, the other served
FAMILIES, KIN = 8, 8  # types are so many families of so many
FAITHFUL = 0.95  # share of a type's tokens that choose its expert
TOGETHER = 0.9  # chance that a type goes with its family in a layer
STEEPER = 1.4  # than the paper's factor: chance moves it, and `rerouted_evenly` brings it down to the very factor
EVENNESS = 0.5  # of a text's mixture of types, Dirichlet's parameter for each
SKEWS = {4: 4.02, 16: 5.56}  # most over least popular expert, Figure 6
BATCH_TOKENS, TRACE_BATCH_TOKENS = 4096, 512  # of all devices


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What is known before, and what is served, top-1."""

    profile: RoutingTrace
    batches: Sequence[Ids]
    skew: float  # of what is served
    note: str


def wanted_skew(num_experts: int) -> float:
    """8 experts, of which the paper says nothing, lie between."""
    return SKEWS.get(num_experts, (SKEWS[4] + SKEWS[16]) / 2)


def made(num_experts: int, num_layers: int, *, seed: int) -> Routed:
    """Equal seeds give equal routing."""
    random, types = np.random.default_rng(seed), FAMILIES * KIN
    mixture_SZ = random.dirichlet(np.full(types, EVENNESS), size=TEXTS)
    type_T = np.concatenate([random.choice(types, TEXT_TOKENS, p=mixture_Z) for mixture_Z in mixture_SZ])
    layers = []
    for _ in range(num_layers):
        share_E = (STEEPER * wanted_skew(num_experts)) ** (-random.permutation(num_experts) / (num_experts - 1))
        share_E /= share_E.sum()
        together_Z = random.random(types) < TOGETHER
        place_Z = np.where(together_Z, np.repeat(random.random(FAMILIES), KIN), random.random(types))
        position_Z = (np.argsort(np.argsort(place_Z, kind="stable")) + 0.5) / types  # types fill experts in this order
        favourite_Z = np.searchsorted(np.cumsum(share_E)[:-1], position_Z)
        faithful_T = random.random(len(type_T)) < FAITHFUL
        layers.append(np.where(faithful_T, favourite_Z[type_T], random.choice(num_experts, len(type_T), p=share_E)))
    ids_TLK = np.stack(layers, axis=1)[..., None].astype(np.int32)
    trace = traced(ids_TLK, num_experts, sample_lengths_S=np.full(TEXTS, TEXT_TOKENS), name=f"made {seed}")
    return _served(trace, BATCH_TOKENS, "made routing")


def of_trace(path: Path, num_experts: int, num_layers: int) -> Routed:
    """First choices of the trace's first layers, neighbouring experts merged.  ValueError where it has fewer layers or experts,
    or too few tokens for two batches."""
    whole = top1(best_first(read_trace(path)))
    if whole.num_layers < num_layers:
        raise ValueError(
            f"{path}: {whole.num_layers} MoE layers, the paper's models have {num_layers}: take a deeper model's trace"
        )
    if whole.num_tokens < 4 * TRACE_BATCH_TOKENS:
        raise ValueError(
            f"{path}: {whole.num_tokens} tokens, half of which are no two batches of {TRACE_BATCH_TOKENS}: record more"
        )
    trace = merged_experts(whole, num_experts)
    first = replace(
        trace,
        expert_ids_TLK=trace.expert_ids_TLK[:, :num_layers],
        layers=trace.layers[:num_layers],
        weights_TLK=None,
        ahead_ids_TLK=None,
    )
    return _served(first, TRACE_BATCH_TOKENS, f"routing of {trace.name}")


def _served(trace: RoutingTrace, batch_tokens: int, note: str) -> Routed:
    wanted = wanted_skew(trace.num_experts)
    if skew(trace) > wanted:
        trace = rerouted_evenly(trace, probability_for_skew(trace, wanted), seed=0)
    profile, served = halves(trace)
    return Routed(profile, list(batches(served, batch_tokens, drop_last=True)), skew(trace), note)


def next_concentration(ids_TLK: Ids, num_experts: int, most: int) -> float:
    """Of the tokens that share an expert in a layer, the share whose next choice is among the group's `most` frequent ones; mean
    over groups and layers, by tokens (Figure 9)."""
    inside = total = 0
    for here_T, next_T in zip(ids_TLK[:, :-1, 0].T, ids_TLK[:, 1:, 0].T, strict=True):
        count_EE = np.bincount(here_T.astype(np.int64) * num_experts + next_T, minlength=num_experts**2)
        inside += int(np.sort(count_EE.reshape(num_experts, num_experts), axis=1)[:, -most:].sum())
        total += len(here_T)
    return inside / total
