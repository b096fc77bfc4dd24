"""Cells filled with instructions: a program for each pipeline rank, out of the forward pass of one micro-batch.

Only the residual stream goes from stage to stage, along an axis of two ranks, `pp0-1`.  A message is a START and a WAIT on either
side, so nothing waits for more than it reads, and its mirror goes the other way by itself.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain

from megalina.step.passes import (
    ROUTER_STATE,
    decides,
    defer_weights,
    finish,
    losses_of,
    place_gradients,
    rename_part,
    shard_of,
)
from megalina.step.pipeline.cell import COMPUTED, INPUTS_DONE, SENDS, Cell, Entry, Pipeline, Work
from megalina.step.pipeline.stages import StageLayers
from megalina.step.pipeline.walk import asked_before, message_of, needs_of
from megalina.step.program import (
    BucketSpec,
    Instruction,
    Kind,
    Op,
    Program,
    backward,
    check,
    gradient,
    has_gradient,
    joined_weights,
    mirror,
    weights_of,
)
from megalina.step.turns import side_with_side

NAME = "stream"  # of the instructions that send and receive it
SENT_FOR = 3  # cells that a message has to travel under: its reader may come to its RECV behind a long one, or two


def axis_of(rank: int, other: int) -> str:
    """The axis of two pipeline ranks: `pp0-1`."""
    return f"pp{min(rank, other)}-{max(rank, other)}"


def ends_of(axis: str) -> tuple[int, ...]:
    """The pipeline ranks of `axis_of`; () for another axis."""
    first, _, second = axis.removeprefix("pp").partition("-")
    return (int(first), int(second)) if axis.startswith("pp") and first.isdecimal() and second.isdecimal() else ()


def programs(
    pipeline: Pipeline,
    stages: Sequence[StageLayers],
    forward: Program,
    buckets: Mapping[str, BucketSpec],
    *,
    late: frozenset[str] = frozenset(),
    join_weights: bool = False,
    arranged: Callable[[Program], Program] = lambda backward: backward,
    router_state: bool = False,
    params_ahead: bool = False,
    weights: Callable[[Program, Collection[Instruction]], Program] = lambda program, fixed: program,
    placed: Callable[[Program, Mapping[str, BucketSpec]], Program] = place_gradients,
) -> tuple[Program, ...]:
    """The checked program of each rank: its cells in order, gradients where `placed` puts them, norm and update.

    `pipeline`: with messages.  `forward`: of one micro-batch, part "0" (`megalina.step.strategy.forward_pass`).  `late`: the
    instructions whose products that give weights' gradients are in the cells W (`Shape.deferred("all")`); what others add to
    weights' gradients stays in the cells I.  What `forward` itself has late comes after its whole backward, behind what the cell
    sends, until `weights` moves it, given a rank's cells and the instructions of its cells W.  `join_weights`, `arranged`: as of
    `megalina.step.passes.step`; `params_ahead`: of `finish`.  `buckets`: of the whole model; a rank gets those that its
    instructions use.  One that several ranks use (`shared_buckets`) must have an axis that spans them.

    ValueError for another number of stages, where a stage reads more than the stream of the stage before, and for what `check`
    refuses."""
    filling = Filling(pipeline, stages, forward, late, join_weights=join_weights, arranged=arranged)
    out = []
    for rank in range(pipeline.ranks):
        program = weights(filling.cells(rank), filling.weights_cells(rank))
        own = {name: spec for name, spec in buckets.items() if any(name in s.uses for s in program)}
        state = router_state and any(map(decides, program))
        program = finish(placed(program, own), own, router_state=state, params_ahead=params_ahead)
        batches = {f"#batch.-.{i}" for i in range(pipeline.micro_batches)}
        parameters = {shard_of(name) if params_ahead and spec.sharded else name for name, spec in own.items()}
        try:
            check(program, batches | parameters | ({ROUTER_STATE} if state else set()), own)
        except ValueError as error:
            raise ValueError(f"pipeline rank {rank}: {error}") from None
        out.append(program)
    return tuple(out)


def shared_buckets(of_ranks: Sequence[Program]) -> dict[str, tuple[int, ...]]:
    """Buckets that instructions of several pipeline ranks use, as a tied embedding, with these ranks."""
    users: dict[str, list[int]] = {}
    for rank, program in enumerate(of_ranks):
        for name in dict.fromkeys(name for s in program for name in s.uses):
            users.setdefault(name, []).append(rank)
    return {name: tuple(ranks) for name, ranks in users.items() if len(ranks) > 1}


class Filling:
    """Cells as instructions.  ValueError as `programs`."""

    def __init__(
        self,
        pipeline: Pipeline,
        stages: Sequence[StageLayers],
        forward: Program,
        late: frozenset[str],
        *,
        join_weights: bool = False,
        arranged: Callable[[Program], Program] = lambda backward: backward,
    ):
        if len(stages) != pipeline.stages:
            raise ValueError(f"layers are cut into {len(stages)} stages, and the schedule has {pipeline.stages}: cut them alike")
        cells = [cell for rank in range(pipeline.ranks) for _, cell in pipeline.cells(rank)]
        if of_fsdp := [cell for cell in cells if cell.micro_batch is None]:
            raise ValueError(
                f"the lists have {of_fsdp[0]}: programs place gathers and sums of gradients themselves, leave it out"
            )
        if not pipeline.has_messages and pipeline.ranks > 1:
            raise ValueError("the lists have no SEND and RECV: put them in by with_messages")
        self.pipeline, self.late, self.join_weights, self.arranged = pipeline, late, join_weights, arranged
        self.border = [0]  # the stream's number before each stage, and behind the last
        for stage in stages:
            self.border.append(self.border[-1] + len(stage.layers))
        layered = [i for i, s in enumerate(forward) if s.layer >= 0]
        stage_of = {layer: number for number, stage in enumerate(stages) for layer in stage.layers}
        if missing := sorted({forward[i].layer for i in layered} - set(stage_of)):
            raise ValueError(f"layer {missing[0]} is in no stage: stages have {len(stage_of)} layers")
        self.of_stage: list[list[Instruction]] = [[] for _ in stages]
        for i, instruction in enumerate(forward):  # what is outside of layers leads into them, or follows them
            ends = 0 if not layered or i < layered[0] else len(stages) - 1
            self.of_stage[stage_of.get(instruction.layer, ends)].append(instruction)
        self._check_borders(forward)
        self.split = {(c.stage, c.micro_batch) for c in cells if c.work is Work.WEIGHT_GRADIENTS}

    def _check_borders(self, forward: Program) -> None:
        writers: dict[str, set[int]] = {}
        for stage, own in enumerate(self.of_stage):
            for value in (v for s in own for v in s.writes):
                writers.setdefault(value, set()).add(stage)
        for stage, own in enumerate(self.of_stage):
            for instruction in own:
                for value in instruction.reads:
                    known = writers.get(value, {stage})
                    own_rank = any(self.pipeline.rank_of[at] == self.pipeline.rank_of[stage] for at in known)
                    stream = stage - 1 in known and value.rpartition(".")[0] == f"x.{self.border[stage]}"
                    # on one rank the batch in parts, which it cuts once, and the stream in parts
                    stays = own_rank and (stream or not has_gradient(value))
                    if stage not in known and not stays and not (stream and value.endswith(".0")):
                        raise ValueError(
                            f"{instruction.tag} in stage {stage} reads {value} of stage {min(known)}: only the stream goes from "
                            "a stage to the next, so what else a layer reads of another must be in its stage"
                        )

    def forward(self, stage: int, number: int) -> Program:
        own: Program = tuple(self.of_stage[stage])
        if (stage, number) in self.split:
            own = defer_weights(own, self.late)
        return rename_part(own, str(number))

    def cells(self, rank: int) -> Program:
        """From the step's sizes to its last cell."""
        compute, start, wait = Kind.COMPUTE, Kind.START, Kind.WAIT
        batches = tuple(f"#batch.-.{i}" for i in range(self.pipeline.micro_batches))
        out = [
            Instruction("U", compute, "sizes", reads=batches, writes=("#own_divisor.-.0",)),
            Instruction("U", start, "divisor", reads=("#own_divisor.-.0",), writes=("#own_divisor>.-.0",), op=Op.SUM, axis="dp"),
        ]
        divisor = Instruction("U", wait, "divisor", reads=("#own_divisor>.-.0",), writes=("#divisor.-.0",), op=Op.SUM, axis="dp")
        there, seeded = False, set[int]()
        left: list[Instruction] = []  # of weights' gradients by the last cell: they come behind what it sends
        sent: list[Instruction] = []  # WAITs of what travels under the cells that come next
        earlier: deque[list[Instruction]] = deque([] for _ in range(SENT_FOR - 1))  # of the cells before, the first ones first
        asked: set[Cell] = set()
        for position, entry in enumerate(self.pipeline.lists[rank]):
            if entry[0].work not in COMPUTED:
                out += [self.message(cell, rank, start) for cell in entry if cell not in asked]
                sent += [self.message(cell, rank, wait) for cell in entry if cell.work in SENDS]
                continue
            early = asked_before(self.pipeline.lists[rank], position)
            asked.update(early)
            out += [*(self.message(cell, rank, start) for cell in early), *left]
            for cell in entry:
                number = cell.micro_batch or 0
                if cell.work in INPUTS_DONE and not there:
                    out, there = [*out, divisor], True
                if cell.work in INPUTS_DONE and number not in seeded:
                    seeded.add(number)
                    out += self.seed(rank, number)
            out += self.body(entry, rank)
            left = [s for cell in entry for s in self.left(cell)]
            earlier.append(sent)
            out, sent = [*out, *earlier.popleft()], []
        return (*out, *left, *chain.from_iterable(earlier), *sent)

    def seed(self, rank: int, number: int) -> list[Instruction]:
        """Backward's beginning, for the losses of all of a rank's stages: the stream isn't one."""
        losses: list[str] = []
        for stage in self.pipeline.stages_of(rank):
            own = self.forward(stage, number)
            losses += [v for v in losses_of(own, own) if v.rpartition(".")[0] != f"x.{self.border[stage + 1]}"]
        if not losses:
            return []
        writes = tuple(map(gradient, losses))
        return [Instruction("U", Kind.COMPUTE, "seed", part=str(number), reads=("#divisor.-.0", *losses), writes=writes)]

    def body(self, entry: Entry, rank: int) -> Program:
        """Cells that go together take turns."""
        if len(entry) == 1:
            return self.instructions(entry[0], rank)
        sides = {cell.work is Work.FORWARD: self.instructions(cell, rank) for cell in entry}
        return side_with_side(sides[False], sides[True])

    def instructions(self, cell: Cell, rank: int) -> Program:
        """Of a cell, with the WAIT for what it takes of another rank."""
        number = cell.micro_batch or 0
        forward = self.forward(cell.stage, number)
        away = [need for need in needs_of(cell, self.pipeline) if self.pipeline.rank_of[need.stage] != rank]
        waits = [self.message(message_of(need, cell.stage), rank, Kind.WAIT) for need in away]
        if cell.work is Work.FORWARD:
            return (*waits, *forward)
        if cell.work is Work.WEIGHT_GRADIENTS:
            return self._weights(forward)
        return (*waits, *self.arranged(backward(forward)))

    def left(self, cell: Cell) -> Program:
        """What a whole backward leaves out of the gradients of weights."""
        return self._weights(self.forward(cell.stage, cell.micro_batch or 0)) if cell.work is Work.BACKWARD else ()

    def weights_cells(self, rank: int) -> frozenset[Instruction]:
        """Of all cells W of a rank."""
        cells = (cell for _, cell in self.pipeline.cells(rank) if cell.work is Work.WEIGHT_GRADIENTS)
        return frozenset(s for cell in cells for s in self.instructions(cell, rank))

    def _weights(self, forward: Program) -> Program:
        weights = tuple(weights_of(s) for s in reversed(forward) if s.late)
        return joined_weights(weights) if self.join_weights else weights

    def message(self, cell: Cell, rank: int, kind: Kind) -> Instruction:
        """The START or WAIT of one end of a message.  Gradients' are the mirrors of activations'."""
        here = cell.work in (Work.RECV_ACTIVATIONS, Work.SEND_GRADIENTS)  # at the border before its stage
        border = self.border[cell.stage + (0 if here else 1)]
        value, wire = f"x.{border}.{cell.micro_batch}", f"x{'<' if here else '>'}.{border}.{cell.micro_batch}"
        mirrored = cell.work in (Work.SEND_GRADIENTS, Work.RECV_GRADIENTS)
        starts = (kind is Kind.START) != mirrored  # the forward instruction of which this one is the mirror, or which it is
        forward = Instruction(
            "F",
            Kind.START if starts else Kind.WAIT,
            NAME,
            border,
            str(cell.micro_batch),
            reads=(wire,) if not starts else () if here else (value,),
            writes=(wire,) if starts else (value,) if here else (),
            op=Op.RECV if here else Op.SEND,
            axis=axis_of(rank, self.pipeline.peer(cell)),
        )
        return mirror(forward) if mirrored else forward
