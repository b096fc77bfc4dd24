"""The cells of a pipeline's step in virtual time, as they are drawn: when each rank computed which stage of which micro-batch."""

import re

from megalina.perfmodel.forecast.priced_pipeline import stages_of
from megalina.perfmodel.sim.virtual import Timeline
from megalina.step.pipeline.cell import COMPUTED, Cell, Pipeline, Work
from megalina.step.pipeline.job import Pipelined
from megalina.step.pipeline.walk import Span, Walked
from megalina.step.program import Program
from megalina.timeline.pipeline_picture import Box
from megalina.timeline.recorder import COMPUTE, Event

NO_CELLS = ("send", "recv", "grads", "params")


class CellsOfEvents:
    """Which cell an event of a timeline is of.  `forward`: the pass of one micro-batch, of which the lists are made."""

    def __init__(self, job: Pipelined, forward: Program):
        self._stage_of = {(s.name, s.layer): stage for s, stage in zip(forward, stages_of(forward, job.stages), strict=True)}
        cells = (cell for rank in range(job.ranks) for _, cell in job.pipeline.cells(rank))
        self._split = {(cell.stage, cell.micro_batch) for cell in cells if cell.work is Work.WEIGHT_GRADIENTS}

    def of(self, event: Event) -> Cell | None:
        """None: of no cell, as messages, gradients, and what opens and closes a step.  Weights' gradients that a whole backward
        leaves to later are its own."""
        stage, number = self._stage_of.get((event.name, event.layer)), re.match(r"\d+", event.part)
        if event.phase == "U" or event.op in NO_CELLS or stage is None or number is None:
            return None
        micro_batch = int(number[0])
        if event.phase == "F":
            return Cell(Work.FORWARD, stage, micro_batch)
        if (stage, micro_batch) not in self._split:
            return Cell(Work.BACKWARD, stage, micro_batch)
        return Cell(Work.WEIGHT_GRADIENTS if event.phase == "W" else Work.INPUT_GRADIENTS, stage, micro_batch)


def cells_of(timeline: Timeline, job: Pipelined, forward: Program) -> Walked:
    """Each from the first thing that is computed of it to the last, with what it waits for tokens in between.  Weights' gradients
    that a whole backward leaves to later count to the cell in or behind which they are computed."""
    cells, out = CellsOfEvents(job, forward), []
    for rank, entries in enumerate(job.pipeline.lists):
        spans: dict[Cell, tuple[float, float]] = {}
        here: Cell | None = None
        for event in timeline.events(rank):
            if event.kind == COMPUTE and (cell := cells.of(event)) is not None:
                cell = here if here is not None and event.phase == "W" and cell.work is Work.BACKWARD else cell
                here = cell
                start_s, end_s = spans.get(cell, (event.start_s, event.end_s))
                spans[cell] = min(start_s, event.start_s), max(end_s, event.end_s)
        found = [(entry, [spans[cell] for cell in entry if cell in spans]) for entry in entries if entry[0].work in COMPUTED]
        out.append(tuple(Span(entry, min(own)[0], max(end for _, end in own)) for entry, own in found if own))
    return Walked(tuple(out))


def boxes_of(walked: Walked, pipeline: Pipeline) -> list[list[Box]]:
    """Each rank's row of the picture."""
    return [
        [
            Box(s.start, s.end, c.work.value, c.micro_batch or 0, pipeline.stages_of(rank).index(c.stage), i, len(s.entry))
            for s in spans
            for i, c in enumerate(s.entry)
            if c.work in COMPUTED
        ]
        for rank, spans in enumerate(walked.spans)
    ]
