"""Policies: what conf/infer says, made ready for a model, its devices and its profile."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megalina.blocks.dispatch import ONCE_PER_RANK, ROWS
from megalina.config import InferConfig
from megalina.placement.controller import Planner, Policy, Split, Trigger
from megalina.placement.path_counts import profile_of
from megalina.placement.planners.first_fit import FirstFit
from megalina.placement.planners.greedy import greedy
from megalina.placement.planners.hierarchical import by_node
from megalina.placement.predictors.counts import DistributionPredictor, EmaPredictor, StaticPredictor, WindowPredictor
from megalina.placement.predictors.linear_map import LinearMap, LinearMapPredictor, fit_linear_map
from megalina.placement.predictors.look_ahead import LookAheadPredictor, fit_confusion
from megalina.placement.predictors.online_map import OnlineMapPredictor
from megalina.placement.predictors.online_paths import OnlinePathsPredictor
from megalina.placement.predictors.path_table import PathTablePredictor
from megalina.placement.predictors.predictor import Floats, Predictor
from megalina.placement.routing_trace import RoutingTrace, best_first, counts_LE
from megalina.placement.split import even, load_aware, local_first
from megalina.placement.triggers import Distance, GainAboveCost, OrderedTop, TopSet, always, never

LOOKING_AHEAD = ("look_ahead", "look_ahead_online")  # predictors that ask the next layer's router
REMEMBERED = 32  # batches, by look_ahead_online: as many as online_map does
SPLITS: dict[str, Split] = {"even": even, "load_aware": load_aware, "local_first": local_first}


@dataclass(frozen=True, slots=True)
class Served:
    """What is served, and on what."""

    num_experts: int
    top_k: int
    num_devices: int
    devices_per_node: int = 0  # 0: unknown, as one node


def slots_of(config: InferConfig, served: Served) -> int:
    """Slots of a device in each layer."""
    return config.slots_per_device or 2 * -(-served.num_experts // served.num_devices)


def policy_of(config: InferConfig, served: Served, profile: RoutingTrace | None) -> Policy:
    """ValueError for a name that isn't there, for what contradicts itself, and for a profile that is missing or of another
    model."""
    check_infer(config, served)
    if config.predictor != "none" and profile is None:
        raise ValueError(f"infer.predictor={config.predictor} needs a profile of the model's routing: record one")
    if profile is not None and (profile.num_experts, profile.top_k) != (served.num_experts, served.top_k):
        raise ValueError(
            f"the profile {profile.name or 'given'} is of {profile.num_experts} experts and top-{profile.top_k}, the model has "
            f"{served.num_experts} and top-{served.top_k}: record one of this model"
        )
    predictor = None if profile is None or config.predictor == "none" else _predictors(config, served)[config.predictor](profile)
    return Policy(
        predictor,
        _planner(config, served),
        SPLITS[config.split],
        _trigger(config, served),
        first_planned=config.first_planned,
        looks_ahead=config.predictor in LOOKING_AHEAD,
        devices_alike=config.planner != "hierarchical",
        worth=config.worth,
    )


def check_infer(config: InferConfig, served: Served) -> None:
    """ValueError for what can't be, with the numbers."""
    known = {
        "predictor": ["none", *_predictors(config, served)],
        "planner": ["none", "first_fit", "first_fit_filled", "greedy", "hierarchical"],
        "split": list(SPLITS),
        "trigger": ["never", "always", "ordered_top", "top_set", "distance", "gain"],
        "dispatch": [ROWS, ONCE_PER_RANK],
    }
    for name, choices in known.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"infer.{name} is {getattr(config, name)!r}: choose one of {', '.join(choices)}")
    slots = slots_of(config, served)
    if slots < 1 or slots * served.num_devices < served.num_experts:
        some = "one device then has" if served.num_devices == 1 else f"{served.num_devices} devices then have"
        raise ValueError(
            f"infer.slots_per_device is {slots}: {some} {slots * served.num_devices} slots for {served.num_experts} experts; "
            f"choose {-(-served.num_experts // served.num_devices)} or more"
        )
    if not 1 <= config.combine_chunks <= slots:
        raise ValueError(
            f"infer.combine_chunks is {config.combine_chunks}: a chunk is one or more of a device's {slots} slots in a layer; "
            f"choose 1 to {slots}, or more infer.slots_per_device"
        )
    if not 0 <= config.swap_mib < math.inf:
        raise ValueError(f"infer.swap_mib is {config.swap_mib}: choose 0 (two layers' slots) or so many MiB")
    if config.planner != "none" and config.predictor == "none" and config.trigger != "always":
        raise ValueError(f"infer.planner={config.planner} without a predictor plans nothing: choose infer.predictor too")
    if config.trigger != "never" and config.planner == "none":
        raise ValueError(f"infer.trigger={config.trigger} without a planner does nothing: choose infer.planner too")
    for name, least in (("first_planned", 0), ("path_length", 1), ("layers_back", 1), ("window_batches", 1), ("kept", -1)):
        if getattr(config, name) < least:
            raise ValueError(f"infer.{name} is {getattr(config, name)}: choose {least} or more")


def _predictors(config: InferConfig, served: Served) -> dict[str, Callable[[RoutingTrace], Predictor]]:
    kept = served.top_k if config.kept < 0 else config.kept or None

    def table(profile: RoutingTrace) -> PathTablePredictor:
        counted = profile_of(best_first(profile), longest=config.path_length)
        return PathTablePredictor(counted, kept=kept, renormalise=config.renormalise)

    def fitted(profile: RoutingTrace) -> LinearMap:
        return fit_linear_map(profile.expert_ids_TLK, profile.num_experts, layers_back=config.layers_back)

    def counts(profile: RoutingTrace) -> Floats:
        return counts_LE(profile).astype(np.float64)

    def maps(profile: RoutingTrace) -> Floats | None:
        if profile.ahead_ids_TLK is None:
            return None
        return fit_confusion(profile.ahead_ids_TLK, profile.expert_ids_TLK, profile.num_experts)

    return {
        "static": lambda profile: StaticPredictor(counts(profile)),
        "window": lambda profile: WindowPredictor(counts(profile), batches=config.window_batches),
        "ema": lambda profile: EmaPredictor(counts(profile)),
        "distribution": lambda profile: DistributionPredictor(counts(profile)),
        "path_table": table,
        "linear_map": lambda profile: LinearMapPredictor(fitted(profile)),
        "online_map": lambda profile: OnlineMapPredictor(fitted(profile)),
        "online_paths": lambda profile: OnlinePathsPredictor(table(profile), fitted(profile)),
        "look_ahead": lambda profile: LookAheadPredictor(counts(profile)),
        "look_ahead_online": lambda profile: LookAheadPredictor(counts(profile), maps=maps(profile), batches=REMEMBERED),
    }


def _planner(config: InferConfig, served: Served) -> Planner | None:
    if config.planner == "hierarchical":
        return by_node(served.devices_per_node or served.num_devices)
    return {"none": None, "first_fit": FirstFit(), "first_fit_filled": FirstFit(fill=True), "greedy": greedy}[config.planner]


def _trigger(config: InferConfig, served: Served) -> Trigger:
    if config.trigger == "gain":
        return GainAboveCost(config.row_us / 1e6, config.replan_ms / 1e3)
    triggers: dict[str, Trigger] = {
        "never": never,
        "always": always,
        "ordered_top": OrderedTop(2 * served.top_k),
        "top_set": TopSet(2 * served.top_k),
        "distance": Distance(config.distance),
    }
    return triggers[config.trigger]
