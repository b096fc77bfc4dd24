"""SEND and RECV between the cells of a pipeline: the pass that puts them into lists of computation."""

from collections import defaultdict
from collections.abc import Sequence

from megalina.step.pipeline.cell import COMPUTED, RECEIVES, SENDS, Cell, CellList, Entry, Pipeline, Work
from megalina.step.pipeline.walk import UNIT, Span, Times, gives_of, walk

Placed = tuple[float, int, str, Cell]  # when it goes, its sender's rank, its sender's text, the end that a rank has of it


def with_messages(pipeline: Pipeline, times: Times = UNIT) -> Pipeline:
    """The lists with what neighbours on different ranks send one another.

    A message goes when its cell is done in a walk of the lists with `times`: the sender has it behind that cell, the receiver
    before the first cell that it begins from then on, its reader or an earlier one.  So the lists of all ranks are sorted by one
    clock, and nothing can close a circle, not even where every SEND stands still until its RECV is there.  (A SEND behind its
    cell and a RECV right before its reader do close one in 1F1B: two neighbours both send first.)  What a rank has between two of
    its cells goes as one batch, both ways at once.  The messages between two ranks have the same order on both.

    ValueError for lists that have messages already, and for times that are not above 0; Stuck for lists that can't be walked."""
    if pipeline.has_messages:
        raise ValueError("the lists have SEND and RECV already: give them without, or check them as they are")
    if min(times.forward, times.inputs, times.weights, *times.shares, 1.0) <= 0:
        raise ValueError(f"{times}: messages are placed by the order in which cells end, so each must take some time")
    walked = walk(pipeline, times)
    placed: dict[int, list[Placed]] = defaultdict(list)
    for spans in walked.spans:
        for span in spans:
            for cell in span.entry:
                if (send := send_of(cell, pipeline)) is not None:
                    sender, receiver = pipeline.rank_of[cell.stage], pipeline.peer(send)
                    placed[sender].append((span.end, sender, str(send), send))
                    placed[receiver].append((span.end, sender, str(send), send.other_end))
    lists = tuple(_merged(pipeline.lists[rank], walked.spans[rank], placed[rank]) for rank in range(pipeline.ranks))
    return Pipeline(lists, pipeline.rank_of, pipeline.micro_batches)


def _merged(cells: CellList, spans: Sequence[Span], placed: list[Placed]) -> CellList:
    """A rank's cells with its messages before the first cell that begins when they go, or later."""
    waiting = sorted(placed, key=lambda message: message[:3])
    starts = iter(spans)
    out: list[Entry] = []
    for entry in cells:
        if entry[0].work in COMPUTED:
            start = next(starts).start
            batch = tuple(message[3] for message in waiting if message[0] <= start)
            waiting = waiting[len(batch) :]
            out += [batch] if batch else []
        out.append(entry)
    return (*out, tuple(message[3] for message in waiting)) if waiting else tuple(out)


def send_of(cell: Cell, pipeline: Pipeline) -> Cell | None:
    """The message that a computed cell's result goes in, to a neighbour on another rank."""
    result = gives_of(cell)
    work, neighbour = {
        Work.FORWARD: (Work.SEND_ACTIVATIONS, cell.stage + 1),
        Work.INPUT_GRADIENTS: (Work.SEND_GRADIENTS, cell.stage - 1),
    }.get(result.work, (Work.UNSHARD, -1))
    here = neighbour in (-1, pipeline.stages) or pipeline.rank_of[neighbour] == pipeline.rank_of[cell.stage]
    return None if here else Cell(work, cell.stage, cell.micro_batch)


def without_messages(pipeline: Pipeline) -> Pipeline:
    """The cells alone."""
    lists = tuple(
        tuple(entry for entry in cells if entry[0].work not in SENDS and entry[0].work not in RECEIVES)
        for cells in pipeline.lists
    )
    return Pipeline(lists, pipeline.rank_of, pipeline.micro_batches)
