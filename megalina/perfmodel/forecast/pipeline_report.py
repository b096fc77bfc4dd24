"""The report of a pipeline's forecast: a row for each pipeline rank, and the picture that pipeline people know."""

from collections.abc import Sequence
from pathlib import Path

from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import MESSAGES, Forecast
from megalina.perfmodel.forecast.pipeline_cells import boxes_of, cells_of
from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline
from megalina.perfmodel.forecast.report import CLASSES, GIB, aligned
from megalina.timeline.pipeline_picture import draw_pipeline

MOST_ROWS = 64  # of a table; the largest rank is among them


def rank_table(config: PretrainConfig, found: Forecast, layers: Sequence[str]) -> str:
    """Of each pipeline rank what it computes, how long it stands idle and for what, and what it holds.

    What a rank waits for messages is its bubble as far as it is inside of a step; what it waits for at its end is among the
    sums.  `layers`: of each rank, in words."""
    names = {**CLASSES, MESSAGES: MESSAGES}
    head = ["rank", "layers", "computes ms", "idle", *(f"waits for {what} ms" for what in names.values()), "GiB"]
    rows = [head]
    for rank, (own, peak, words) in enumerate(zip(found.of_ranks, found.peaks, layers, strict=True)):
        waits = [f"{own.exposed_s[name] * 1e3:.1f}" for name in names]
        times = f"{own.compute_s * 1e3:.1f}", f"{own.idle_s / own.step_s:.1%}"
        rows.append([str(rank), words, *times, *waits, f"{peak / GIB:.1f}"])
    left_out = [["..."] + [""] * (len(head) - 1)] if len(rows) > MOST_ROWS else []
    parallel = config.parallel
    schedule = f"{config.strategy.pipeline}, {parallel.pp} pipeline ranks, {parallel.pp_chunks} chunks each"
    return f"{schedule}\n" + aligned([*rows[:MOST_ROWS], *left_out])


def layers_of(step: PricedPipeline) -> list[str]:
    """Of each pipeline rank: E embedding, L head."""
    job = step.job
    return [" | ".join(str(job.stages[stage]) for stage in job.pipeline.stages_of(rank)) for rank in range(job.ranks)]


def draw_cells(path: Path, step: PricedPipeline, found: Forecast, *, note: str) -> None:
    """Ranks as rows, cells with the numbers of micro-batches, of the longest step that was walked."""
    number, job, parallel = step.walked_number, step.job, step.config.parallel
    of = f"{number} of {step.micro_batches}" if number < step.micro_batches else f"{number}"
    ranks = f"{parallel.pp} ranks, {parallel.pp_chunks} chunks each"
    title = f"{step.config.strategy.pipeline}: {ranks}, {of} micro-batches, {found.plan}"
    draw_pipeline(path, boxes_of(cells_of(found.timeline, job, step.forward), job.pipeline), title=title, note=note)
