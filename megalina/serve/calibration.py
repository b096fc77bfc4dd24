"""The calibration of the trigger `gain`: what a row more on the busiest device costs, and what planning anew costs.

Both are measured on the ranks that will serve, before they do, and agreed upon: the largest over ranks counts.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.config import InferConfig
from megalina.mesh import all_gather_object
from megalina.placement.controller import Counts, Planner, Split
from megalina.placement.placement import Placement, aligned, moved_slots
from megalina.placement.routing_trace import RoutingTrace, batches
from megalina.serve.even_routing import EvenRouting
from megalina.serve.load_engine import Opened
from megalina.serve.policies import policy_of, slots_of

REPEATS = 6
PLANS = 8  # of as many neighbouring batches of the profile
LEAST_US = 1e-3  # 0 would mean: measure


def calibrated(config: InferConfig, opened: Opened, profile: RoutingTrace | None, batch: Batch) -> InferConfig:
    """With `row_us` and `replan_ms` as measured, where the trigger is `gain` and they are 0; else as it is.

    `batch`: of this rank, of the size that will be served.  All ranks call it together and are given the same."""
    if config.trigger != "gain" or (config.row_us and config.replan_ms) or profile is None:
        return config
    row_us = config.row_us or max(LEAST_US, _row_us(opened, batch))
    replan_ms = config.replan_ms or max(LEAST_US / 1e3, _replan_ms(config, opened, profile, int(batch.valid_BS.sum())))
    return replace(config, row_us=row_us, replan_ms=replan_ms)


def _row_us(opened: Opened, batch: Batch) -> float:
    """Even routing against one that sends all rows to the experts of the first device: time over rows of the busiest device.

    Whatever else a batch costs is in both.  Each counts with its shortest time, what disturbs a batch makes it longer."""
    served, mesh = opened.served, opened.mesh
    crowded = max(opened.served.top_k, served.num_experts // served.num_devices)

    def crowd(layer: int, chosen_TK: Tensor) -> Tensor:
        even_TK = EvenRouting(crowded, 1, 0)(layer, torch.where(chosen_TK == served.num_experts, crowded, 0))
        return torch.where(chosen_TK == served.num_experts, chosen_TK, even_TK)

    config = InferConfig()
    engine = opened.engine(config, opened.policy(config, None))
    even = EvenRouting(served.num_experts, served.num_devices, mesh.ep.rank)
    routings: tuple[Callable[[int, Tensor], Tensor], ...] = (even, crowd)
    own_s: list[list[float]] = [[], []]
    rows = [0, 0]
    try:
        for _ in range(REPEATS + 1):
            for i, routing in enumerate(routings):  # in turn, so that what disturbs one disturbs the other
                all_gather_object(mesh, None)
                began_s = time.perf_counter()
                engine.run(batch, reroute=routing)
                own_s[i].append(time.perf_counter() - began_s)
                rows[i] = sum(decided.largest_load[-1] for decided in engine.controller.decided)
    finally:
        engine.close()
    even_s, crowd_s = (
        min(max(times) for times in zip(*(of_rank[i][1:] for of_rank in all_gather_object(mesh, own_s)), strict=True))
        for i in (0, 1)
    )
    return 1e6 * max(0.0, crowd_s - even_s) / max(1, rows[1] - rows[0])


def _replan_ms(config: InferConfig, opened: Opened, profile: RoutingTrace, tokens: int) -> float:
    """Planning and splitting, and bringing the experts in which the plans of two neighbouring batches of the profile differ."""
    served, host, mesh = opened.served, opened.host, opened.mesh
    policy = policy_of(config, served, profile)
    if policy.planner is None:
        return 0.0
    slots = slots_of(config, served)
    size = min(max(1, all_gather_object(mesh, tokens)[0] * served.num_devices), -(-profile.num_tokens // 2))
    ids = list(batches(profile, size))[: PLANS + 1]
    copy_s = _copy_s(opened)
    own_s = []
    for layer in range(host.num_layers):
        counts = [np.bincount(batch_TLK[:, layer].ravel(), minlength=served.num_experts) for batch_TLK in ids]
        for before_E, after_E in zip(counts, counts[1:], strict=False):
            before = policy.planner(before_E.astype(np.float64), served.num_devices, slots)
            after, plan_s = _planned(policy.planner, policy.split, after_E, served.num_devices, slots)
            moved = len(moved_slots(before, aligned(before, after), mesh.ep.rank))
            own_s.append(plan_s + moved * copy_s)
    return 1e3 * max(statistics.median(times) for times in all_gather_object(mesh, own_s or [0.0]))


def _planned(planner: Planner, split: Split, count_E: Counts, num_devices: int, slots: int) -> tuple[Placement, float]:
    """The plan, and seconds of planning and splitting; rows come from all ranks alike."""
    began_s = time.perf_counter()
    placement = planner(count_E.astype(np.float64), num_devices, slots)
    count_RE = np.tile(count_E // num_devices, (num_devices, 1))
    split(count_RE, placement)
    return placement, time.perf_counter() - began_s


def _copy_s(opened: Opened) -> float:
    """Of one expert from host memory."""
    host = opened.host
    to = torch.empty(host.shape.numel, dtype=host.shape.dtype)
    taken_s = []
    for expert in range(host.num_experts):
        began_s = time.perf_counter()
        to.copy_(host.expert(0, expert))
        taken_s.append(time.perf_counter() - began_s)
    return statistics.median(taken_s)
