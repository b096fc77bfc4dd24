"""The measures of interleaved runs: latencies and their ratios, what they are made of, loads of devices, accuracy of predictions.

Shapes: E experts, N devices.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalina.evaluate.interleaved import Competitor, Served, Written
from megalina.mesh import all_gather_object
from megalina.placement.controller import Outcome
from megalina.placement.predictors.predictor import Floats
from megalina.timeline.contention import quantile

STATIC, IDEAL = "static", "ideal"
DEFINITIONS = {
    "p50_ms, p95_ms, p99_ms": "a batch's latency, of the slowest rank, from a barrier on",
    "*_ratio_to_static": "static's latency over this one: above 1 is faster",
    "*_ratio_to_ideal": "this latency over ideal's: above 1 is slower, as in the paper",
    "*_quartiles": "of the ratio over rounds, in which all modes serve the same batch",
    "ratio_to_static_in_rounds, _interval": "median of that ratio, and its 95% confidence interval from order statistics",
    "active_fraction": "experts that computed a token over all experts, mean over tokens and MoE layers",
    "load_max_over_mean": "rows of the busiest device over the mean, median over batches and MoE layers (and its p95)",
    "idle_share": "of a batch's time in which a device computed nothing, mean over ranks, median over batches",
    "load_idle_share": "rows that fit in beside the busiest device's, over all that fit: what imbalance alone leaves idle",
    "phase2_rate": "decisions after the router spoke that placed experts anew; null: none are made",
    "planner_ms": "one call of the planner, median over calls and ranks; planner_calls are those of a batch",
    "swapped_mb": "experts brought to all devices, a batch",
    "a2a_ms, a2a_share": "tokens were on the wire, waiting for slower ranks with it, mean over ranks; its share of the latency",
    "fetch_wait_ms": "devices stood still for experts in a batch, mean over ranks and batches",
    "accuracy_ordered": "the 2 x top-k most popular experts foreseen in their order (Lina), of all batches and planned layers",
    "accuracy_recall": "of the 2 x top-k most popular experts, how many were foreseen to be among them",
    "misordered_experts": "of all experts, how many are not at the foreseen place in the order of popularity, mean",
    "decode_tokens_per_s": "all ranks' tokens over the slowest rank's time, after prefill",
    "expert_mb": "slots and spare places of one device",
    "overrun_share": "by which real work ended later than the emulated device would have, of its busy time; the worst rank",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One mode; see DEFINITIONS.  None: the mode does nothing of the kind, or there is nothing to compare with."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    p50_ratio_to_static: float
    p95_ratio_to_static: float
    p50_ratio_to_ideal: float | None
    p95_ratio_to_ideal: float | None
    ratio_to_static_quartiles: tuple[float, float]
    ratio_to_ideal_quartiles: tuple[float, float] | None
    ratio_to_static_in_rounds: float
    ratio_to_static_interval: tuple[float, float]
    active_fraction: float
    load_max_over_mean: float
    load_max_over_mean_p95: float
    idle_share: float
    load_idle_share: float
    phase2_rate: float | None
    planner_ms: float | None
    planner_calls: float
    swapped_mb: float
    fetch_wait_ms: float
    a2a_ms: float
    a2a_share: float
    a2a_exposed_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    decode_pass_ms: float | None
    accuracy_ordered: float | None
    accuracy_recall: float | None
    misordered_experts: float | None
    overrun_share: float | None  # None: no device is emulated
    latency_ms: list[float]  # of each batch
    layers: list[dict[str, Any]]  # of each MoE layer, see `_layer`


def measure(competitors: Sequence[Competitor], moe_layers: Sequence[int], top_k: int) -> dict[str, Measured]:
    """By name, the same on every rank; all call it together.  `moe_layers`: their numbers in the model.

    One is `static`, to which ratios are; where none is `ideal` there are no ratios to it."""
    served = {c.name: all_gather_object(c.engine.mesh, c.served) for c in competitors}
    written = {c.name: all_gather_object(c.engine.mesh, c.written) for c in competitors}
    late = {c.name: all_gather_object(c.engine.mesh, c.overrun_share) for c in competitors}
    latency_s = {name: slowest([[b.latency_s for b in rank] for rank in by_rank]) for name, by_rank in served.items()}
    return {
        c.name: _measured(c, served[c.name], written[c.name], latency_s, _worst(late[c.name]), moe_layers, 2 * top_k)
        for c in competitors
    }  # fmt: skip


def slowest(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Of each batch the longest time."""
    return [max(times) for times in zip(*by_rank, strict=True)]


def _measured(
    competitor: Competitor,
    served: Sequence[Sequence[Served]],
    written: Sequence[Sequence[Written]],
    latency_s: Mapping[str, Sequence[float]],
    overrun_share: float | None,
    moe_layers: Sequence[int],
    top: int,
) -> Measured:
    own_s, static_s, ideal_s = latency_s[competitor.name], latency_s[STATIC], latency_s.get(IDEAL)
    in_rounds = [a / b for a, b in zip(static_s, own_s, strict=True)]
    outcomes = [outcome for batch in competitor.outcomes for outcome in batch]
    loads = [_over_mean(outcome) for outcome in outcomes if outcome.load_N.any()]
    first = competitor.engine.controller.policy.first_planned
    foreseen = [o for o in outcomes if o.expected_E is not None and o.count_E.any() and o.layer >= first]
    found = [accuracy(outcome, top) for outcome in foreseen]
    decided = competitor.agreed + competitor.replanned
    planner_s = [s for rank in served for batch in rank for s in batch.planner_s]

    def of_batches(number: Callable[[Served], float]) -> list[float]:
        """Of each batch the mean over ranks."""
        return [statistics.fmean(map(number, batch)) for batch in zip(*served, strict=True)]

    def mean(values: Sequence[float]) -> float | None:
        return statistics.fmean(values) if values else None

    a2a_s = of_batches(lambda b: b.a2a_wire_s)
    decode = [
        (sum(w.tokens for w in ranks) / max(w.decode_s for w in ranks), max(w.decode_s for w in ranks) / ranks[0].passes)
        for ranks in zip(*written, strict=True)
    ]
    tokens = [sum(b.tokens for b in batch) for batch in zip(*served, strict=True)]
    return Measured(
        p50_ms=1e3 * _quantile(own_s, 0.5),
        p95_ms=1e3 * _quantile(own_s, 0.95),
        p99_ms=1e3 * _quantile(own_s, 0.99),
        p50_ratio_to_static=_quantile(static_s, 0.5) / _quantile(own_s, 0.5),
        p95_ratio_to_static=_quantile(static_s, 0.95) / _quantile(own_s, 0.95),
        p50_ratio_to_ideal=_quantile(own_s, 0.5) / _quantile(ideal_s, 0.5) if ideal_s else None,
        p95_ratio_to_ideal=_quantile(own_s, 0.95) / _quantile(ideal_s, 0.95) if ideal_s else None,
        ratio_to_static_quartiles=_quartiles(static_s, own_s),
        ratio_to_ideal_quartiles=_quartiles(own_s, ideal_s) if ideal_s else None,
        ratio_to_static_in_rounds=statistics.median(in_rounds),
        ratio_to_static_interval=median_interval(in_rounds),
        active_fraction=_active_fraction(outcomes, sum(tokens), len(moe_layers)),
        load_max_over_mean=_quantile(loads, 0.5),
        load_max_over_mean_p95=_quantile(loads, 0.95),
        idle_share=statistics.median(1 - s / t for s, t in zip(of_batches(lambda b: b.busy_s), own_s, strict=True)),
        load_idle_share=_idle(outcomes),
        phase2_rate=competitor.replanned / decided if decided else None,
        planner_ms=1e3 * statistics.median(planner_s) if planner_s else None,
        planner_calls=len(planner_s) / sum(map(len, served)),
        swapped_mb=sum(b.fetched_bytes for rank in served for b in rank) / len(own_s) / 1e6,
        fetch_wait_ms=1e3 * statistics.fmean(of_batches(lambda b: b.fetch_wait_s)),
        a2a_ms=1e3 * statistics.median(a2a_s),
        a2a_share=statistics.median(s / t for s, t in zip(a2a_s, own_s, strict=True)),
        a2a_exposed_ms=1e3 * statistics.median(of_batches(lambda b: b.a2a_exposed_s)),
        prefill_tokens_per_s=statistics.median(n / t for n, t in zip(tokens, own_s, strict=True)),
        decode_tokens_per_s=statistics.median(rate for rate, _ in decode) if decode else None,
        decode_pass_ms=1e3 * statistics.median(s for _, s in decode) if decode else None,
        accuracy_ordered=mean([float(ordered) for ordered, _, _ in found]),
        accuracy_recall=mean([recall for _, recall, _ in found]),
        misordered_experts=mean([float(wrong) for _, _, wrong in found]),
        overrun_share=overrun_share,
        latency_ms=[1e3 * s for s in own_s],
        layers=[_layer(number, layer, served, outcomes, top) for number, layer in enumerate(moe_layers)],
    )


def _layer(number: int, layer: int, served: Sequence[Sequence[Served]], outcomes: Sequence[Outcome], top: int) -> dict[str, Any]:
    """`layer` of the model, `p50_ms` and `p95_ms` from its router to its last sum (slowest rank), `stage_ms` (mean over ranks,
    median over batches), `load_max_over_mean`, `device_load` (rows over the mean, the busiest device of a batch first),
    `popularity` (share of each expert), `accuracy_ordered` and `accuracy_recall`."""
    whole_s = slowest([[batch.moe_layer_s[layer] for batch in rank] for rank in served])
    instructions = list(dict.fromkeys(name for at, name in served[0][0].instruction_s if at == layer))
    stage_ms = {
        name: 1e3 * statistics.median(
            statistics.fmean(b.instruction_s.get((layer, name), 0.0) for b in batch) for batch in zip(*served, strict=True)
        )
        for name in instructions
    }  # fmt: skip
    own = [outcome for outcome in outcomes if outcome.layer == number and outcome.load_N.any()]
    known = [accuracy(outcome, top) for outcome in own if outcome.expected_E is not None]
    load_BN = np.array([np.sort(outcome.load_N)[::-1] / outcome.load_N.mean() for outcome in own])
    count_E = np.sum([outcome.count_E for outcome in own], axis=0)
    return {
        "layer": layer,
        "p50_ms": 1e3 * _quantile(whole_s, 0.5),
        "p95_ms": 1e3 * _quantile(whole_s, 0.95),
        "stage_ms": stage_ms,
        "load_max_over_mean": _quantile([_over_mean(outcome) for outcome in own], 0.5),
        "device_load": load_BN.mean(0).tolist(),
        "popularity": (count_E / count_E.sum()).tolist(),
        "accuracy_ordered": statistics.fmean(float(ordered) for ordered, _, _ in known) if known else None,
        "accuracy_recall": statistics.fmean(recall for _, recall, _ in known) if known else None,
    }


def accuracy(outcome: Outcome, top: int) -> tuple[bool, float, int]:
    """Whether the `top` most popular experts were foreseen in their order, how many of them were (as a share), and how many of
    all experts are not at the foreseen place in the order of popularity.  Of two that are as popular the lower one is first."""
    assert outcome.expected_E is not None
    expected, actual = _by_popularity(outcome.expected_E), _by_popularity(outcome.count_E)
    top = min(top, len(actual))
    recall = len(np.intersect1d(expected[:top], actual[:top])) / top
    return bool((expected[:top] == actual[:top]).all()), recall, int((expected != actual).sum())


def _by_popularity(popularity_E: "Floats | np.ndarray[Any, np.dtype[np.int64]]") -> "np.ndarray[Any, np.dtype[np.intp]]":
    return np.argsort(-popularity_E, kind="stable")


def _over_mean(outcome: Outcome) -> float:
    return float(outcome.load_N.max() / outcome.load_N.mean())


def _active_fraction(outcomes: Sequence[Outcome], tokens: int, layers: int) -> float:
    """`outcomes`: of all batches and MoE layers, which had so many `tokens` together."""
    made = sum(int(outcome.count_E.sum()) for outcome in outcomes)
    return made / (tokens * layers * len(outcomes[0].count_E)) if tokens else 0.0


def _idle(outcomes: Sequence[Outcome]) -> float:
    most = sum(int(outcome.load_N.max()) * len(outcome.load_N) for outcome in outcomes)
    return 1 - sum(int(outcome.load_N.sum()) for outcome in outcomes) / most if most else 0.0


def _quantile(values: Sequence[float], share: float) -> float:
    found = quantile(values, share)
    assert found is not None, "nothing was measured"
    return found


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which two of the values, in order, the median is with a confidence of about 95%; few values: all of them."""
    ordered, half_width = sorted(values), 0.98 * math.sqrt(len(values))
    middle = (len(ordered) - 1) / 2
    low, high = math.floor(middle - half_width), math.ceil(middle + half_width)
    return ordered[max(0, low)], ordered[min(len(ordered) - 1, high)]


def _worst(shares: Sequence[float | None]) -> float | None:
    return max((share for share in shares if share is not None), default=None)


def _quartiles(slow_s: Sequence[float], fast_s: Sequence[float]) -> tuple[float, float]:
    ratios = [a / b for a, b in zip(slow_s, fast_s, strict=True)]
    return _quantile(ratios, 0.25), _quantile(ratios, 0.75)
