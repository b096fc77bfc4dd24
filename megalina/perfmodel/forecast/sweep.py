"""A job of a sweep of simulations: one configuration under its own strategy, as a row of the sweep's file.

What the configuration leaves to measured steps is searched with the very questions of the trainer
(`megalina/parallel/plan_file.py`), and simulated steps answer them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalina.config import PretrainConfig
from megalina.layout import axis_sizes, rows
from megalina.parallel.plan_file import questions
from megalina.perfmodel.forecast.forecast import check_work, memory_limit_bytes
from megalina.perfmodel.forecast.priced_step import Shared
from megalina.perfmodel.forecast.report import GIB, as_json
from megalina.perfmodel.forecast.search import Candidate, candidate, ordered
from megalina.perfmodel.forecast.uneven import Unevenness, forecast_unevenly
from megalina.plan_settings import plan_of
from megalina.timeline.trace import TracedStep, write_trace
from megalina.train.packing import allowed_packings, worth_trying
from megalina.validate import check_config, check_hardware
from megalina.validate_pipeline import refuse_pipelines

RESULTS = "results.jsonl"  # in a sweep's folder: a line a job, written when the job is done
TRACE_NOTE = "simulated"


@dataclass(frozen=True, slots=True)
class Job:
    """A configuration to be simulated.  `overrides`: what makes it of the defaults, as pretrain_gpt_moe.py takes it."""

    config: PretrainConfig
    world: int
    vocab_size: int
    unevenness: Unevenness
    overrides: Sequence[str]


def weak_scaling(config: PretrainConfig, world: int, sequences_per_rank: int) -> PretrainConfig:
    """With so many sequences a step for each data-parallel rank, however many stages there are; 0: as it is."""
    if not sequences_per_rank:
        return config
    batch = sequences_per_rank * world // (config.parallel.pp * config.parallel.tp * config.parallel.cp)
    return replace(config, train=replace(config.train, global_batch_size=batch))


def simulated(job: Job) -> Candidate:
    """ValueError for what the trainer would refuse, for a cluster that isn't known, and for unevenness that can't be."""
    check_hardware(job.config.cluster)
    check_config(job.config, job.world)
    check_work(job.config, job.world)
    job.unevenness.check(job.world)
    if not job.unevenness.all_alike:
        refuse_pipelines(job.config, "simulate.slow_rank and simulate.busiest_load are of ranks that hold the same list")
    best = _planned(job)
    if best.found is None or job.unevenness.all_alike:
        return best
    found = forecast_unevenly(best.config, best.found, job.world, vocab_size=job.vocab_size, unevenness=job.unevenness)
    return replace(best, memory_bytes=found.memory.peak, found=found if found.fits else None)


def _planned(job: Job) -> Candidate:
    """The plan that a run begins with, or what its search would come to, were its steps as simulated."""
    config, world = job.config, job.world
    packings = allowed_packings(config, world)
    packings = worth_trying(config, world, packings, ranks_per_node=config.cluster.ranks_per_node)
    shared = Shared()
    best = candidate(config, plan_of(config.strategy, packing=packings[0]), world, vocab_size=job.vocab_size, shared=shared)
    for question in questions(config, world, packings=packings):
        plans = [plan for plan in question(best.plan) if plan != best.plan]
        tried = [candidate(config, plan, world, vocab_size=job.vocab_size, shared=shared) for plan in plans]
        best = ordered([best, *tried])[0]
    return best


def row_of(number: int, swept: Mapping[str, str], job: Job, found: Candidate | ValueError) -> dict[str, Any]:
    """As tools/plan.py has them, with `job`, `swept` and `reason` (None: it was simulated).  A row says why it has no times."""
    limit = memory_limit_bytes(job.config.cluster)
    if isinstance(found, Candidate):
        common = [word for word in job.overrides if not word.startswith(("strategy=", "strategy.", "cluster.nodes="))]
        row = as_json([found], world=job.world, common=[*common, f"launch.ranks={job.world}"])["candidates"][0]
        reason = None if found.fits else f"needs {found.memory_bytes / GIB:.1f} GiB a rank of {limit / GIB:.1f}"
    else:
        row = {
            "overrides": list(job.overrides),
            "strategy": job.config.strategy.name,
            "plan": None,
            "fits": False,
            "memory_bytes": None,
            "memory_limit_bytes": None if limit == float("inf") else limit,
            "step_s": None,
            "mfu": None,
        }
        reason = str(found)
    return {"job": number, "swept": dict(swept), "world": job.world, **row, "reason": reason}


def append(path: Path, row: Mapping[str, Any]) -> None:
    """A whole line, on the disk when this returns, so that a sweep that is killed keeps all its finished jobs."""
    with open(path, "a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line that was cut off is left out.  ValueError for a file that has others."""
    lines = path.read_text().split("\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is no whole line
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is no JSON ({error}): this isn't the file of a sweep") from error
    return found


def trace(path: Path, found: Candidate, world: int) -> None:
    """The step as a real run writes it (`timeline.trace_steps`): of all ranks that walked, one where all are alike, one of each
    stage of a pipeline."""
    assert found.found is not None
    timeline, parallel = found.found.timeline, found.config.parallel
    walked = len(timeline.recorders)
    shape = axis_sizes(world // parallel.pp, tp=parallel.tp, ep=parallel.ep, cp=parallel.cp, packing=found.plan.packing)
    # of a rank that walks for all the others have no lanes
    groups = rows(shape) if walked == world and parallel.pp == 1 else {}
    name = "pipeline rank" if parallel.pp > 1 else "rank"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_trace(path, {1: TracedStep([timeline.events(rank) for rank in range(walked)], groups)}, note=TRACE_NOTE, name=name)
