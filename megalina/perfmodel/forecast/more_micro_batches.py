"""A pipeline's step with more micro-batches than were walked.

Cells take in the longer step what they took in the shorter one, the median of those that are alike, and the longer one's cells
are walked alone.  The last micro-batches alone don't say what one more takes: where F, I and W differ there may be slack that
lasts for a while.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from megalina.blocks.pipelined import schedule_of
from megalina.perfmodel.forecast.pipeline_cells import CellsOfEvents, cells_of
from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline
from megalina.perfmodel.sim.virtual import Timeline
from megalina.step.pipeline.cell import Entry, Pipeline
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.walk import Times, Walked, walk
from megalina.timeline.recorder import SEND, Event

Key = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class SeenTimes(Times):
    """Seconds of entries that were walked, by their cells without micro-batches."""

    seen_s: Mapping[Key, float] = field(default_factory=dict)

    def of_entry(self, entry: Entry, chunks: int) -> float:
        return self.seen_s[key_of(entry)]


def key_of(entry: Entry) -> Key:
    return tuple((cell.work.value, cell.stage) for cell in entry)


def seen_times(walked: Walked, timeline: Timeline) -> SeenTimes:
    """Of each kind of entry, and of messages between ranks."""
    found: dict[Key, list[float]] = defaultdict(list)
    for spans in walked.spans:
        for span in spans:
            found[key_of(span.entry)].append(span.end - span.start)
    events = (event for rank in range(len(walked.spans)) for event in timeline.events(rank))
    sent = [event.end_s - event.start_s for event in events if event.kind == SEND and event.op == "send"]
    return SeenTimes(message=min(sent, default=0.0), seen_s={key: median(seconds) for key, seconds in found.items()})


def longer_by(step: PricedPipeline, timeline: Timeline) -> float:
    """Seconds by which a step with all micro-batches is longer than the timeline of `walked_number` of them."""
    if step.micro_batches == step.walked_number:
        return 0.0
    times = seen_times(cells_of(timeline, step.job, step.forward), timeline)
    whole, part = (walk(_cells(step, number), times).makespan for number in (step.micro_batches, step.walked_number))
    return whole - part


def times_as_many(step: PricedPipeline) -> Callable[[int, Event], float]:
    """(pipeline rank, event) -> how many of its kind there are in the whole step for each one that was walked."""
    if step.micro_batches == step.walked_number:
        return lambda rank, event: 1.0
    cells = CellsOfEvents(step.job, step.forward)
    walked, whole = (_cells(step, number) for number in (step.walked_number, step.micro_batches))
    keys = [{cell: key_of(entry) for entry in entries for cell in entry} for entries in walked.lists]
    counts, all_counts = ([Counter(map(key_of, entries)) for entries in of.lists] for of in (walked, whole))

    def of(rank: int, event: Event) -> float:
        if (cell := cells.of(event)) is None:
            return 1.0
        key = keys[rank][cell]
        return all_counts[rank][key] / counts[rank][key]

    return of


def _cells(step: PricedPipeline, micro_batches: int) -> Pipeline:
    """Without messages."""
    parallel = step.config.parallel
    size = Size(parallel.pp, parallel.pp_chunks, micro_batches, paired=step.plan.strategy == "pair")
    return schedule_of(step.config.strategy.pipeline).pipeline(size)
