"""What `inference.py` serves: batches of traces, or of a workload, and what is known of them before.

Shapes: B batches, T tokens of a batch, R ranks, L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import (
    Counts,
    RoutingTrace,
    batches,
    best_first,
    halves,
    joined,
    merged_experts,
    probability_for_skew,
    read_trace,
    rerouted_evenly,
    skew,
    top1,
)
from placement_lab.offline import counts_of_batches
from placement_lab.workloads import WORKLOADS, Size, drawn, trace_of

EXPERTS, PAPER_SKEW = 16, 5.56
SKEWS = ("real", "paper", "balanced")


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What is served, and what is known of it before."""

    profile: RoutingTrace
    batches: list[Ids]  # [T, L, 1], tokens of rank 0 first
    tokens_BR: Counts
    counts_BLE: Counts
    most_over_least: list[float]


def size_of(setting: dict[str, Any]) -> Size:
    return Size(
        num_experts=EXPERTS,
        num_devices=setting["devices"],
        num_layers=setting["layers"],
        batch_tokens=setting["batch_tokens"],
        num_batches=setting["batches"],
    )


def routing_of(spec: dict[str, Any]) -> Routing:
    """The same on all ranks."""
    if "workload" in spec:
        workload = WORKLOADS[spec["workload"]](size_of(spec))
        profile = trace_of(workload, seed=1)  # as popular are its experts, row for row
        return Routing(profile, drawn(workload, seed=0), workload.tokens_BR, workload.counts_BLE(), [skew(profile)])
    traces, profiled = (
        [task_of(Path(path), spec["layers"], spec["skew"]) for path in spec.get(paths, ())]
        for paths in ("traces", "profiles")  # results from before there were profiles of other tasks have none
    )
    served = taking_turns([halves(trace)[1] for trace in traces], spec["batch_tokens"])[: spec["batches"]]
    tokens_BR = np.full((len(served), spec["devices"]), spec["batch_tokens"] // spec["devices"])
    counts_BLE, profile = counts_of_batches(served, EXPERTS), joined(profiled or [halves(trace)[0] for trace in traces])
    return Routing(profile, served, tokens_BR, counts_BLE, [skew(trace) for trace in traces])


def task_of(path: Path, layers: int, skewed: str) -> RoutingTrace:
    """Top-1 of 16 experts, of the first layers."""
    whole = read_trace(path)
    trace = merged_experts(top1(best_first(whole)), EXPERTS)
    trace = replace(
        trace,
        expert_ids_TLK=trace.expert_ids_TLK[:, :layers],
        layers=trace.layers[:layers],
        weights_TLK=None,
        ahead_ids_TLK=None,
    )
    if skewed == "paper":
        return rerouted_evenly(trace, probability_for_skew(trace, PAPER_SKEW), seed=0)
    return rerouted_evenly(trace, 1.0, seed=0) if skewed == "balanced" else trace


def taking_turns(traces: Sequence[RoutingTrace], tokens: int) -> list[Ids]:
    lists = [list(batches(trace, tokens, drop_last=True)) for trace in traces]
    return [batch for turn in zip(*lists, strict=False) for batch in turn]
