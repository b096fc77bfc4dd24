"""The replays of a popularity lab: every predictor, planner, split, trigger and mode on the same batches; the exact optimum."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from typing import Any

import numpy as np

from megalina.config import InferConfig
from megalina.placement.controller import Planner, Policy
from megalina.placement.placement import Placement
from megalina.placement.predictors.look_ahead import LookAheadPredictor, fit_confusion
from megalina.placement.predictors.predictor import Floats, Ids, Predictor, Seen
from megalina.placement.routing_trace import counts_LE
from megalina.placement.split import device_load, load_aware
from megalina.serve.policies import policy_of, slots_of
from placement_lab.input import CONTESTANTS, NEEDING_AHEAD, Lab, with_cost
from placement_lab.offline import Replay, accuracy, balance, counts_of_batches, max_over_mean, replay
from placement_lab.optimum import optimum
from placement_lab.oracle import OraclePredictor

PLANNERS = ("none", "first_fit", "greedy", "hierarchical")
SPLITS = ("even", "load_aware", "local_first")
TRIGGERS = ("never", "always", "ordered_top", "top_set", "distance", "gain")
SMALL = 32  # so many experts at most: the optimum of every case is asked for
SAMPLE = 12  # cases of more experts
SOLVER_S = 20.0  # for one case


def results(
    lab: Lab,
    names: Sequence[str],
    modes: Mapping[str, InferConfig],
    *,
    skipped_predictors: Mapping[str, str],
    skipped_modes: Mapping[str, str],
    seed: int,
    with_optimum: bool,
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """All numbers, as they go into the JSON.  `progress`: called as a replay begins with how many were before it, how many there
    will be, and what it is of."""
    contest = Contest(lab)
    cases = cases_of(lab, seed) if with_optimum else []
    total = 2 * len(names) + len(PLANNERS) * len(SPLITS) + 2 * len(TRIGGERS) + len(modes) + len(cases)
    before = count()

    def begin(what: str) -> None:
        progress(next(before), total, what)

    def row(name: str, split: str, *, planner: str = "greedy", trigger: str = "never") -> dict[str, Any]:
        begin(f"{name}, {planner}, {split}, {trigger}")
        return contest.row(name, split, planner=planner, trigger=trigger)

    predictors = {name: row(name, "even") for name in names}
    by_load = {name: row(name, "load_aware") for name in names}
    own = [name for name in names if name not in ("none", "oracle")] or ["oracle"]
    best = min(own, key=lambda name: predictors[name]["p95"])
    planners = {p: {s: _some(row(best, s, planner=p), "planner_us") for s in SPLITS} for p in PLANNERS}
    triggers = {t: {s: _some(row(best, s, trigger=t), "replanned") for s in ("even", "load_aware")} for t in TRIGGERS}
    found = {}
    for name, config in modes.items():
        begin(f"mode {name}")
        found[name] = contest.mode(config)
    return {
        "predictors": predictors,
        "load_aware": {name: _some(figures) for name, figures in by_load.items()},
        "skipped_predictors": dict(skipped_predictors),
        "planners": planners,
        "triggers": triggers,
        "modes": found,
        "skipped_modes": dict(skipped_modes),
        "optimum": _optimum(contest, cases, best, begin) if cases else None,
        "best": best,
        "settings": dict(lab.settings),
    }


def _some(figures: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Without what is the predictor's own affair."""
    return {key: figures[key] for key in ("median", "p95", "moved", "local", *more) if key in figures}


class Contest:
    """Replays each combination once.  Predictors are fitted once: what they learn while serving is the controller's."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self._predictors: dict[str, Predictor] = {}
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}
        self.loads: dict[tuple[str, ...], Any] = {}  # load_BLN

    def row(self, name: str, split: str, *, planner: str = "greedy", trigger: str = "never") -> dict[str, Any]:
        if name == "none":
            planner = "none"
        if planner == "none":
            trigger = "never"
        key = (name, split, planner, trigger)
        if key not in self._rows:
            self._rows[key] = self._replayed(key, self._policy(name, split, planner, trigger))
        return self._rows[key]

    def mode(self, config: InferConfig) -> dict[str, Any]:
        slots = slots_of(config, self.lab.served)
        figures = self._replayed((f"mode {config.name}",), policy_of(config, self.lab.served, self.lab.profile), slots)
        return figures | {"slots": slots}

    def _policy(self, name: str, split: str, planner: str, trigger: str) -> Policy:
        """As the same settings of conf/infer give it."""
        lab = self.lab
        common: dict[str, Any] = {
            "name": name, "split": split, "planner": planner, "trigger": trigger, "slots_per_device": lab.slots,
        }  # fmt: skip
        if name == "none":
            return policy_of(InferConfig(predictor="none", **common), lab.served, None)
        # any predictor will do for the rest of the policy
        policy = policy_of(with_cost(InferConfig(predictor="static", **common), lab), lab.served, lab.profile)
        return replace(policy, predictor=self._predictor(name), looks_ahead=name in NEEDING_AHEAD)

    def _predictor(self, name: str) -> Predictor:
        if name not in self._predictors:
            self._predictors[name] = _fitted(name, self.lab)
        return self._predictors[name]

    def _replayed(self, key: tuple[str, ...], policy: Policy, slots: int | None = None) -> dict[str, Any]:
        lab = self.lab
        timed, planner_s = None, list[float]()
        if policy.predictor is not None:
            timed = _TimedPredictor(policy.predictor, lab.first_layer)
        planner = None if policy.planner is None else _timed_planner(policy.planner, planner_s)
        found = replay(
            lab.batches,
            replace(policy, predictor=timed, planner=planner),
            num_experts=lab.served.num_experts,
            num_devices=lab.served.num_devices,
            slots_per_device=slots or lab.slots,
            ahead=lab.ahead,
        )
        self.loads[key] = found.load_BLN
        figures = figures_of(found, lab.warm_up, lab.first_layer, lab.served.top_k)
        if planner_s:
            figures["planner_us"] = 1e6 * statistics.median(planner_s)
        if timed is not None:
            figures["predictor_us"] = 1e6 * timed.typical_s()
        return figures


def _fitted(name: str, lab: Lab) -> Predictor:
    if name == "oracle":
        return OraclePredictor(counts_of_batches(lab.batches, lab.served.num_experts))
    if name == "look_ahead_map":
        profile = lab.profile
        assert profile.ahead_ids_TLK is not None
        maps = fit_confusion(profile.ahead_ids_TLK, profile.expert_ids_TLK, profile.num_experts)
        return LookAheadPredictor(counts_LE(profile), maps=maps)
    predictor = policy_of(InferConfig(slots_per_device=lab.slots, **CONTESTANTS[name]), lab.served, lab.profile).predictor
    assert predictor is not None
    return predictor


def figures_of(found: Replay, warm_up: int, first_layer: int, top_k: int) -> dict[str, Any]:
    """Of the batches and layers that count."""
    counted = (slice(warm_up, None), slice(first_layer, None))
    load_BLN = found.load_BLN[counted]
    figures: dict[str, Any] = asdict(balance(max_over_mean(load_BLN)))
    figures |= {
        "moved": float(found.moved_BL[counted].mean()),
        "local": float(found.local_BL[counted].sum() / load_BLN.sum()),
        "replanned": float(found.replanned_BL[counted].mean()),
    }
    if found.expected_BLE is not None:
        figures |= asdict(accuracy(found.expected_BLE[counted], found.counts_BLE[counted], top_k))
    return figures


class _TimedPredictor:
    """A predictor and a clock, for layers from `first_layer` on."""

    def __init__(self, predictor: Predictor, first_layer: int):
        self._predictor, self._first_layer = predictor, first_layer
        self._times_s: dict[str, list[float]] = {"features": [], "expect": [], "evidence": [], "learn": []}

    def typical_s(self) -> float:
        """What one rank spends on one layer of one batch: medians, added."""
        return sum(statistics.median(times_s) for times_s in self._times_s.values() if times_s)

    def start(self, layer: int) -> Any:
        return self._predictor.start(layer)

    def features(self, layer: int, seen: Seen) -> Floats:
        return self._timed("features", layer, seen)

    def expect(self, layer: int, features: Floats, state: Any) -> Floats:
        return self._timed("expect", layer, features, state)

    def evidence(self, layer: int, seen: Seen, chosen_TK: Ids) -> Floats:
        return self._timed("evidence", layer, seen, chosen_TK)

    def learn(self, layer: int, features: Floats, evidence: Floats, state: Any) -> Any:
        return self._timed("learn", layer, features, evidence, state)

    def _timed(self, what: str, layer: int, *arguments: Any) -> Any:
        begin_s = time.perf_counter()
        found = getattr(self._predictor, what)(layer, *arguments)
        if layer >= self._first_layer:
            self._times_s[what].append(time.perf_counter() - begin_s)
        return found


def _timed_planner(planner: Planner, times_s: list[float]) -> Planner:
    def timed(share_E: Floats, num_devices: int, slots_per_device: int) -> Placement:
        begin_s = time.perf_counter()
        placement = planner(share_E, num_devices, slots_per_device)
        times_s.append(time.perf_counter() - begin_s)
        return placement

    return timed


# the optimum


def cases_of(lab: Lab, seed: int) -> list[tuple[int, int]]:
    """(batch, layer): all where experts are few, else a sample."""
    cases = [(b, layer) for b in range(lab.warm_up, len(lab.batches)) for layer in range(lab.first_layer, lab.profile.num_layers)]
    if lab.served.num_experts <= SMALL or len(cases) <= SAMPLE:
        return cases
    chosen = np.random.default_rng(seed).choice(len(cases), SAMPLE, replace=False)
    return [cases[i] for i in sorted(chosen.tolist())]


def _optimum(contest: Contest, cases: Sequence[tuple[int, int]], best: str, begin: Callable[[str], None]) -> dict[str, Any]:
    """How far the busiest device is from the optimum's, which knows the batch and splits rows at will."""
    lab = contest.lab
    counts_BLE = counts_of_batches(lab.batches, lab.served.num_experts)
    rivals = {
        f"{name}, {split}": (name, split, "greedy", "never") for name in dict.fromkeys(("oracle", best)) for split in SPLITS[:2]
    }
    for name, split, *_ in rivals.values():
        contest.row(name, split)
    over_mean, ratios, unproven, not_found = list[float](), {rival: list[float]() for rival in rivals}, 0, 0
    for batch, layer in cases:
        begin(f"optimum of batch {batch}, layer {layer}")
        count_E = counts_BLE[batch, layer]
        begin_s = time.monotonic()
        try:
            placement = optimum(count_E.astype(np.float64), lab.served.num_devices, lab.slots, time_limit_s=SOLVER_S)
        except TimeoutError:
            not_found += 1
            continue
        count_RE = np.zeros((lab.served.num_devices, lab.served.num_experts), np.int64)
        count_RE[0] = count_E  # where rows come from doesn't matter for the load
        rows = int(device_load(load_aware(count_RE, placement)).max())
        # no placement is below an even load, so that one needs no proof by the solver
        even = rows == -(-int(count_E.sum()) // lab.served.num_devices)
        unproven += not even and time.monotonic() - begin_s >= SOLVER_S
        over_mean.append(rows * lab.served.num_devices / int(count_E.sum()))
        for rival, key in rivals.items():
            ratios[rival].append(int(contest.loads[key][batch, layer].max()) / rows)
    found: dict[str, Any] = {
        "cases": len(cases),
        "of": (len(lab.batches) - lab.warm_up) * (lab.profile.num_layers - lab.first_layer),
        "not_found": not_found,
        "not_proven": unproven,
        "solver_limit_s": SOLVER_S,
    }
    if over_mean:
        found["max_over_mean"] = {"median": statistics.median(over_mean), "max": max(over_mean)}
        found["over_optimum"] = {rival: {"median": statistics.median(r), "max": max(r)} for rival, r in ratios.items()}
    return found
