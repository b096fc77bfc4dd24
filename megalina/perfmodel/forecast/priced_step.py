"""A priced step: from a configuration and a plan to the list that the trainer would run, with what it costs.

This is the one recipe of all forecasts.  What a line takes (`seconds`), what a START sends (`sizes`) and what a rank holds
(`memory`) follow from the configuration; `walk` puts them together in virtual time.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from megalina.blocks.dispatch import ONCE_PER_NODE, on_cuda
from megalina.blocks.model import step_shape
from megalina.blocks.sizes import LIMBS, NEARNESS_BINS
from megalina.collective_log import NUM_RIDERS
from megalina.config import BYTES, PretrainConfig, is_moe_layer, padded_vocab_size, training_layers
from megalina.layout import ranks_of, readers
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.cost.instruction_seconds import instruction_seconds
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.perfmodel.forecast.network import network_for, with_tokens
from megalina.perfmodel.sim.folding import FoldedLoads, Use
from megalina.perfmodel.sim.memory import Memory, memory_of, peak_of
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.stages import StageLoads, Stages, StageUse
from megalina.perfmodel.sim.virtual import Timeline, simulate_alike, uses_of
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Op, Program, shares_of
from megalina.step.strategy import Setting, training_step
from megalina.timeline.instruction_times import times_of
from megalina.validate_pipeline import refuse_pipelines

BETWEEN_NODES = {"got": "sent", "got'": "sent'", "y": "back", "y'": "back'"}  # of a value inside of nodes

KEPT_LISTS = 12
KEPT_OF_STAGES = 4  # lists of all pipeline ranks, which are larger
NEW_OBJECTS = 100_000  # between two garbage collections
NUMBER_BYTES = 8  # of a number of rows, and of all that is summed to close a step


class Shared:
    """Lists and folded networks, which layouts and plans have in common.  Lists are large: the latest ones alone are kept."""

    def __init__(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._folded: dict[Any, FoldedLoads] = {}
        self._ranks_of: dict[Any, Callable[[str, int], tuple[int, ...]]] = {}
        self._phases: dict[Any, Any] = {}
        self._phases_of: Any = None
        self._of_stages: dict[Any, StageLoads] = {}
        self._lists_of_stages: dict[Any, tuple[Program, ...]] = {}

    def program(self, setting: Setting) -> Program:
        """The list of its plan."""
        key = setting.plan, setting.shape, setting.micro_batches, setting.recompute_mode, tuple(setting.buckets.items())
        program = self._programs.pop(key, None) or training_step(setting.plan.strategy, setting)
        self._programs[key] = program
        if len(self._programs) > KEPT_LISTS:
            del self._programs[next(iter(self._programs))]
        return program

    def folded(self, network: Network, axes: Mapping[str, int], uses: tuple[Use, ...]) -> FoldedLoads:
        """As the walk wants it.  `axes`: ranks along each."""
        key = network, tuple(axes.items()), uses
        if key not in self._folded:
            if self._phases_of != key[:2]:  # large ones: of the latest layout alone
                self._phases_of, self._phases = key[:2], {}
            ranks = axes["world"]
            self._folded[key] = FoldedLoads(network, ranks, self.ranks_of(axes), uses, slowest=True, known=self._phases)
        return self._folded[key]

    def lists_of_stages(self, key: Any, make: Callable[[], tuple[Program, ...]]) -> tuple[Program, ...]:
        """Those of all pipeline ranks, made once for all that have this key."""
        programs = self._lists_of_stages.pop(key, None) or make()
        self._lists_of_stages[key] = programs
        if len(self._lists_of_stages) > KEPT_OF_STAGES:
            del self._lists_of_stages[next(iter(self._lists_of_stages))]
        return programs

    def of_stages(self, network: Network, stages: Stages, uses: tuple[StageUse, ...]) -> StageLoads:
        """As the walk of a pipeline wants it."""
        key = network, tuple(stages.shape.items()), stages.number, tuple(stages.across.items()), uses
        if key not in self._of_stages:
            self._of_stages[key] = StageLoads(network, stages, uses)
        return self._of_stages[key]

    def ranks_of(self, axes: Mapping[str, int]) -> Callable[[str, int], tuple[int, ...]]:
        """As `megalina.layout.ranks_of`."""
        key = tuple(axes.items())
        if key not in self._ranks_of:
            self._ranks_of = {key: ranks_of(axes)}
        return self._ranks_of[key]


class PricedStep:
    """One step of `world` ranks that are all alike.  Values that take time to compute are computed on first use."""

    def __init__(
        self,
        config: PretrainConfig,
        world: int,
        plan: Plan,
        *,
        vocab_size: int,
        load: float = 1.0,
        shared: Shared | None = None,
        network: Network | None = None,
        seconds: Callable[[Instruction], float] | None = None,
    ):
        """`vocab_size`: before padding; `load`: rows of the busiest rank's experts over the mean, which all ranks then compute;
        `shared`: what other steps have made; `network`, `seconds`: None: those of the configuration's cluster.  ValueError where
        the layout does not fit the world, and for pipelines, which `PricedPipeline` has."""
        refuse_pipelines(config, "this is of ranks that all hold the same list")
        self.config, self.world, self.plan, self.load = config, world, plan, load
        self.vocab_size, self._shared, self._network, self._seconds = vocab_size, shared or Shared(), network, seconds
        self.held = InstructionBytes(
            config,
            world,
            vocab_size=vocab_size,
            skew=load,
            packing=plan.packing,
            piece_bytes=plan.piece_bytes,
            cuda=on_cuda(config.cluster),
            ranks_per_node=nodes_that_sum(config),
        )
        micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * readers(self.held.axes))
        self._together = plan.parts // plan.cut(micro_batches)
        self.rounds = micro_batches // self._together  # of micro-batches that walk together

    def under(self, plan: Plan) -> "PricedStep":
        """The same step under another plan of the same packing."""
        return PricedStep(
            self.config,
            self.world,
            plan,
            vocab_size=self.vocab_size,
            load=self.load,
            shared=self._shared,
            network=self._network,
            seconds=self._seconds,
        )

    @cached_property
    def ranks_of(self) -> Callable[[str, int], tuple[int, ...]]:
        """(axis, rank) -> the ranks of its row."""
        return self._shared.ranks_of(self.held.axes)

    @cached_property
    def program(self) -> Program:
        """The whole step."""
        return self.listed(self.rounds)

    @cached_property
    def timed_plan(self) -> Plan:
        """The plan, with what instructions take where its strategy places by times: those of a walk without, as a run measures
        its own.  As it is where the cluster's file lacks figures."""
        if not self.plan.places_weights or self.plan.times_us:
            return self.plan
        untimed = self._listed(self.plan, 1)
        try:
            events = self.walk(program=untimed).events(0)
        except ValueError:
            return self.plan
        return replace(self.plan, times_us=tuple(sorted(times_of(events, shares_of(untimed)).items())))

    def listed(self, rounds: int) -> Program:
        """A step of so many rounds."""
        return self._listed(self.timed_plan, rounds)

    def _listed(self, plan: Plan, rounds: int) -> Program:
        return self._shared.program(self._setting(plan, rounds))

    @property
    def setting(self) -> Setting:
        """What a strategy builds the whole step from."""
        return self._setting(self.timed_plan, self.rounds)

    def _setting(self, plan: Plan, rounds: int) -> Setting:
        return setting_of(self.config, self.held, plan, rounds * self._together)

    @cached_property
    def token_bytes(self) -> tuple[float, float]:
        """What all ranks' exchanges of tokens send in a step, between nodes and to other ranks within one.  Routing is even."""
        sent = self.rounds * sum(self.sizes.bytes_of(s) for s in self.listed(1) if s.carries_tokens and s.kind is Kind.START)
        return between_and_within(self.world * sent, self.ranks_of("ep", 0), self.config.cluster.ranks_per_node or self.world)

    @property
    def list_for_memory(self) -> Program:
        """The shortest list that holds as much as the whole step's: more than two rounds hold no more, and of `pair` more than
        three, since what one round's backward leaves to be done later is there beside two others."""
        return self.listed(min(3 if self.plan.strategy == "pair" else 2, self.rounds))

    @property
    def state_bytes(self) -> int:
        """What a rank holds throughout, without an activation."""
        return sum(self.held.state.values())

    @cached_property
    def peak(self) -> tuple[int, int]:
        """The most bytes that a rank holds, and at which instruction of `list_for_memory`."""
        return peak_of(self.held, self.list_for_memory)

    @cached_property
    def memory(self) -> Memory:
        return memory_of(self.held, self.list_for_memory, at=self.peak[1])

    @cached_property
    def work(self) -> InstructionWork:
        """What an instruction asks of a device."""
        rows = padded_vocab_size(self.vocab_size, self.config.parallel.tp)
        buckets, packing = self.held.buckets, self.plan.packing
        return InstructionWork(self.config, world=self.world, vocab_rows=rows, buckets=buckets, packing=packing)

    @cached_property
    def seconds(self) -> Callable[[Instruction], float]:
        """What an instruction takes.  ValueError where the cluster's file lacks figures."""
        return self._seconds or instruction_seconds(self.config, self.work, load=self.load)

    @cached_property
    def sizes(self) -> Sizes:
        """What a START sends."""
        return sizes_of(self.config, self.held)

    def walk(
        self,
        network: Network | None = None,
        *,
        program: Program | None = None,
        seconds: Callable[[Instruction], float] | None = None,
        sizes: Sizes | None = None,
        host: Callable[[Instruction], float] | None = None,
    ) -> Timeline:
        """The step in virtual time; rank 0 walks for all.  In place of its own: the cluster's network, the whole step's list,
        its seconds and sizes; `host`: as of `simulate_alike`."""
        given = network or self._network
        packing = self.plan.packing
        network = with_tokens(given, self.config, packing) if given is not None else network_for(self.config, packing)
        program, sizes = program or self.program, sizes or self.sizes
        return simulate_alike(
            program,
            ranks=self.world,
            ranks_of=self.ranks_of,
            seconds=seconds or self.seconds,
            network=network,
            sizes=sizes,
            slowest=True,
            host=host,
            loads=self._shared.folded(network, self.held.axes, uses_of(program, sizes)),
        )


def nodes_that_sum(config: PretrainConfig) -> int:
    """Ranks on a node of the configuration's cluster, where gradients are summed by node (parallel.reduce): where gloo sums them,
    if nobody said more.  0: they aren't.  What `megalina.parallel.meshes.summing_by_node` finds in a run."""
    cluster, wanted = config.cluster, config.parallel.reduce
    by_node = wanted == "by_node" or (wanted == "auto" and not on_cuda(cluster))
    return cluster.ranks_per_node if by_node and cluster.ranks_per_node > 1 else 0


@contextmanager
def few_collections() -> Iterator[None]:
    """Few garbage collections, where lists of ten thousands of instructions are made.

    What was there before is not searched again and again, nor are lists while they grow; afterwards all is as it was."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def setting_of(config: PretrainConfig, held: InstructionBytes, plan: Plan, micro_batches: int) -> Setting:
    """What lists of so many micro-batches are built from.  `held`: of one rank."""
    setting = Setting(
        step_shape(config),
        held.buckets,
        micro_batches=micro_batches,
        recompute_mode=config.train.recompute,
        element_bytes=max(BYTES[config.train.dtype], 4),
        kept_bytes=held.kept_back,
    )
    return setting.under(plan)


def between_and_within(sent: float, row: Sequence[int], per_node: int) -> tuple[float, float]:
    """Of the bytes that all ranks send along an axis, evenly to all of their row: those to other nodes, and those within."""
    pairs = [(a // per_node == b // per_node) for a in row for b in row if a != b]
    each = sent / len(row) ** 2
    return each * pairs.count(False), each * pairs.count(True)


def sizes_of(config: PretrainConfig, held: InstructionBytes) -> Sizes:
    """Routing is even.  `held`: of one rank."""
    scattered = [name for name, spec in held.buckets.items() if spec.sharded]
    return Sizes(
        bytes_of(config, held),
        scattered,
        by_node=nodes_that_sum(config) > 0,
        tokens_by_node=held.blocks.whole.dispatch.kind == ONCE_PER_NODE,
    )


def bytes_of(config: PretrainConfig, held: InstructionBytes) -> Callable[[Instruction], float]:
    """Of a START: the whole tensor that a rank sends (all-to-all: also to itself), sums, or has after a gather."""
    weight_bytes = BYTES[config.train.dtype]
    gradient_bytes = max(weight_bytes, 4)
    experts, moe_layers = config.model.num_experts, sum(is_moe_layer(config.model, i) for i in training_layers(config.model))
    bins = NEARNESS_BINS * (config.router.capacity_bound != "none")
    loads = moe_layers * (experts + 1 + bins + LIMBS)  # of each layer: rows of each expert, lost choices, cosines, a digest
    numbers = {"divisor": 2 + LIMBS, "all_loads": loads, "measured": len(held.blocks.losses) + 2 + NUM_RIDERS + 2 + loads}
    numbers["head_logits"] = len(held.blocks.layers) * held.blocks.clipped_groups

    by_node = held.blocks.whole.dispatch.kind == ONCE_PER_NODE

    def of(instruction: Instruction) -> float:
        elements = instruction.piece[1] - instruction.piece[0]
        match instruction.op:
            case Op.GRADS:
                return elements * gradient_bytes
            case Op.PARAMS:
                return elements * weight_bytes
            case Op.COUNTS:
                counted = held.axes["ep"] if instruction.reads[0].startswith("#way.") else experts
                return counted * NUMBER_BYTES  # also where one exchange is enough for all layers
            case Op.SUM | Op.MAX if instruction.name in numbers:
                return numbers[instruction.name] * NUMBER_BYTES
            case Op.SEND | Op.RECV:
                return held.value("x", instruction)
            case Op.GATHER:
                return held.value(instruction.reads[0], instruction) * held.axes[instruction.axis]
            case Op.TOKENS if by_node:  # what travels between nodes: that is what is sent first, or what comes back
                head, dot, rest = instruction.reads[0].partition(".")
                return held.value(BETWEEN_NODES.get(head, head) + dot + rest, instruction)
            case _:
                return held.value(instruction.reads[0], instruction)

    return of
