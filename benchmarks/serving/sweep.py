"""A point of a map: one model on so many devices of a cluster, served under several modes in virtual time.

Few layers are walked: the first three, which a policy may plan otherwise than the rest, one that stands for all those after them,
and the last one, under which nothing is planned any more.  Batches before the walked ones are only decided, so that predictors
have learned.

Shapes: E experts, N devices, B batches, L MoE layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.serving.routing import TASKS, topic_routing
from megalina.blocks.model import plain_shape
from megalina.config import BYTES, InferConfig, PretrainConfig
from megalina.perfmodel.forecast.network import network_of
from megalina.placement.controller import Policy
from megalina.placement.placement import EMPTY, Placement
from megalina.placement.planners.greedy import greedy
from megalina.placement.split import even, load_aware
from megalina.placement.triggers import never
from megalina.serve.policies import Served, policy_of
from placement_lab.offline import counts_of_batches
from placement_lab.oracle import OraclePredictor
from placement_lab.serving.decisions import Decider, Decision, ServedBatch, even_choices
from placement_lab.serving.seconds import RooflineSeconds, row_s
from placement_lab.serving.simulator import BatchTime, PlannerSeconds, Serving, measured, walk

APART = 3  # layers that a policy may leave unplanned
LAYERS = APART + 2  # one that is like those after it, and the last one
LEARNING, WALKED = TASKS, TASKS  # batches
PROFILE_TOKENS = 8192
PAYS, AS_GOOD = 1.05, 0.02  # times as fast as static; of a mode's time
STATIC, ORACLE, IDEAL = "static", "oracle", "ideal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is served: routing and batches.  Decisions that no clock has a say in are the same on every cluster."""

    num_experts: int
    top_k: int
    num_devices: int
    device_tokens: int  # of a device in a batch
    slots: int  # of a device in each layer
    skew: float  # the busiest expert's rows over the mean expert's
    turns: bool = True  # two tasks take turns, batch by batch; False: one task for long


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What it is served on.  `config`: model, router, cluster, type and length of sequences."""

    config: PretrainConfig
    context: int  # 0: prefill
    expert_s: float  # to fetch an expert
    planner: PlannerSeconds


@dataclass(frozen=True, slots=True)
class ModeTime:
    """A mode at a point, means over the walked batches."""

    seconds: float  # of a batch, all layers of the model
    layer_s: float  # of a layer past the first few
    max_over_mean: float  # the busiest device's rows, past the first few layers
    fetched: float  # experts a device and layer, past the first few
    waits_s: Mapping[str, float]  # of a layer, mean over devices: what it stood still for


class Modes:
    """What serves a load under each mode: decided once for all hardware, but where a trigger weighs times.

    `modes`: settings by name; `STATIC`, `ORACLE` and `IDEAL` (even routing) are there besides."""

    def __init__(self, load: Load, modes: Mapping[str, InferConfig]):
        self.load, self.modes = load, dict(modes)
        routing = topic_routing(load.num_experts, load.top_k, LAYERS, load.skew)
        tokens = load.device_tokens * load.num_devices
        self.batches = routing.batches(LEARNING + WALKED, tokens=tokens, num_devices=load.num_devices, seed=1, turns=load.turns)
        self._profile = routing.profile(tokens=PROFILE_TOKENS, seed=2)
        self._even = [even_choices(batch, load.num_experts) for batch in self.batches]
        self._known: dict[tuple[str, float, float], tuple[Policy, list[list[Decision]]]] = {}
        self.residents = [resident(load.num_experts, load.num_devices, load.slots)] * LAYERS

    @property
    def names(self) -> tuple[str, ...]:
        return (STATIC, *self.modes, ORACLE, IDEAL)

    def decided(self, name: str, row_us: float, replan_ms: float) -> tuple[Policy, list[list[Decision]]]:
        """The mode's policy, and the decisions of the walked batches."""
        weighs = name in self.modes and self.modes[name].trigger == "gain"
        key = name, row_us if weighs else 0.0, replan_ms if weighs else 0.0
        if key not in self._known:
            policy = self._policy(name, row_us, replan_ms)
            decider = Decider(policy, self.residents)
            served = [decider.decide(batch) for batch in self.served(name)]
            self._known[key] = policy, served[LEARNING:]
        return self._known[key]

    def served(self, name: str) -> Sequence[ServedBatch]:
        return self._even if name == IDEAL else self.batches

    def plans(self, name: str) -> bool:
        """Whether something is planned while it serves: what nothing but the profile says is planned once, before."""
        return name == ORACLE or (name in self.modes and self.modes[name].predictor != "static")

    def _policy(self, name: str, row_us: float, replan_ms: float) -> Policy:
        load = self.load
        if name in (STATIC, IDEAL):
            return Policy(None, None, even, never)
        if name == ORACLE:
            counts_BLE = counts_of_batches([batch.ids_TLK for batch in self.batches], load.num_experts)
            return Policy(OraclePredictor(counts_BLE), greedy, load_aware, never)
        config = replace(self.modes[name], slots_per_device=load.slots, row_us=row_us, replan_ms=replan_ms)
        return policy_of(config, Served(load.num_experts, load.top_k, load.num_devices), self._profile)


def resident(num_experts: int, num_devices: int, slots: int) -> Placement:
    """As without replication: blocks of experts, or, of more devices than experts, groups of devices with one expert each."""
    own = -(-num_experts // num_devices)
    blocks = [[e for e in range(d * own, (d + 1) * own) if e < num_experts] for d in range(num_devices)]
    if num_devices > num_experts:
        blocks = [[d % num_experts] for d in range(num_devices)]
    return Placement(num_experts, tuple((*block, *[EMPTY] * (slots - len(block))) for block in blocks))


def mode_times(modes: Modes, hardware: Hardware, names: Sequence[str] = ()) -> dict[str, ModeTime]:
    """Of each mode, or of those by these names, on this hardware."""
    load, config = modes.load, hardware.config
    device = RooflineSeconds(config, context=hardware.context)
    even_rows = load.device_tokens * load.top_k
    row_us = 1e6 * max(1e-12, row_s(device, even_rows, min(load.slots, even_rows)))
    replan_ms = 1e3 * (hardware.planner.plan_s + load.slots * hardware.expert_s)
    times = {}
    for name in names or modes.names:
        policy, served = modes.decided(name, row_us, replan_ms)
        setting = Serving(
            shape=plain_shape((True,) * LAYERS, shared_experts=bool(config.model.shared_d_ff)),
            policy=policy,
            residents=modes.residents,
            device=device,
            network=replace(network_of(config.cluster), algorithm="direct"),
            row_bytes=config.model.d_model * BYTES[config.train.dtype],
            expert_s=hardware.expert_s,
            planner=hardware.planner if modes.plans(name) else PlannerSeconds(),
        )
        batches = modes.served(name)[LEARNING:]
        found = [measured(walk(b, d, setting), d, setting) for b, d in zip(batches, served, strict=True)]
        times[name] = _mode_time(found, load.num_devices, config.model.num_layers)
    return times


@dataclass(frozen=True, slots=True)
class Verdict:
    """What replication brings at a point."""

    gain: float  # static's time over that of the fastest mode that could be had
    mode: str  # that mode
    as_good: tuple[str, ...]  # modes within `AS_GOOD` of it
    most: float  # static's time over ideal's: what there is to gain

    @property
    def pays(self) -> bool:
        return self.gain >= PAYS


def verdict(times: Mapping[str, ModeTime]) -> Verdict:
    """Oracle and ideal are bounds, nobody has them."""
    static_s = times[STATIC].seconds
    real = {name: static_s / time.seconds for name, time in times.items() if name not in (STATIC, ORACLE, IDEAL)}
    mode = max(real, key=lambda name: real[name])
    as_good = tuple(name for name, gain in real.items() if gain >= real[mode] * (1 - AS_GOOD))
    return Verdict(real[mode], mode, as_good, static_s / times[IDEAL].seconds)


def _mode_time(batches: Sequence[BatchTime], num_devices: int, num_layers: int) -> ModeTime:
    alike = [batch.layers[APART] for batch in batches]
    layer_s = float(np.mean([layer.seconds for layer in alike]))
    walked_s = float(np.mean([batch.seconds for batch in batches]))
    fetched = [layer.fetched + layer.fetched_again for batch in batches for layer in batch.layers[APART:]]
    names = sorted({name for layer in alike for name in layer.parts_s if name.startswith("wait ")})
    return ModeTime(
        walked_s + (num_layers - LAYERS) * layer_s,
        layer_s,
        float(np.mean([x for batch in batches for x in batch.max_over_mean[APART:]])),
        float(np.mean(fetched)) / num_devices,
        {name: float(np.mean([layer.parts_s.get(name, 0.0) for layer in alike])) for name in names},
    )
