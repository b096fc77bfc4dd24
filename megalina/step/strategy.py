"""Strategies: which passes, with which numbers, make a training step of a forward pass.

A strategy is a function from a `Setting` to a list.  One's own is a file with such a function, `strategy.name=FILE.py:FUNCTION`,
which a YAML in `conf/strategy/` may name; docs/tutorial-own-schedule.md shows how.  Those here are entered in `STRATEGIES`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import cast

from megalina.reference import is_reference, load
from megalina.step.forward import Shape, plain
from megalina.step.list_scheduling import by_tails, guessed
from megalina.step.order import ordered
from megalina.step.partition import NONE, partition, ranges_of, side_by_side, with_own_counts
from megalina.step.passes import (
    ROUTER_STATE,
    chunk,
    defer_weights,
    finish,
    place_gradients,
    recompute,
    shard_of,
    step,
)
from megalina.step.place_weights import place_weights
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Instruction, Kind, Op, Program, check
from megalina.step.turns import paired
from megalina.step.whole_matrices import place_newton_schulz

LOSSES = "#losses.-.0"  # of each sequence
DDP_FIRST_BYTES = 2**20  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES


@dataclass(frozen=True, slots=True)
class Setting:
    """What a strategy may build a step from: a plan, and the model and batch that it is for."""

    shape: Shape
    buckets: Mapping[str, BucketSpec]  # in pieces as they go on the wire
    plan: Plan = Plan()
    micro_batches: int = 1
    recompute_mode: str = "none"
    element_bytes: int = 4  # of a gradient
    kept_bytes: Callable[[Instruction], int] = lambda instruction: 0  # by an instruction of backward, for its weights' gradients
    stages: tuple[tuple[int, ...], ...] = ()  # of a pipeline, the layers of each; (): there is none

    @property
    def cut(self) -> int:
        """Into how many parts a micro-batch is cut; the cells of a pipeline cut their own."""
        return 1 if self.shape.pipeline else self.plan.cut(self.micro_batches)

    @property
    def num_parts(self) -> int:
        return self.micro_batches * self.cut

    @property
    def late_layers(self) -> tuple[int, ...]:
        """MoE layers, the last ones of backward (in a pipeline of each stage's), whose experts' weights have their gradients
        computed after it."""
        stages, moe = self.stages or (range(len(self.shape.layers)),), self.shape.moe_layers
        return tuple(layer for stage in stages for layer in [i for i in moe if i in stage][: self.plan.late_layers])

    @property
    def gaps(self) -> dict[str, int] | None:
        """Elements of gradients for each gap of the wire; None: no limit."""
        return {gap: size // self.element_bytes for gap, size in self.plan.gap_bytes} or None

    def seconds(self, instruction: Instruction) -> float:
        """What an instruction takes, as far as the plan knows, else 0.  Without any times all-to-alls never end, so that all that
        can be computed meanwhile is."""
        if not self.plan.times_us:
            return float("inf") if instruction.carries_tokens else 0.0
        part = instruction.share / instruction.chunk[1]
        return part * dict(self.plan.times_us).get(instruction.timed_as, 0.0) / 1e6

    def under(self, plan: Plan) -> "Setting":
        """The same under another plan.  The pieces of sharded buckets stay: shards belong to them."""
        piece = max(1, plan.piece_bytes // self.element_bytes) if plan.piece_bytes else None
        buckets = {name: spec if spec.sharded else replace(spec, piece=piece) for name, spec in self.buckets.items()}
        return replace(self, plan=plan, buckets=buckets)


Strategy = Callable[[Setting], Program]


def eager(setting: Setting) -> Program:
    """Every gradient goes on the wire as soon as it is there, in pieces as the buckets' specs say."""
    return _finish(place_gradients(_plain_step(setting), setting.buckets), setting)


def ddp(setting: Setting) -> Program:
    """What PyTorch's DistributedDataParallel does beside expert parallelism: neighbours share buckets of 25 MiB, the first ones
    of 1 MiB."""
    return _finish(_merged(_plain_step(setting), setting, setting.buckets), setting)


def serial(setting: Setting) -> Program:
    """Gradients after the last all-to-all."""
    return _finish(place_gradients(_plain_step(setting), setting.buckets, place="tail"), setting)


def fixed(setting: Setting) -> Program:
    """An all-reduce between the two all-to-alls of each layer's backward, whatever it takes (Lina, section 7.2.1)."""
    return _finish(place_gradients(_plain_step(setting), setting.buckets, place="pair"), setting)


def priority(setting: Setting) -> Program:
    """All-to-all first: a gradient starts only while no tokens are on the wire (Lina, section 4.1).  The rungs of the paper's
    ladder differ in their numbers alone: pieces, chunks, packing."""
    return _finish(_placed(_plain_step(setting), setting), setting)


def flow(setting: Setting) -> Program:
    """Parts of the micro-batch walk through whole layers in turn; gradients go into what they leave of the wire.  Where the
    micro-batch is one group of the routers, its parts tell one another how full the experts are."""
    return _finish(_placed(_step(setting, together=setting.plan.parts), setting), setting)


def pair(setting: Setting) -> Program:
    """Backward of a micro-batch in turns with forward of the next one (Megatron-LM's combined 1F1B); with parts each of the two
    walks as in `flow`.  Gradients go as in `flow`."""
    return _finish(_placed(_step(setting, together=setting.plan.parts, pairs=True), setting), setting)


def lina_zero(setting: Setting) -> Program:
    """ZeRO-1 with the all-gathers of weights under the next step's forward; parts walk in turn as in `flow`."""
    program = _step(setting, together=setting.plan.parts)
    return _finish(place_gradients(program, setting.buckets, yields=setting.plan.yields), setting, params_ahead=True)


def search(setting: Setting) -> Program:
    """What a run walks before its search (`megalina/train/list_search.py`) has found a list: flow's, by longest tails."""
    program = flow(setting)
    if setting.plan.order:
        return program
    times = setting.seconds if setting.plan.times_us else guessed
    return by_tails(program, [times(instruction) for instruction in program])


# `strategy.name`; each has a file in conf/strategy/
STRATEGIES: Mapping[str, Strategy] = {
    "eager": eager,
    "ddp": ddp,
    "serial": serial,
    "fixed": fixed,
    "priority": priority,
    "priority_partition": priority,
    "lina_nopack": priority,
    "lina": priority,
    "flow": flow,
    "pair": pair,
    "lina_zero": lina_zero,
    "lancet": flow,  # whose weights' gradients are placed, and whose forward pass is partitioned, by `_step`
    "search": search,
}


def training_step(name: str, setting: Setting) -> Program:
    """The checked program of one training step, in the order of the plan if it has one.  ValueError for a strategy that isn't
    there, and for an order of another step."""
    program = strategy_named(name)(setting)
    if setting.plan.newton_schulz_after:
        program = place_newton_schulz(program, setting.buckets, setting.plan.newton_schulz_after)
    if setting.plan.order:
        program = ordered(program, setting.plan.order)
    check(program, given(program, setting), setting.buckets)
    return program


def strategy_named(name: str) -> Strategy:
    """Of `STRATEGIES`, or your own, FILE.py:FUNCTION.  ValueError for one that isn't there, and for what is no function."""
    if is_reference(name):
        own = load(name)
        if not callable(own):
            raise ValueError(
                f"strategy.name={name} is {type(own).__name__}, no function from a Setting to a list of instructions"
            )
        return cast(Strategy, own)
    if name not in STRATEGIES:
        raise ValueError(f"strategy.name is {name!r}: choose one of {', '.join(STRATEGIES)}, or give FILE.py:FUNCTION")
    return STRATEGIES[name]


def evaluation(shape: Shape, buckets: Mapping[str, BucketSpec]) -> Program:
    """The checked program of one forward pass without gradients, and the sum of its losses over the world.

    Multi-token prediction is left out, with the weights of its layers."""
    return _forward_alone(shape, buckets, by_sequence=False)


def scoring(shape: Shape, buckets: Mapping[str, BucketSpec]) -> Program:
    """As `evaluation`, but each sequence's loss by itself."""
    return _forward_alone(shape, buckets, by_sequence=True)


def _forward_alone(shape: Shape, buckets: Mapping[str, BucketSpec], *, by_sequence: bool) -> Program:
    left_out = {group for layer in range(shape.num_layers, len(shape.layers)) for group in shape.groups(layer)}
    buckets = {bucket: spec for bucket, spec in buckets.items() if bucket not in left_out}
    forward, shape = forward_alone(shape, by_sequence=by_sequence), shape.without_mtp
    program = (*forward, *loss_of_world(forward, by_sequence=by_sequence))
    check(program, given(program, Setting(shape, buckets)), buckets)
    return program


def forward_alone(shape: Shape, *, by_sequence: bool) -> Program:
    """A forward pass that nothing follows; its loss, or with `by_sequence` each sequence's."""
    forward = plain(replace(shape.without_mtp, head_logits=False))
    if not by_sequence:
        return forward
    return tuple(replace(s, name="sequence_losses", writes=(LOSSES,)) if s.key == ("loss", -1, "0") else s for s in forward)


def loss_of_world(forward: Program, *, by_sequence: bool) -> Program:
    """What closes a forward pass: the sum of its losses over the world.  A rank whose program gives none adds nothing."""
    name, value = ("scored", LOSSES) if by_sequence else ("evaluated", "loss.-.0")
    losses = tuple(v for s in forward for v in s.writes if v == value)
    own, wire = "#own_loss.-.0", "#own_loss>.-.0"
    start = Instruction("U", Kind.START, name, reads=(own,), writes=(wire,), op=Op.SUM, axis="world")
    return (
        Instruction("U", Kind.COMPUTE, name, reads=(*losses, "#batch.-.0"), writes=(own,)),
        start,
        replace(start, kind=Kind.WAIT, reads=(wire,), writes=("#loss.-.0",)),
    )


def settling(program: Program) -> Program:
    """The gathers of weights that a program leaves to the next step, alone: () where it leaves none."""
    return tuple(s for s in program if s.op is Op.PARAMS and s.phase == "F")


def given(program: Program, setting: Setting) -> set[str]:
    """What exists before a program: the batches, the parameters or this rank's part of them, and of a step the routers' state
    that it must move."""
    gathered = {s.name for s in settling(program)}
    batches = {f"#batch.-.{i}" for i in range(setting.num_parts)}
    state = {ROUTER_STATE} if setting.shape.router_state and any(s.phase == "B" for s in program) else set()
    return batches | {shard_of(b) if b in gathered else b for b in setting.buckets} | state


def _finish(program: Program, setting: Setting, *, params_ahead: bool = False) -> Program:
    return finish(program, setting.buckets, router_state=setting.shape.router_state, params_ahead=params_ahead)


def _placed(program: Program, setting: Setting) -> Program:
    """With gradients as soon as they are there, or in the gaps that were measured."""
    gaps = setting.gaps
    return place_gradients(
        program, setting.buckets, place="ready" if gaps is None else "gap", yields=setting.plan.yields, gaps=gaps
    )


def _merged(program: Program, setting: Setting, buckets: Mapping[str, BucketSpec]) -> Program:
    size = setting.plan.merge_bytes
    merge, merge_first = size // setting.element_bytes, min(DDP_FIRST_BYTES, size) // setting.element_bytes
    return place_gradients(program, buckets, merge=merge, merge_first=merge_first)


def place_of_rank(program: Program, buckets: Mapping[str, BucketSpec], setting: Setting) -> Program:
    """Gradients of one pipeline rank's list put on the wire where the plan's strategy has them; `buckets`: those of the rank."""
    strategy = setting.plan.strategy
    if strategy == "ddp":
        return _merged(program, setting, buckets)
    if strategy in ("serial", "fixed"):
        return place_gradients(program, buckets, place="tail" if strategy == "serial" else "pair")
    if strategy in ("eager", "lina_zero"):
        return place_gradients(program, buckets, yields=setting.plan.yields and strategy == "lina_zero")
    return _placed(program, replace(setting, buckets=buckets))


WHOLE = ("search",)  # strategies whose list goes over all layers, so that a pipeline can't have them
PIPELINED = tuple(name for name in STRATEGIES if name not in WHOLE)


def _plain_step(setting: Setting) -> Program:
    return _step(setting, together=1)


def forward_pass(setting: Setting) -> Program:
    """Of one micro-batch, before it is cut: its rows in chunks, with what is left out of backward and what is computed again."""
    forward = chunk(plain(setting.shape), setting.plan.chunks_of(setting.shape.moe))
    forward = defer_weights(
        defer_weights(forward, ("experts",), setting.late_layers), setting.shape.deferred(setting.plan.deferred_weights)
    )
    return recompute(forward, setting.shape.recomputed(setting.recompute_mode, forward))


def _step(setting: Setting, *, together: int, pairs: bool = False) -> Program:
    forward = _partitioned(forward_pass(setting), setting)
    cut = setting.cut if together > 1 else 1
    one_group = cut > 1 and setting.shape.micro_batch_groups
    program = step(
        forward,
        setting.micro_batches * cut,
        together=together,
        share=1 / cut,
        one_group=one_group,
        join_weights=setting.plan.join_weights,
        turns_round=not pairs and setting.plan.partition == NONE and set(setting.plan.chunks) == {1},
        arranged=backward_of(setting.plan),
    )
    return place_deferred(paired(program) if pairs else program, setting)


def backward_of(plan: Plan) -> Callable[[Program], Program]:
    """How the mirrors of a forward pass that the plan partitions are arranged."""
    return side_by_side if plan.partition != NONE and plan.partition_backward == "whole" else lambda backward: backward


def place_deferred(program: Program, setting: Setting, *, fixed: Collection[Instruction] = ()) -> Program:
    """Deferred gradients of weights under all-to-alls, where the plan has some; `fixed` ones stay where they are."""
    if not setting.plan.places_weights:
        return program
    late = setting.late_layers
    return place_weights(
        program,
        setting.seconds,
        kept_bytes=setting.kept_bytes,
        most_bytes=setting.plan.deferred_bytes or float("inf"),
        stays=lambda weight: weight in fixed or (weight.name == "experts" and weight.layer in late),
        queued=setting.plan.strategy == "pair",
    )


def _partitioned(forward: Program, setting: Setting) -> Program:
    if setting.plan.partition == NONE:
        return forward
    shape, forward = setting.shape, with_own_counts(forward)
    ranges = ranges_of(setting.plan.partition, forward, whole_routers=shape.whole_routers)
    return partition(forward, ranges, one_group=shape.micro_batch_groups, whole_routers=shape.whole_routers)
