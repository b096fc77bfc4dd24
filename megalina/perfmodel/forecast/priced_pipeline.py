"""A priced step of a pipeline: the lists of all pipeline ranks that the trainer would run, with what they cost.

As `PricedStep`, of which it is the other half: the ranks of a stage are alike, those of different stages aren't.  A pipeline
repeats itself once it is full, so of many micro-batches few are walked (`more_micro_batches.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from megalina.blocks.dispatch import on_cuda
from megalina.blocks.pipelined import pipelined
from megalina.config import PretrainConfig, padded_vocab_size
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.cost.instruction_seconds import instruction_seconds
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.perfmodel.forecast.network import network_for
from megalina.perfmodel.forecast.priced_step import (
    PricedStep,
    Shared,
    between_and_within,
    nodes_that_sum,
    setting_of,
    sizes_of,
)
from megalina.perfmodel.sim.memory import Memory, memory_of, peak_of
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.stages import Stages, simulate_stages, uses_of
from megalina.perfmodel.sim.virtual import Timeline
from megalina.step.pipeline.job import Pipelined, forward_of, training_steps
from megalina.step.pipeline.stages import StageLayers
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Program
from megalina.step.strategy import Setting

STEADY = ("1f1b", "interleaved", "zb_h1", "zbv", "dualpipev")  # schedules that repeat themselves once all ranks are busy


class PricedPipeline:
    """One step of `world` ranks, `parallel.pp` stages of ranks that are alike.  Values that take time to compute are computed on
    first use."""

    def __init__(
        self,
        config: PretrainConfig,
        world: int,
        plan: Plan,
        *,
        vocab_size: int,
        load: float = 1.0,
        shared: Shared | None = None,
        network: Network | None = None,
        seconds: Callable[[Instruction], float] | None = None,
    ):
        """As of `PricedStep`.  ValueError, too, for layers and micro-batches that the schedule can't cut so."""
        self.config, self.world, self.plan, self.load, self.vocab_size = config, world, plan, load, vocab_size
        self._shared, self._network, self._seconds = shared or Shared(), network, seconds
        self.micro_batches = micro_batches_of(config, world)
        self.walked_number = walked_number(config, self.micro_batches)
        self._jobs: dict[int, Pipelined] = {}
        self.job = self.job_of(self.walked_number)
        self.held = InstructionBytes(
            config,
            world,
            vocab_size=vocab_size,
            skew=load,
            packing=plan.packing,
            piece_bytes=plan.piece_bytes,
            cuda=on_cuda(config.cluster),
            embedding_ranks=len(self.job.words_ranks),
            ranks_per_node=nodes_that_sum(config),
        )

    def job_of(self, micro_batches: int) -> Pipelined:
        """Of a step with so many micro-batches."""
        if micro_batches not in self._jobs:
            config = shortened(self.config, self.world, micro_batches)
            job = pipelined(config, self.world, vocab_size=self.vocab_size)
            self._jobs[micro_batches] = replace(job, pipeline=job.under(self.plan.strategy))
        return self._jobs[micro_batches]

    @cached_property
    def stages(self) -> Stages:
        """Where the ranks are."""
        return Stages(self._shape, self.job.ranks, self.job.across)

    @property
    def _shape(self) -> dict[str, int]:
        return {axis: self.held.axes[axis] for axis in ("edp", "ep", "cp", "tp")}

    def setting(self, micro_batches: int) -> Setting:
        """What the lists of a step with so many micro-batches are built from."""
        return setting_of(self.config, self.held, self.plan, micro_batches)

    @cached_property
    def forward(self) -> Program:
        """The pass of one micro-batch, of which the lists are made."""
        return forward_of(self.setting(1), self.job)

    def programs(self, micro_batches: int) -> tuple[Program, ...]:
        """The list of each pipeline rank."""
        setting, job = self.setting(micro_batches), self.job_of(micro_batches)
        key = setting.plan, setting.shape, setting.recompute_mode, tuple(setting.buckets.items()), job
        return self._shared.lists_of_stages(key, lambda: training_steps(setting, job))

    @cached_property
    def held_by(self) -> tuple[InstructionBytes, ...]:
        """What each pipeline rank holds, of its own layers."""
        used = [set[str]() for _ in range(self.job.ranks)]
        for stage, instruction in zip(stages_of(self.forward, self.job.stages), self.forward, strict=True):
            used[self.job.pipeline.rank_of[stage]].update(instruction.uses)
        return tuple(map(self.held.of_buckets, used))

    @cached_property
    def peaks(self) -> tuple[tuple[int, int], ...]:
        """Of each pipeline rank the most bytes that it holds, and at which instruction of its list for memory."""
        programs = self.programs(self.walked_number)
        return tuple(peak_of(held, program) for held, program in zip(self.held_by, programs, strict=True))

    @property
    def largest(self) -> int:
        """The pipeline rank that holds the most."""
        return max(range(len(self.peaks)), key=lambda rank: self.peaks[rank])

    @property
    def peak(self) -> tuple[int, int]:
        return self.peaks[self.largest]

    @property
    def list_for_memory(self) -> Program:
        """Of the largest rank.  Once a pipeline is full it holds no more."""
        return self.programs(self.walked_number)[self.largest]

    @cached_property
    def memory(self) -> Memory:
        """Of the largest rank."""
        return memory_of(self.held_by[self.largest], self.list_for_memory, at=self.peak[1])

    @property
    def state_bytes(self) -> int:
        """What the rank with the most of it holds throughout, without an activation."""
        return max(sum(held.state.values()) for held in self.held_by)

    @cached_property
    def token_bytes(self) -> tuple[float, float]:
        """As of `PricedStep`."""
        number = self.walked_number
        starts = (s for program in self.programs(number) for s in program if s.carries_tokens and s.kind is Kind.START)
        sent = sum(map(self.sizes.bytes_of, starts)) * self.micro_batches / number
        row, per_node = self.stages.groups("ep", (0,))[0].tolist(), self.config.cluster.ranks_per_node or self.world
        return between_and_within(self.stages.size * sent, row, per_node)

    @cached_property
    def work(self) -> InstructionWork:
        rows = padded_vocab_size(self.vocab_size, self.config.parallel.tp)
        return InstructionWork(
            self.config,
            world=self.world,
            vocab_rows=rows,
            buckets=self.held.buckets,
            packing=self.plan.packing,
            embedding_ranks=len(self.job.words_ranks),
        )

    @cached_property
    def seconds(self) -> Callable[[Instruction], float]:
        """What an instruction takes.  ValueError where the cluster's file lacks figures."""
        return self._seconds or instruction_seconds(self.config, self.work, load=self.load)

    @cached_property
    def sizes(self) -> Sizes:
        return sizes_of(self.config, self.held)

    def walk(
        self,
        micro_batches: int = 0,
        *,
        network: Network | None = None,
        seconds: Callable[[Instruction], float] | None = None,
        host: Callable[[Instruction], float] | None = None,
    ) -> Timeline:
        """A step with so many micro-batches in virtual time, 0: `walked_number`; a rank of each stage walks for the others.  In
        place of its own: the cluster's network and seconds; `host`: as of `simulate_alike`."""
        micro_batches = micro_batches or self.walked_number
        network = network or self._network or network_for(self.config)
        programs, seconds = self.programs(micro_batches), seconds or self.seconds
        loads = self._shared.of_stages(network, self.stages, uses_of(programs, self.sizes, self.stages))
        return simulate_stages(
            programs,
            stages=self.stages,
            seconds=lambda _, instruction: seconds(instruction),
            network=network,
            sizes=self.sizes,
            host=None if host is None else lambda _, instruction: host(instruction),
            loads=loads,
        )


def stages_of(forward: Program, stages: Sequence[StageLayers]) -> list[int]:
    """Of each instruction of a forward pass its stage: what is outside of the layers leads into them, or follows them."""
    stage_of = {layer: number for number, stage in enumerate(stages) for layer in stage.layers}
    first = next((i for i, s in enumerate(forward) if s.layer >= 0), 0)
    return [stage_of.get(s.layer, 0 if i < first else len(stages) - 1) for i, s in enumerate(forward)]


def walked_number(config: PretrainConfig, micro_batches: int) -> int:
    """Of how many micro-batches the step is that is walked for one of so many: of as many as fill the pipeline twice, and hold
    what it ever holds."""
    parallel, name = config.parallel, config.strategy.pipeline
    in_groups = parallel.pp_chunks > 1 and name in ("interleaved", "zb_h1")
    number = 2 * parallel.pp + (parallel.pp if in_groups else 2)
    return micro_batches if name not in STEADY else min(number, micro_batches)


def micro_batches_of(config: PretrainConfig, world: int) -> int:
    """Of a step, on each rank."""
    parallel, train = config.parallel, config.train
    return train.global_batch_size // (train.micro_batch_size * (world // (parallel.pp * parallel.tp * parallel.cp)))


def shortened(config: PretrainConfig, world: int, micro_batches: int = 0) -> PretrainConfig:
    """The configuration with so many micro-batches a step, 0: as many as are walked."""
    now, train = max(1, micro_batches_of(config, world)), config.train  # the checks say what is wrong with none
    wanted = micro_batches or walked_number(config, now)
    return replace(config, train=replace(train, global_batch_size=train.global_batch_size // now * wanted))


def priced(
    config: PretrainConfig,
    world: int,
    plan: Plan,
    *,
    vocab_size: int,
    load: float = 1.0,
    shared: Shared | None = None,
    network: Network | None = None,
) -> PricedStep | PricedPipeline:
    """A step, with pipelines or without."""
    kind = PricedPipeline if config.parallel.pp > 1 else PricedStep
    return kind(config, world, plan, vocab_size=vocab_size, load=load, shared=shared, network=network)
