"""The check over the lists of all ranks together: complete, in order, every SEND met by a RECV, and no circle of waiting."""

from collections import defaultdict
from collections.abc import Mapping

from megalina.step.pipeline.cell import (
    COMPUTED,
    INPUTS_DONE,
    RECEIVES,
    SENDS,
    WEIGHTS_DONE,
    Cell,
    Entry,
    Pipeline,
    Work,
    entry_text,
)
from megalina.step.pipeline.live import live_peaks
from megalina.step.pipeline.messages import send_of
from megalina.step.pipeline.walk import message_of, needs_of, walk

Places = Mapping[Cell, tuple[int, int]]  # rank, position


def check(pipeline: Pipeline, *, meet: bool = True, most_live: float = float("inf")) -> None:
    """Raise ValueError, with rank, cell and position, unless the lists are one step that ends.

    Of every stage and micro-batch there is one forward, then one backward: whole, or the gradients of inputs and later those of
    weights.  If any list has messages, each neighbour's result that a rank takes is sent and received once, behind the cell that
    gives it and before the one that takes it, and the messages from one rank to another are received in the order in which they
    are sent.  Then all lists are walked: with `meet` a rank stands still at its messages until they have been sent (rendezvous),
    else only the cell that reads a message waits for it.  `most_live`: micro-batches of activations that a rank has room for."""
    places = _places(pipeline)
    _check_complete(pipeline, places)
    _check_order(pipeline, places)
    if pipeline.has_messages:
        _check_messages(pipeline, places)
        _check_lanes(pipeline)
    _check_weights_of_fsdp(pipeline)
    for rank, peak in enumerate(live_peaks(pipeline, WEIGHTS_DONE)):
        if peak > most_live:
            raise ValueError(f"rank {rank} holds {peak:g} micro-batches of activations at once, and has room for {most_live:g}")
    walk(pipeline, meet=meet)


def _at(rank: int, position: int, what: Cell | Entry) -> str:
    return f"rank {rank} at position {position}, {what if isinstance(what, Cell) else entry_text(what)}"


def _places(pipeline: Pipeline) -> Places:
    """Where each cell is; each is known, on its rank, once, and goes only with what it may."""
    places: dict[Cell, tuple[int, int]] = {}
    for rank, entries in enumerate(pipeline.lists):
        for position, entry in enumerate(entries):
            if not entry or not _may_go_together(entry):
                raise ValueError(
                    f"{_at(rank, position, entry)}: only a forward and a backward go in turns, and only messages as a batch"
                )
            for cell in entry:
                at = _at(rank, position, cell)
                if not 0 <= cell.stage < pipeline.stages:
                    raise ValueError(f"{at}: there are stages 0 to {pipeline.stages - 1}")
                if pipeline.rank_of[cell.stage] != rank:
                    raise ValueError(f"{at}: stage {cell.stage} is on rank {pipeline.rank_of[cell.stage]}")
                of_fsdp = cell.work in (Work.UNSHARD, Work.RESHARD, Work.REDUCE_GRAD)
                if not of_fsdp and not 0 <= (-1 if cell.micro_batch is None else cell.micro_batch) < pipeline.micro_batches:
                    raise ValueError(f"{at}: there are micro-batches 0 to {pipeline.micro_batches - 1}")
                if cell in places and cell.work not in (Work.UNSHARD, Work.RESHARD):
                    raise ValueError(f"{at}: it is at position {places[cell][1]} already")
                places[cell] = rank, position
    return places


def _may_go_together(entry: Entry) -> bool:
    if len(entry) == 1:
        return True
    if all(cell.work in SENDS or cell.work in RECEIVES for cell in entry):
        return True
    works = {cell.work for cell in entry}
    return len(entry) == 2 and Work.FORWARD in works and bool(works & set(INPUTS_DONE))


def _check_complete(pipeline: Pipeline, places: Places) -> None:
    for stage, rank in enumerate(pipeline.rank_of):
        for number in range(pipeline.micro_batches):
            forward, whole, inputs, weights = (Cell(work, stage, number) for work in COMPUTED)
            if forward not in places:
                raise ValueError(f"rank {rank} has no {forward}: stage {stage} leaves out micro-batch {number}")
            if whole in places:
                if twice := [cell for cell in (inputs, weights) if cell in places]:
                    raise ValueError(f"{_at(*places[twice[0]], twice[0])}: {whole} at position {places[whole][1]} has it in it")
            elif inputs not in places:
                raise ValueError(f"rank {rank} has neither {whole} nor {inputs}: micro-batch {number} has no backward there")
            elif weights not in places:
                at = f"rank {rank} has no {weights}"
                raise ValueError(
                    f"{at}: nobody adds the gradients of weights that {inputs} at position {places[inputs][1]} leaves"
                )


def _check_order(pipeline: Pipeline, places: Places) -> None:
    """On each rank by itself: a cell comes after those of the same rank whose results it takes."""
    for cell, (rank, position) in places.items():
        if cell.work not in COMPUTED:
            continue
        for need in needs_of(cell, pipeline):
            if pipeline.rank_of[need.stage] != rank:
                continue
            found = need if need in places else Cell(Work.BACKWARD, need.stage, need.micro_batch)
            if places[found][1] >= position:
                raise ValueError(f"{_at(rank, position, cell)}: it takes what {found} gives, at position {places[found][1]}")


def _check_messages(pipeline: Pipeline, places: Places) -> None:
    """Each result that goes to another rank has its two ends, at their places, and nothing else is sent."""
    wanted: set[Cell] = set()
    for cell, (rank, position) in places.items():
        if cell.work not in COMPUTED:
            continue
        if (send := send_of(cell, pipeline)) is not None:
            wanted |= {send, send.other_end}
            if send not in places:
                raise ValueError(f"rank {rank} has no {send}: what {cell} at position {position} gives never leaves")
            if places[send][1] < position:
                raise ValueError(f"{_at(*places[send], send)}: it sends what {cell} gives, at position {position}")
        for need in needs_of(cell, pipeline):
            if pipeline.rank_of[need.stage] == rank:
                continue
            message = message_of(need, cell.stage)
            if message not in places:
                raise ValueError(f"rank {rank} has no {message}, which {cell} at position {position} needs")
            if places[message][1] > position:
                raise ValueError(f"{_at(rank, position, cell)}: it needs {message}, at position {places[message][1]}")
    for cell, (rank, position) in places.items():
        if (cell.work in SENDS or cell.work in RECEIVES) and cell not in wanted:
            raise ValueError(f"{_at(rank, position, cell)}: there is nothing to send")


def _check_lanes(pipeline: Pipeline) -> None:
    """What one rank sends to another is received in that order: messages have no names on the wire."""
    lanes: dict[tuple[int, int], tuple[list[tuple[int, Cell]], list[tuple[int, Cell]]]] = defaultdict(lambda: ([], []))
    for rank in range(pipeline.ranks):
        for position, cell in pipeline.cells(rank):
            if cell.work in SENDS:
                lanes[rank, pipeline.peer(cell)][0].append((position, cell))
            elif cell.work in RECEIVES:
                lanes[pipeline.peer(cell), rank][1].append((position, cell.other_end))
    for (sender, receiver), (sent, received) in lanes.items():
        for (sent_at, send), (received_at, expected) in zip(sent, received, strict=True):
            if send != expected:
                raise ValueError(
                    f"{_at(sender, sent_at, send)} meets {_at(receiver, received_at, expected.other_end)}: rank {receiver} "
                    f"receives in another order than rank {sender} sends"
                )


def _check_weights_of_fsdp(pipeline: Pipeline) -> None:
    """Where a list gathers weights: a stage has them whenever it computes; what is summed over replicas is complete."""
    for rank in range(pipeline.ranks):
        cells = list(pipeline.cells(rank))
        gathers = {cell.stage for _, cell in cells if cell.work is Work.UNSHARD}
        there: set[int] = set()
        last = {cell.stage: position for position, cell in cells if cell.work in WEIGHTS_DONE}
        for position, cell in cells:
            if cell.work is Work.UNSHARD:
                there.add(cell.stage)
            elif cell.work is Work.RESHARD:
                there.discard(cell.stage)
            elif cell.work is Work.REDUCE_GRAD:
                if last[cell.stage] > position:
                    raise ValueError(
                        f"{_at(rank, position, cell)}: gradients of weights still come, at position {last[cell.stage]}"
                    )
            elif cell.work in COMPUTED and cell.stage in gathers - there:
                raise ValueError(f"{_at(rank, position, cell)}: the weights of stage {cell.stage} are not gathered then")
