"""What each layer of a layout costs a pipeline: seconds of its cells, bytes that it keeps for backward.

The ranks of a stage are priced as a world of their own.  A cell of one layer is filled by the very code that fills a pipeline's
cells (`Filling`), and walked alone in virtual time; the cells of a stage take what their layers take together.  That leaves out
what meets on the wire from different cells, messages and gradients, and is what a search can afford for thousands of layouts.
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

from megalina.blocks.dispatch import on_cuda
from megalina.config import ParallelConfig, PretrainConfig, StrategyConfig, padded_vocab_size
from megalina.layout import EMBEDDING
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.cost.instruction_seconds import instruction_seconds
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.perfmodel.forecast.network import network_for
from megalina.perfmodel.forecast.priced_step import PricedStep, Shared, nodes_that_sum
from megalina.perfmodel.sim.collectives import Collective
from megalina.perfmodel.sim.folding import FoldedLoads, Use
from megalina.perfmodel.sim.memory import Sizes, by_instruction
from megalina.perfmodel.sim.virtual import simulate_alike, uses_of
from megalina.step.partition import with_own_counts
from megalina.step.pipeline.cell import Entry, Pipeline, Work, backward, forward, input_gradients, weight_gradients
from megalina.step.pipeline.fill import NAME, Filling, axis_of
from megalina.step.pipeline.stages import StageLayers
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Instruction, Kind, Op, Program
from megalina.step.program import backward as mirrored
from megalina.step.strategy import forward_pass

BEFORE, BEHIND = -1, -2  # in place of a layer: what comes before the layers, and behind them
MARK = Instruction("U", Kind.COMPUTE, "mark")  # holds and makes nothing


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Of one layer, or of what is at an end, and one micro-batch."""

    kept: int = 0  # from its forward to its backward
    late: int = 0  # of these until the gradients of weights, where they come later
    working: int = 0  # at the most while it computes, above what is kept

    def __add__(self, other: "LayerBytes") -> "LayerBytes":
        """Of both in one stage."""
        return LayerBytes(self.kept + other.kept, self.late + other.late, max(self.working, other.working))


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Of one layer, or of what is at an end, and one micro-batch."""

    forward: float = 0.0
    backward: float = 0.0  # whole
    inputs: float = 0.0  # of backward that gives the gradients of inputs alone
    weights: float = 0.0
    pair: float = 0.0  # a forward and a whole backward that take turns

    def __add__(self, other: "LayerSeconds") -> "LayerSeconds":
        """Of both in one stage."""
        return LayerSeconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def whole(self) -> float:
        return self.forward + self.backward

    def of(self, work: Work) -> float:
        """Of a cell."""
        if work is Work.FORWARD:
            return self.forward
        return {Work.BACKWARD: self.backward, Work.INPUT_GRADIENTS: self.inputs, Work.WEIGHT_GRADIENTS: self.weights}[work]


class LayerCosts:
    """Of one layout, micro-batch and recompute mode.  Layers that are alike are priced once."""

    def __init__(self, config: PretrainConfig, world: int, plan: Plan, *, vocab_size: int, shared: Shared):
        """`config`: with pipelines, of `world` ranks in all."""
        parallel, plain = config.parallel, ParallelConfig()
        alone = replace(parallel, pp=1, pp_chunks=plain.pp_chunks, pp_layout=plain.pp_layout)
        strategy = replace(config.strategy, pipeline=StrategyConfig().pipeline)
        self.config = replace(config, parallel=alone, strategy=strategy)
        self.step = PricedStep(self.config, world // parallel.pp, plan, vocab_size=vocab_size, shared=shared)
        cuda, per_node = on_cuda(config.cluster), nodes_that_sum(config)
        self.held = InstructionBytes(config, world, vocab_size=vocab_size, cuda=cuda, ranks_per_node=per_node)
        rows = padded_vocab_size(vocab_size, parallel.tp)
        work = InstructionWork(config, world=world, vocab_rows=rows, buckets=self.held.buckets)
        self._seconds = instruction_seconds(config, work)
        self._shared, self._shape = shared, replace(self.step.setting.shape, pipeline=True)
        self._forward = with_own_counts(forward_pass(replace(self.step.setting, shape=self._shape)))
        self._keys: dict[int, Hashable] = {}
        self._bytes: dict[Hashable, LayerBytes] = {}
        self._walked: dict[Hashable, LayerSeconds] = {}

    @cached_property
    def _of_layer(self) -> Mapping[int, Program]:
        layered = [i for i, s in enumerate(self._forward) if s.layer >= 0]
        found: dict[int, list[Instruction]] = {BEFORE: [], BEHIND: []}
        for i, instruction in enumerate(self._forward):
            end = BEFORE if not layered or i < layered[0] else BEHIND
            found.setdefault(instruction.layer if instruction.layer >= 0 else end, []).append(instruction)
        return {layer: tuple(own) for layer, own in found.items()}

    @cached_property
    def _loads(self) -> FoldedLoads:
        """Of all that a step sends inside of a stage."""
        sizes, axes = self.step.sizes, self.step.held.axes
        uses: dict[Use, None] = dict.fromkeys(uses_of((*self._forward, *mirrored(self._forward)), sizes))
        for spec in self.held.buckets.values():
            uses |= dict.fromkeys((_inside(spec.axis), what) for what in (self._summed(spec), self._gathered))
        return self._shared.folded(network_for(self.config, self.step.plan.packing), axes, tuple(uses))

    def bytes_of(self, layer: int) -> LayerBytes:
        """Of a layer by its number, or of `BEFORE`, `BEHIND`."""
        if (key := self._key(layer)) not in self._bytes:
            self._bytes[key] = self._held(layer) if self._of_layer[layer] else LayerBytes()
        return self._bytes[key]

    def seconds_of(self, layer: int) -> LayerSeconds:
        """Of a layer by its number, or of `BEFORE`, `BEHIND`."""
        if (key := self._key(layer)) not in self._walked:
            self._walked[key] = self._priced(layer) if self._of_layer[layer] else LayerSeconds()
        return self._walked[key]

    def _key(self, layer: int) -> Hashable:
        """The same for layers that are alike."""
        if layer not in self._keys:
            alike = self.step.work.alike
            own = tuple((s.name, s.kind, s.op, s.chunk, s.recompute, alike(s)) for s in self._of_layer[layer])
            self._keys[layer] = (layer < 0 and layer, own)
        return self._keys[layer]

    def stage_bytes(self, stage: StageLayers) -> LayerBytes:
        return sum(map(self.bytes_of, _layers(stage)), LayerBytes())

    def stage_seconds(self, stage: StageLayers) -> LayerSeconds:
        return sum(map(self.seconds_of, _layers(stage)), LayerSeconds())

    def end_s(self, names: Collection[str], last: Collection[str]) -> float:
        """What a rank with these buckets does once its last cell is over: it waits for the sum of the `last` ones' gradients,
        which nothing hides; updates its weights, and gathers them with ZeRO-1."""
        element, main, found = self.held.rank.element, self.held.rank.main, 0.0
        for name in names:
            spec = self.held.buckets[name]
            found += self._seconds(Instruction("U", Kind.COMPUTE, f"update {name}"))
            found += self._alone_s(spec.axis, self._gathered, spec.numel * element) if spec.sharded else 0.0
            found += self._alone_s(spec.axis, self._summed(spec), spec.numel * main) if name in last else 0.0
        return found

    def _summed(self, spec: BucketSpec) -> Collective:
        what = Collective.REDUCE_SCATTER if spec.sharded else Collective.ALL_REDUCE
        return what.by_node if nodes_that_sum(self.config) else what

    @property
    def _gathered(self) -> Collective:
        return Collective.ALL_GATHER.by_node if nodes_that_sum(self.config) else Collective.ALL_GATHER

    def message_s(self, bytes_per_s: float, latency_s: float) -> float:
        """Of a micro-batch's tokens at this rate."""
        return self.step.held.value("x", MARK) / bytes_per_s + latency_s

    def _alone_s(self, axis: str, what: Collective, num_bytes: float) -> float:
        ranks = self.step.ranks_of(_inside(axis), 0)
        return self._loads.alone_s(self._loads.of(_inside(axis), what, ranks), num_bytes) if len(ranks) > 1 else 0.0

    def _walk_s(self, program: Program) -> float:
        step = self.step
        return simulate_alike(
            program,
            ranks=step.world,
            ranks_of=step.ranks_of,
            seconds=step.seconds,
            network=self._loads.network,
            sizes=step.sizes,
            slowest=True,
            loads=self._loads,
        ).step_s

    def _cells(self, layer: int, *, split: bool) -> Callable[[Entry], Program]:
        """An entry of a list -> its instructions, for a stage of this layer alone on a rank of its own."""
        ends = StageLayers((layer,) if layer >= 0 else (), embedding=layer == BEFORE, head=layer == BEHIND)
        first = (forward(0, 0), input_gradients(0, 0), weight_gradients(0, 0)) if split else (forward(0, 0), backward(0, 0))
        filling = Filling(Pipeline((first,), (0,), 2), [ends], self._of_layer[layer], self._shape.deferred("all"))
        return lambda entry: tuple(filling.body(entry, 0))

    def _priced(self, layer: int) -> LayerSeconds:
        whole, split = self._cells(layer, split=False), self._cells(layer, split=True)
        return LayerSeconds(
            forward=self._walk_s(whole(forward(0, 0))),
            backward=self._walk_s(whole(backward(0, 0))),
            inputs=self._walk_s(split(input_gradients(0, 0))),
            weights=self._walk_s(split(weight_gradients(0, 0))),
            pair=self._walk_s(whole((*forward(0, 1), *backward(0, 0)))),
        )

    def _held(self, layer: int) -> LayerBytes:
        sizes, whole, split = self.step.held, self._cells(layer, split=False), self._cells(layer, split=True)
        kept, _, working = held_around(sizes, whole(forward(0, 0)), whole(backward(0, 0)), layer)
        if layer < 0:
            return LayerBytes(kept, 0, working)
        _, late, more = held_around(sizes, split(forward(0, 0)), split(input_gradients(0, 0)), layer)
        return LayerBytes(kept, late, max(working, more))


def _layers(stage: StageLayers) -> tuple[int, ...]:
    return (*([BEFORE] if stage.embedding else []), *stage.layers, *([BEHIND] if stage.head else []))


def _inside(axis: str) -> str:
    """The axis of a stage that is a world in itself."""
    return {"stage": "world", EMBEDDING: "dp"}.get(axis, axis)


def held_around(sizes: Sizes, went: Program, back: Program, layer: int) -> tuple[int, int, int]:
    """Bytes between forward and backward, those left behind it, and the most above the first."""
    at = max(layer, 0)
    arrives, leaves = _message("F", at, Op.RECV, f"x.{at}.0"), _message("F", at + 1, Op.SEND, f"x.{at + 1}.0")
    returns, gone = _message("B", at + 1, Op.RECV, f"x.{at + 1}.0'"), _message("B", at, Op.SEND, f"x.{at}.0'")
    program = (*arrives, *went, *leaves, MARK, *returns, *back, *gone, replace(MARK, part="1"))
    found = by_instruction(sizes, program)
    always = sum(sizes.state.values())
    between, after = (size - always for instruction, size in found if instruction.name == MARK.name)
    return between, after, max(size for _, size in found) - always - between


def _message(phase: str, border: int, op: Op, value: str) -> Program:
    """START and WAIT of what comes from another stage, or goes there."""
    wire, comes = f"{value}~", op is Op.RECV
    reads = () if comes else (value,)
    start = Instruction(phase, Kind.START, NAME, border, reads=reads, writes=(wire,), op=op, axis=axis_of(0, 1))
    return start, replace(start, kind=Kind.WAIT, reads=(wire,), writes=(value,) if comes else ())
