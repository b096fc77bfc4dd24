"""A forecast: how long a training step takes on a cluster, and what a rank holds, without starting anything.

The list is the one that the trainer would run.  It is walked in virtual time, with the seconds of `megalina/cost` and the network
of the cluster's file, and once more for its bytes.  All ranks are taken to be alike: routing is even.  Of many micro-batches few
are walked, and the rest take what one more of them adds.  Lists and folded networks serve many forecasts (`Shared`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megalina.config import ClusterConfig, PretrainConfig
from megalina.cost.stage_bytes import StageBytes
from megalina.cost.stage_seconds import stage_seconds
from megalina.cost.stage_work import StageWork
from megalina.forecast.network import network_of
from megalina.forecast.sent import sizes_of
from megalina.mesh import rows
from megalina.parallel.plans import first_plan
from megalina.parallel.shard import shape_of
from megalina.parameters import BYTES, padded_vocab_size
from megalina.sim.folding import FoldedLoads, Use
from megalina.sim.memory import Memory, memory_of
from megalina.sim.network import Network
from megalina.sim.virtual import Timeline, simulate_alike, uses_of
from megalina.step.plan import Plan
from megalina.step.program import Program
from megalina.step.strategy import Setting, training_step
from megalina.timeline.contention import summary
from megalina.train.model_flops import ModelFlops, model_flops

RESERVED_BYTES = 4 * 2**30  # of a GPU's memory: driver, NCCL's buffers, holes; assumed
KEPT_LISTS = 12
WALKED = 3  # rounds of micro-batches, at most: those between the first and the last are alike


@dataclass(frozen=True, slots=True)
class Walked:
    """A step in virtual time.  Seconds of one rank; the others do the same."""

    step_s: float
    compute_s: float
    exposed_s: Mapping[str, float]  # by class (a2a, grads, params, other): how long the device stands still for it

    def longer(self, by: "Walked", rounds: int) -> "Walked":
        """With so many more rounds, each of which adds what this step has more than `by`."""

        def more(own: float, less: float) -> float:
            return own + rounds * (own - less)

        exposed_s = {name: more(own, by.exposed_s[name]) for name, own in self.exposed_s.items()}
        return Walked(more(self.step_s, by.step_s), more(self.compute_s, by.compute_s), exposed_s)


@dataclass(frozen=True, slots=True)
class Forecast:
    """One configuration under one plan.  Bytes are of one rank."""

    plan: Plan
    world: int
    walked: Walked
    timeline: Timeline  # of a step with `WALKED` rounds of micro-batches, if it has more
    memory: Memory
    memory_limit_bytes: float  # inf: the cluster's file doesn't say
    tokens: int  # of a step, all ranks
    flops: ModelFlops
    peak_flops_per_s: float  # of a device

    @property
    def step_s(self) -> float:
        return self.walked.step_s

    @property
    def exposed_s(self) -> Mapping[str, float]:
        return self.walked.exposed_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def tokens_a_day(self) -> float:
        return self.tokens_per_s * 86400

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s over the devices' peak; None where no peak is known."""
        peak = self.peak_flops_per_s * self.world
        return self.tokens_per_s * self.flops.per_token / peak if peak else None

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory_limit_bytes


class Shared:
    """Lists and folded networks, which layouts and plans have in common.  Lists are large: the latest ones alone are kept."""

    def __init__(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._folded: dict[Any, FoldedLoads] = {}
        self._ranks_of: dict[Any, Callable[[str, int], tuple[int, ...]]] = {}
        self._phases: dict[Any, Any] = {}
        self._phases_of: Any = None

    def program(self, config: PretrainConfig, plan: Plan, held: StageBytes, *, micro_batches: int) -> Program:
        """As `program_of`."""
        setting = setting_of(config, plan, held, micro_batches=micro_batches)
        key = plan, setting.shape, micro_batches, setting.recompute_mode, tuple(setting.buckets.items())
        program = self._programs.pop(key, None) or training_step(plan.strategy, setting)
        self._programs[key] = program
        if len(self._programs) > KEPT_LISTS:
            del self._programs[next(iter(self._programs))]
        return program

    def list_for_memory(self, config: PretrainConfig, plan: Plan, held: StageBytes) -> Program:
        """The shortest list that holds as much as the whole step's: more than two rounds hold no more."""
        rounds, micro_batches = rounds_of(config, plan, held)
        return self.program(config, plan, held, micro_batches=min(2, rounds) * micro_batches)

    def folded(self, network: Network, axes: Mapping[str, int], uses: tuple[Use, ...]) -> FoldedLoads:
        """As the walk wants it.  `axes`: ranks along each."""
        key = network, tuple(axes.items()), uses
        if key not in self._folded:
            if self._phases_of != key[:2]:  # large ones: of the latest layout alone
                self._phases_of, self._phases = key[:2], {}
            ranks = axes["world"]
            self._folded[key] = FoldedLoads(network, ranks, self.ranks_of(axes), uses, slowest=True, known=self._phases)
        return self._folded[key]

    def ranks_of(self, axes: Mapping[str, int]) -> Callable[[str, int], tuple[int, ...]]:
        """As the function."""
        key = tuple(axes.items())
        if key not in self._ranks_of:
            self._ranks_of = {key: ranks_of(axes)}
        return self._ranks_of[key]


def forecast(
    config: PretrainConfig,
    world: int,
    *,
    vocab_size: int,
    plan: Plan | None = None,
    load: float = 1.0,
    shared: Shared | None = None,
) -> Forecast:
    """`vocab_size`: before padding; `plan`: None takes the one that a run begins with; `load`: rows of the busiest rank's experts
    over the mean, which all ranks then compute; `shared`: what earlier forecasts have made.

    ValueError where the cluster's file lacks figures, or the layout does not fit the world."""
    plan = plan or first_plan(config.strategy, packing=1 if config.strategy.packing == "auto" else int(config.strategy.packing))
    shared = shared or Shared()
    held = held_by(config, world, plan, vocab_size=vocab_size, load=load)
    memory = memory_of(held, shared.list_for_memory(config, plan, held))
    return timed(config, world, plan, held, memory, vocab_size=vocab_size, load=load, shared=shared)


def held_by(config: PretrainConfig, world: int, plan: Plan, *, vocab_size: int, load: float = 1.0) -> StageBytes:
    """The bytes of one rank under a plan."""
    return StageBytes(
        config,
        world,
        vocab_size=vocab_size,
        skew=load,
        packing=plan.packing,
        piece_bytes=plan.piece_bytes,
        cuda=on_cuda(config.cluster),
    )


def timed(
    config: PretrainConfig,
    world: int,
    plan: Plan,
    held: StageBytes,
    memory: Memory,
    *,
    vocab_size: int,
    load: float = 1.0,
    shared: Shared,
) -> Forecast:
    """The forecast where memory is known."""
    train = config.train
    rounds, micro_batches = rounds_of(config, plan, held)
    programs = [shared.program(config, plan, held, micro_batches=n * micro_batches) for n in walked_rounds(rounds)]
    timelines = [_timeline(config, plan, held, program, world, vocab_size, load, shared) for program in programs]
    walked = [_walked(timeline) for timeline in timelines]
    return Forecast(
        plan,
        world,
        walked[0] if len(walked) == 1 else walked[1].longer(walked[0], rounds - WALKED),
        timelines[-1],
        memory,
        memory_limit_bytes(config.cluster),
        train.global_batch_size * train.seq_len,
        model_flops(config.model, config.router, vocab_size=vocab_size, seq_len=train.seq_len),
        peak_of(config),
    )


def rounds_of(config: PretrainConfig, plan: Plan, held: StageBytes) -> tuple[int, int]:
    """A step's rounds, and micro-batches of a round: as many as walk together."""
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * held.axes["dp"])
    together = plan.parts if micro_batches % plan.parts == 0 else 1
    return micro_batches // together, together


def walked_rounds(rounds: int) -> tuple[int, ...]:
    """Steps that are walked for one of so many rounds."""
    return (rounds,) if rounds <= WALKED else (WALKED - 1, WALKED)


def setting_of(config: PretrainConfig, plan: Plan, held: StageBytes, *, micro_batches: int) -> Setting:
    """What the list for so many micro-batches is made of."""
    return plan.setting(
        shape_of(config.model, config.router, tp=config.parallel.tp, sequence=config.parallel.sequence),
        held.buckets,
        micro_batches=micro_batches,
        recompute_mode=config.train.recompute,
        element_bytes=max(BYTES[config.train.dtype], 4),
    )


def program_of(config: PretrainConfig, plan: Plan, held: StageBytes, *, micro_batches: int) -> Program:
    """The list that the trainer would run for a step of so many micro-batches."""
    return training_step(plan.strategy, setting_of(config, plan, held, micro_batches=micro_batches))


def _timeline(
    config: PretrainConfig,
    plan: Plan,
    held: StageBytes,
    program: Program,
    world: int,
    vocab_size: int,
    load: float,
    shared: Shared,
) -> Timeline:
    vocab_rows = padded_vocab_size(vocab_size, config.parallel.tp)
    work = StageWork(config, world=world, vocab_rows=vocab_rows, buckets=held.buckets, packing=plan.packing)
    sizes = sizes_of(config, held)
    return simulate_alike(
        program,
        ranks=world,
        ranks_of=shared.ranks_of(held.axes),
        seconds=stage_seconds(config, work, load=load),
        network=network_of(config.cluster),
        sizes=sizes,
        slowest=True,
        loads=shared.folded(network_of(config.cluster), held.axes, uses_of(program, sizes)),
    )


def _walked(timeline: Timeline) -> Walked:
    found = summary(timeline.events(0), {})
    return Walked(timeline.step_s, found.compute_s, {name: traffic.exposed_s for name, traffic in found.traffic.items()})


def memory_limit_bytes(cluster: ClusterConfig) -> float:
    """What a rank may hold; inf: the cluster's file doesn't say."""
    gib = cluster.hardware.memory_gib
    reserved = 0 if cluster.hardware.host_is_device else RESERVED_BYTES
    return gib * 2**30 - reserved if gib else math.inf


def fits_in(cluster: ClusterConfig, num_bytes: float) -> bool:
    return num_bytes <= memory_limit_bytes(cluster)


def on_cuda(cluster: ClusterConfig) -> bool:
    """Whether its devices are GPUs, neither emulated ones nor cores."""
    return cluster.hardware.domain_ranks > 0 and not cluster.hardware.host_is_device


def ranks_of(axes: Mapping[str, int]) -> Callable[[str, int], tuple[int, ...]]:
    """`axes`: ranks along each."""
    table = rows({name: axes[name] for name in ("edp", "ep", "tp")})
    row_of: dict[str, dict[int, tuple[int, ...]]] = {}  # of the axes that are asked for: a hundred thousand ranks take their time

    def row(axis: str, rank: int) -> tuple[int, ...]:
        if axis not in row_of:
            row_of[axis] = {rank: row for row in map(tuple, table[axis]) for rank in row}
        return row_of[axis][rank]

    return row


def peak_of(config: PretrainConfig) -> float:
    """FLOP/s of a device in the run's type; 0: unknown."""
    hardware = config.cluster.hardware
    known = {"float32": hardware.float32_tflops, "bfloat16": hardware.bfloat16_tflops}
    return (known.get(config.train.dtype) or config.cluster.peak_tflops) * 1e12
