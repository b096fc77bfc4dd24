"""How much a rank holds for backward, from its list alone, whatever cells take."""

from collections.abc import Collection

from megalina.step.pipeline.cell import INPUTS_DONE, Pipeline, Work


def live_peaks(pipeline: Pipeline, until: Collection[Work] = INPUTS_DONE) -> tuple[float, ...]:
    """The most micro-batches that each rank has in work at once, each chunk counting for its share of the rank.

    `until`: what ends them, `INPUTS_DONE` for the activations that the gradients of inputs take, `WEIGHTS_DONE` for what is kept
    for the gradients of weights.  Both cells of a pair are in work at once."""
    peaks = []
    for entries in pipeline.lists:
        live = most = 0
        for entry in entries:
            live += sum(cell.work is Work.FORWARD for cell in entry)
            most = max(most, live)
            live -= sum(cell.work in until for cell in entry)
        peaks.append(most * pipeline.ranks / pipeline.stages)
    return tuple(peaks)
