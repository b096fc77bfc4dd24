"""What was measured of inference on emulated devices, and the same batches in virtual time.

The real engine's host (exchanges, small math, Python) takes time in each layer that emulated devices don't hide.  Here that is
one number, fitted on one row; planning, and whatever else a mode costs the host, is as if it were free.

Shapes: B batches, T tokens of a batch, L MoE layers.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megalina.blocks.dispatch import ONCE_PER_RANK
from megalina.blocks.model import plain_shape
from megalina.config import InferConfig
from megalina.perfmodel.sim.network import Network
from megalina.placement.planners.identity import identity
from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import RoutingTrace
from megalina.serve.policies import Served, policy_of
from placement_lab.serving.decisions import Decider, even_choices, shared_evenly
from placement_lab.serving.seconds import GivenTimes
from placement_lab.serving.simulator import Serving, walk

BATCH_TOKENS, BATCHES, LAYERS = 512, 16, 26  # as they were measured with
EXPERTS, SLOTS = 16, 4
ATTENTION_S, EXPERTS_S, EXPERT_S = 6.5e-3, 19.5e-3, 0.35e-3
FITTED = (16, "paper", "ideal")  # on its median
Setting = tuple[int, str]  # devices, skew


@dataclass(frozen=True, slots=True)
class Measured:
    """A row of docs/log.md."""

    p50_ms: float
    p95_ms: float
    fetched: float  # experts a batch, on device 0


# docs/log.md, 2026-11-26: "inference on slow devices, all 26 layers"
MEASURED: Mapping[Setting, Mapping[str, Measured]] = {
    (16, "real"): {
        "static": Measured(2439, 3180, 0.0),
        "window": Measured(1698, 1846, 73.4),
        "lina": Measured(1098, 1167, 31.8),
        "best": Measured(889, 913, 75.4),
        "ideal": Measured(854, 878, 0.0),
    },
    (16, "paper"): {
        "static": Measured(1787, 2082, 0.0),
        "window": Measured(1245, 1296, 73.5),
        "lina": Measured(1076, 1138, 26.4),
        "best": Measured(883, 893, 78.4),
        "ideal": Measured(846, 862, 0.0),
    },
    (8, "real"): {
        "static": Measured(1572, 1875, 0.0),
        "window": Measured(1339, 1537, 73.7),
        "lina": Measured(960, 978, 41.1),
        "best": Measured(844, 861, 77.9),
        "ideal": Measured(820, 830, 0.0),
    },
    (8, "paper"): {
        "static": Measured(1281, 1403, 0.0),
        "window": Measured(1176, 1241, 74.7),
        "lina": Measured(944, 969, 31.1),
        "best": Measured(852, 874, 78.4),
        "ideal": Measured(821, 838, 0.0),
    },
}


@dataclass(frozen=True, slots=True)
class Replayed:
    """A mode on the batches that were measured, in virtual time."""

    p50_ms: float
    p95_ms: float
    fetched: float  # experts a batch, on device 0, the first batch that warms up among them
    load_p95: float  # the busiest device's rows over the mean


def replayed(batches: Sequence[Ids], profile: RoutingTrace, config: InferConfig, *, num_devices: int, host_s: float) -> Replayed:
    """`batches`: [T, L, 1] each, the first of which is served once more before, to warm up.  `host_s`: of a layer."""
    rows = BATCH_TOKENS // num_devices
    config = replace(config, slots_per_device=SLOTS, row_us=1e6 * EXPERTS_S / rows, replan_ms=1e3 * SLOTS * EXPERT_S)
    policy = policy_of(config, Served(EXPERTS, 1, num_devices), profile)
    residents = [identity(np.ones(EXPERTS), num_devices, SLOTS)] * batches[0].shape[1]
    setting = Serving(
        shape=plain_shape((True,) * len(residents)),
        policy=policy,
        residents=residents,
        device=GivenTimes(
            attention_s=ATTENTION_S,
            experts_full_s=EXPERTS_S,
            even_tokens=rows,
            even_rows=rows,
            others_s={"assign": host_s},
        ),
        network=Network(nic_bytes_per_s=math.inf),  # no link is emulated; loopback's time is the host's
        row_bytes=0.0,
        expert_s=EXPERT_S,
        combine_chunks=config.combine_chunks,
        once_per_rank=config.dispatch == ONCE_PER_RANK,
    )
    decider, seconds, loads, fetched = Decider(policy, residents), [], [], 0
    for number, ids_TLK in enumerate([batches[0], *batches]):
        batch = shared_evenly(ids_TLK, num_devices)
        batch = even_choices(batch, EXPERTS) if config.even_routing else batch
        decisions = decider.decide(batch)
        fetched += sum(int(d.fetched_N[0] + d.fetched_again_N[0]) for d in decisions)
        if number:
            seconds.append(walk(batch, decisions, setting).step_s)
            loads += [float(d.load_N.max() / d.load_N.mean()) for d in decisions]
    return Replayed(
        statistics.median(seconds) * 1e3,
        float(np.quantile(seconds, 0.95)) * 1e3,
        fetched / (len(batches) + 1),
        float(np.quantile(loads, 0.95)),
    )


def fitted_host_s(without_host: Replayed, measured: Measured, layers: int) -> float:
    """Of a layer, such that the medians agree: nothing hides it, so it is what is left."""
    return max(0.0, (measured.p50_ms - without_host.p50_ms) / layers / 1e3)


def table(found: Mapping[Setting, Mapping[str, Replayed]], host_s: float) -> str:
    """Measured and simulated side by side, in Markdown; ratios are of static to the mode."""
    lines = [
        f"Host time {host_s * 1e3:.2f} ms a layer, fitted on the median of {FITTED[2]}, {FITTED[0]} devices, skew {FITTED[1]}; "
        "nothing else is fitted.  ms, measured / simulated.",
        "",
        "| devices, skew | mode | median | off | p95 | off | static / it: median | p95 | fetched on device 0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    off = []
    for (devices, skew), modes in found.items():
        real = MEASURED[devices, skew]
        for mode, own in modes.items():
            was, still, static = real[mode], real["static"], modes["static"]
            errors = [own.p50_ms / was.p50_ms - 1, own.p95_ms / was.p95_ms - 1]
            off += errors if (devices, skew, mode) != FITTED else errors[1:]
            lines.append(
                f"| {devices}, {skew} | {mode} | {was.p50_ms:.0f} / {own.p50_ms:.0f} | {errors[0]:+.1%} "
                f"| {was.p95_ms:.0f} / {own.p95_ms:.0f} | {errors[1]:+.1%} "
                f"| {still.p50_ms / was.p50_ms:.2f} / {static.p50_ms / own.p50_ms:.2f} "
                f"| {still.p95_ms / was.p95_ms:.2f} / {static.p95_ms / own.p95_ms:.2f} | {was.fetched:.1f} / {own.fetched:.1f} |"
            )
    size = np.abs(off)
    lines += ["", f"{len(off)} times, without the fitted one: off by {np.median(size):.1%} (median), {size.max():.1%} (worst)."]
    return "\n".join(lines)
