"""Strategies: which passes, with which numbers, make a training step of a forward pass.

A strategy is a function from a `Setting` to a list.  To add one, write such a function, enter it in `STRATEGIES`, and give it
a YAML in `conf/strategy/`; docs/strategies.md shows how.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megalina.step.forward import Shape, plain
from megalina.step.passes import RECOMPUTED, ROUTER_BIAS, chunk, finish, late_weights, place_gradients, recompute, shard_of, step
from megalina.step.program import BucketSpec, Instruction, Kind, Op, Program, check


@dataclass(frozen=True, slots=True)
class Setting:
    """What a strategy may build a step from; from `parts` on, the numbers of `conf/strategy/`, or of a plan."""

    shape: Shape
    buckets: Mapping[str, BucketSpec]
    micro_batches: int = 1
    recompute_mode: str = "none"
    parts: int = 1  # that walk through the layers in turn (flow)
    chunks_of: Mapping[int, int] = field(default_factory=dict)  # layer -> chunks of its rows
    merge: int = 0  # elements: neighbouring buckets go as one collective once they have so many ...
    merge_first: int = 0  # ... the first ones of an axis once they have so many; 0: as all
    yields: bool = False  # gradients wait while tokens are on the wire
    late_layers: int = 0  # so many MoE layers, the last ones of backward, get the gradients of experts' weights after it
    gaps: Mapping[str, int] | None = None  # elements of gradients for each gap of the wire; None: no limit

    @property
    def cut(self) -> int:
        """Into how many parts a micro-batch is cut: micro-batches are parts already where there are enough of them."""
        return 1 if self.micro_batches % self.parts == 0 else self.parts

    @property
    def num_parts(self) -> int:
        return self.micro_batches * self.cut


Strategy = Callable[[Setting], Program]


def eager(setting: Setting) -> Program:
    """Every gradient goes on the wire as soon as it is there, in pieces as the buckets' specs say."""
    return _finish(place_gradients(_plain_step(setting), setting.buckets), setting)


def ddp(setting: Setting) -> Program:
    """What PyTorch's DistributedDataParallel does beside expert parallelism: neighbours share buckets of 25 MiB, the first ones
    of 1 MiB."""
    placed = place_gradients(_plain_step(setting), setting.buckets, merge=setting.merge, merge_first=setting.merge_first)
    return _finish(placed, setting)


def serial(setting: Setting) -> Program:
    """Gradients after the last all-to-all."""
    return _finish(place_gradients(_plain_step(setting), setting.buckets, place="tail"), setting)


def fixed(setting: Setting) -> Program:
    """An all-reduce between the two all-to-alls of each layer's backward, whatever it takes (Lina, section 7.2.1)."""
    return _finish(place_gradients(_plain_step(setting), setting.buckets, place="pair"), setting)


def priority(setting: Setting) -> Program:
    """All-to-all first: a gradient starts only while no tokens are on the wire (Lina, section 4.1).  The rungs of the paper's
    ladder differ in their numbers alone: pieces, chunks, packing."""
    place = "ready" if setting.gaps is None else "gap"
    placed = place_gradients(_plain_step(setting), setting.buckets, place=place, yields=setting.yields, gaps=setting.gaps)
    return _finish(placed, setting)


def flow(setting: Setting) -> Program:
    """Parts of the micro-batch walk through whole layers in turn; gradients go into what they leave of the wire.  Where the
    micro-batch is one group of the routers, its parts tell one another how full the experts are."""
    program = _step(setting, together=setting.parts)
    place = "ready" if setting.gaps is None else "gap"
    placed = place_gradients(program, setting.buckets, place=place, yields=setting.yields, gaps=setting.gaps)
    return _finish(placed, setting)


def lina_zero(setting: Setting) -> Program:
    """ZeRO-1 with the all-gathers of weights under the next step's forward; parts walk in turn as in `flow`."""
    program = _step(setting, together=setting.parts)
    return _finish(place_gradients(program, setting.buckets, yields=setting.yields), setting, params_ahead=True)


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
    "lina_zero": lina_zero,
}


def chunks_of(chunks: str, moe: tuple[bool, ...]) -> dict[int, int]:
    """Layer -> chunks of its rows, from `strategy.chunks`: one number for all MoE layers, or one for each."""
    layers = [i for i, is_moe in enumerate(moe) if is_moe]
    numbers = [int(n) for n in chunks.split(",")]
    if len(numbers) == 1:
        numbers *= len(layers)
    if len(numbers) != len(layers) or min(numbers, default=1) < 1:
        raise ValueError(f"strategy.chunks={chunks} must be one number above 0, or one for each of {len(layers)} MoE layers")
    return dict(zip(layers, numbers, strict=True))


def training_step(name: str, setting: Setting) -> Program:
    """The checked program of one training step.  ValueError for a strategy that isn't there."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy.name is {name!r}: choose one of {', '.join(STRATEGIES)}")
    program = STRATEGIES[name](setting)
    check(program, given(program, setting), setting.buckets)
    return program


def evaluation(shape: Shape, buckets: Mapping[str, BucketSpec]) -> Program:
    """The checked program of one forward pass without gradients, and the sum of its losses over the world."""
    forward = plain(shape)
    losses = tuple(v for s in forward for v in s.writes if v.startswith("loss."))
    program = (
        *forward,
        Instruction("U", Kind.COMPUTE, "evaluated", reads=(*losses, "#batch.-.0"), writes=("#own_loss.-.0",)),
        Instruction("U", Kind.START, "evaluated", reads=("#own_loss.-.0",), writes=("#own_loss>.-.0",), op=Op.SUM, axis="world"),
        Instruction("U", Kind.WAIT, "evaluated", reads=("#own_loss>.-.0",), writes=("#loss.-.0",), op=Op.SUM, axis="world"),
    )
    check(program, given(program, Setting(shape, buckets)), buckets)
    return program


def settling(program: Program) -> Program:
    """The gathers of weights that a program leaves to the next step, alone: () where it leaves none."""
    return tuple(s for s in program if s.op is Op.PARAMS and s.phase == "F")


def given(program: Program, setting: Setting) -> set[str]:
    """What exists before a program: the batches, the parameters or this rank's part of them, and of a step the bias that it
    must move."""
    gathered = {s.name for s in settling(program)}
    batches = {f"#batch.-.{i}" for i in range(setting.num_parts)}
    bias = {ROUTER_BIAS} if setting.shape.selection_bias and any(s.phase == "B" for s in program) else set()
    return batches | {shard_of(b) if b in gathered else b for b in setting.buckets} | bias


def _finish(program: Program, setting: Setting, *, params_ahead: bool = False) -> Program:
    return finish(program, setting.buckets, selection_bias=setting.shape.selection_bias, params_ahead=params_ahead)


def _plain_step(setting: Setting) -> Program:
    return _step(setting, together=1)


def _step(setting: Setting, *, together: int) -> Program:
    late = [i for i, is_moe in enumerate(setting.shape.moe) if is_moe][: setting.late_layers]
    forward = late_weights(chunk(plain(setting.shape), setting.chunks_of), late)
    forward = recompute(forward, RECOMPUTED[setting.recompute_mode])
    cut = setting.cut if together > 1 else 1
    one_group = cut > 1 and setting.shape.micro_batch_groups
    return step(forward, setting.micro_batches * cut, together=together, share=1 / cut, one_group=one_group)
