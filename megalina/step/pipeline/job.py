"""A step of a pipeline: the lists of all its ranks out of a setting, a schedule and a cut; and those of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megalina.layout import EMBEDDING
from megalina.step.partition import NONE, with_own_counts
from megalina.step.pipeline.cell import COMPUTED, Pipeline
from megalina.step.pipeline.cell import forward as forward_cell
from megalina.step.pipeline.fill import Filling, axis_of, programs
from megalina.step.pipeline.messages import with_messages
from megalina.step.pipeline.parts import in_stages
from megalina.step.pipeline.stages import StageLayers
from megalina.step.pipeline.together import check_together
from megalina.step.program import BucketSpec, Program, check
from megalina.step.strategy import (
    Setting,
    backward_of,
    forward_alone,
    forward_pass,
    loss_of_world,
    place_deferred,
    place_of_rank,
)
from megalina.step.whole_matrices import place_newton_schulz


@dataclass(frozen=True, slots=True)
class Pipelined:
    """How a model is pipelined: which layers are in each stage, and when each rank computes them."""

    pipeline: Pipeline  # of a training step, with messages
    stages: tuple[StageLayers, ...]
    words_stages: tuple[int, ...]  # those that use the embedding: to look words up, or as the output matrix
    pairs: Pipeline | None = None  # the same cells in pairs, for `strategy=pair`; None: there are none, or nobody asks

    @property
    def ranks(self) -> int:
        return self.pipeline.ranks

    def under(self, strategy: str) -> Pipeline:
        """The lists of a step of this strategy."""
        if strategy != "pair":
            return self.pipeline
        assert self.pairs is not None, "check_plan refuses what has no pairs"
        return self.pairs

    @property
    def words_ranks(self) -> tuple[int, ...]:
        """The pipeline ranks that hold the embedding; of several each sums its gradients over all of them."""
        return tuple(sorted({self.pipeline.rank_of[stage] for stage in self.words_stages}))

    @property
    def across(self) -> dict[str, tuple[int, ...]]:
        """The axes that its lists need between pipeline ranks, with these."""
        rank_of = self.pipeline.rank_of
        pairs = sorted({tuple(sorted(pair)) for pair in zip(rank_of, rank_of[1:]) if pair[0] != pair[1]})
        out: dict[str, tuple[int, ...]] = {axis_of(first, second): (first, second) for first, second in pairs}
        return out | ({EMBEDDING: self.words_ranks} if len(self.words_ranks) > 1 else {})

    def held(self, rank: int) -> "Held":
        """What a pipeline rank holds."""
        own = self.pipeline.stages_of(rank)
        return Held(
            layers=tuple(layer for stage in own for layer in self.stages[stage].layers),
            first=any(self.stages[stage].embedding for stage in own),
            last=any(self.stages[stage].head for stage in own),
            words=rank in self.words_ranks,
        )


@dataclass(frozen=True, slots=True)
class Held:
    """The parts of a model that are on a pipeline rank."""

    layers: tuple[int, ...]  # by their numbers in the model, rising
    first: bool  # what comes before the layers
    last: bool  # what comes behind them
    words: bool  # the embedding's matrix

    def has(self, parameter: str) -> bool:
        """Of a parameter outside of the layers, by its declared name."""
        return {"embedding": self.words, "positions": self.first}.get(parameter, self.last)


def training_steps(setting: Setting, job: Pipelined) -> tuple[Program, ...]:
    """The checked program of each pipeline rank.  `setting`: with the buckets of the whole model.

    ValueError for what `check` and `check_together` refuse."""
    setting = replace(setting, stages=tuple(stage.layers for stage in job.stages))
    forward, plan = forward_of(setting, job), setting.plan

    def placed(program: Program, buckets: Mapping[str, BucketSpec]) -> Program:
        return place_of_rank(program, buckets, setting)

    out = programs(
        job.under(plan.strategy),
        job.stages,
        forward,
        setting.buckets,
        late=setting.shape.deferred("all"),
        join_weights=plan.join_weights,
        arranged=backward_of(plan),
        router_state=setting.shape.router_state,
        params_ahead=plan.strategy == "lina_zero",
        weights=lambda program, fixed: place_deferred(program, setting, fixed=fixed),
        placed=placed,
    )
    if plan.newton_schulz_after:
        out = tuple(place_newton_schulz(program, _own(program, setting), plan.newton_schulz_after) for program in out)
    check_together(out, {axis: ranks for axis, ranks in job.across.items() if axis == EMBEDDING})
    return out


def cells_by_tag(setting: Setting, job: Pipelined, rank: int) -> dict[str, str]:
    """By an instruction of a rank's list the cell that it is in, `2F0`; norm, update, sums and messages' STARTs are in none."""
    setting = replace(setting, stages=tuple(stage.layers for stage in job.stages))
    late, join = setting.shape.deferred("all"), setting.plan.join_weights
    filling = Filling(job.pipeline, job.stages, forward_of(setting, job), late, join_weights=join)
    cells = (cell for _, cell in job.pipeline.cells(rank) if cell.work in COMPUTED)
    return {s.tag: str(cell) for cell in cells for s in (*filling.instructions(cell, rank), *filling.left(cell))}


def forward_of(setting: Setting, job: Pipelined) -> Program:
    """Of one micro-batch, with each stage's layers in the parts of the plan.  ValueError as `in_stages`."""
    forward, plan, shape = with_own_counts(forward_pass(setting)), setting.plan, setting.shape
    text = plan.partition if plan.partition != NONE else str(plan.parts)
    return in_stages(
        forward,
        text,
        job.stages,
        job.pipeline.rank_of,
        one_group=shape.micro_batch_groups,
        whole_routers=shape.whole_routers,
    )


def evaluations(setting: Setting, job: Pipelined, *, by_sequence: bool = False) -> tuple[Program, ...]:
    """The checked program of each pipeline rank for one forward pass without gradients, and the sum of its losses over the world,
    or with `by_sequence` of each sequence's.

    Multi-token prediction is left out, as in `megalina.step.strategy.evaluation`."""
    number = setting.shape.num_layers
    stages = [replace(stage, layers=tuple(i for i in stage.layers if i < number)) for stage in job.stages]
    forward = with_own_counts(forward_alone(setting.shape, by_sequence=by_sequence))
    lists = tuple(tuple(forward_cell(stage, 0) for stage in job.pipeline.stages_of(rank)) for rank in range(job.ranks))
    pipeline = with_messages(Pipeline(lists, job.pipeline.rank_of, 1))
    filling = Filling(pipeline, stages, forward, frozenset())
    out = []
    for rank in range(job.ranks):
        cells = filling.cells(rank)[2:]  # without the step's sizes
        program = (*cells, *loss_of_world(cells, by_sequence=by_sequence))
        own = _own(program, setting)
        check(program, {"#batch.-.0"} | set(own), own)
        out.append(program)
    check_together(out)
    return tuple(out)


def _own(program: Program, setting: Setting) -> dict[str, BucketSpec]:
    used = {name for s in program for name in s.uses}
    return {name: spec for name, spec in setting.buckets.items() if name in used}
