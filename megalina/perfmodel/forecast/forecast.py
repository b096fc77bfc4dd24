"""A forecast: how long a training step takes on a cluster, and what a rank holds, without starting anything.

The list is the one that the trainer would run.  It is walked in virtual time, with the seconds of `megalina/perfmodel/cost` and
the network of the cluster's file, and once more for its bytes.  All ranks are taken to be alike, with pipelines all of a stage:
routing is even.  Of many micro-batches few are walked, and the rest take what one more of them adds.  Lists and folded networks
serve many forecasts (`Shared`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megalina.blocks.counts import ModelFlops, model_flops
from megalina.config import ClusterConfig, PretrainConfig, training_layers
from megalina.perfmodel.forecast.more_micro_batches import longer_by, times_as_many
from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline, priced, walked_number
from megalina.perfmodel.forecast.priced_step import PricedStep, Shared
from megalina.perfmodel.sim.memory import Memory
from megalina.perfmodel.sim.virtual import Timeline
from megalina.plan_settings import plan_of
from megalina.step.plan import Plan
from megalina.timeline.contention import CLASSES, OTHER, class_of, summary
from megalina.timeline.recorder import COMPUTE, WAIT, Event

RESERVED_BYTES = 4 * 2**30  # of a GPU's memory: driver, NCCL's buffers, holes; assumed
MESSAGES = "messages"  # between pipeline ranks
WALKED = 3  # rounds of micro-batches, at most: those between the first and the last are alike
MOST_RANKS = 16_384 * 8  # links and flows of all of them are worked out once, before alike ones become one
MOST_PIPELINE_LAYERS = 12_000  # the same of all pipeline ranks
MOST_LAYERS = 3_000  # over all micro-batches that are walked: some ten instructions each, and as many backward


@dataclass(frozen=True, slots=True)
class Walked:
    """A step in virtual time.  Seconds of one rank; the others do the same, or in a pipeline those of its stage."""

    step_s: float
    compute_s: float
    exposed_s: Mapping[str, float]  # by class (a2a, grads, params, other, of pipelines messages): it stands still for it

    @property
    def idle_s(self) -> float:
        """Of a pipeline rank: all that it doesn't compute, its bubble and what it waits for tokens."""
        return self.step_s - self.compute_s

    def longer(self, by: "Walked", rounds: int) -> "Walked":
        """With so many more rounds, each of which adds what this step has more than `by`."""

        def more(own: float, less: float) -> float:
            return own + rounds * (own - less)

        exposed_s = {name: more(own, by.exposed_s[name]) for name, own in self.exposed_s.items()}
        return Walked(more(self.step_s, by.step_s), more(self.compute_s, by.compute_s), exposed_s)


@dataclass(frozen=True, slots=True)
class Forecast:
    """One configuration under one plan.  Bytes are of one rank."""

    plan: Plan
    world: int
    walked: Walked  # of pipelines the mean over ranks
    timeline: Timeline  # of a step with `WALKED` rounds of micro-batches, if it has more; of pipelines with `walked_number`
    memory: Memory  # of pipelines that of the rank which holds the most
    memory_limit_bytes: float  # inf: the cluster's file doesn't say
    tokens: int  # of a step, all ranks
    token_bytes: tuple[float, float]  # of a step, all ranks: what all-to-alls send between nodes, and within them
    flops: ModelFlops
    peak_flops_per_s: float  # of a device
    of_ranks: tuple[Walked, ...] = ()  # of each pipeline rank
    peaks: tuple[int, ...] = ()  # of each pipeline rank: the most bytes that it holds

    @property
    def step_s(self) -> float:
        return self.walked.step_s

    @property
    def exposed_s(self) -> Mapping[str, float]:
        return self.walked.exposed_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def tokens_a_day(self) -> float:
        return self.tokens_per_s * 86400

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s over the devices' peak; None where no peak is known."""
        peak = self.peak_flops_per_s * self.world
        return self.tokens_per_s * self.flops.per_token / peak if peak else None

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory_limit_bytes


def forecast(
    config: PretrainConfig,
    world: int,
    *,
    vocab_size: int,
    plan: Plan | None = None,
    load: float = 1.0,
    shared: Shared | None = None,
) -> Forecast:
    """`vocab_size`: before padding; `plan`: None takes the one that a run begins with; `load`: rows of the busiest rank's experts
    over the mean, which all ranks then compute; `shared`: what earlier forecasts have made.

    ValueError where the cluster's file lacks figures, or the layout does not fit the world."""
    plan = plan or plan_of(config.strategy)
    return forecast_of(priced(config, world, plan, vocab_size=vocab_size, load=load, shared=shared))


def forecast_of(step: PricedStep | PricedPipeline) -> Forecast:
    """The forecast of a step that is priced already."""
    config, train = step.config, step.config.train
    of_ranks: tuple[Walked, ...] = ()
    if isinstance(step, PricedPipeline):
        timelines = [step.walk()]
        of_ranks = _of_ranks(step, timelines[0])
        whole = mean_of(of_ranks)
    else:
        timelines = [step.walk(program=step.listed(rounds)) for rounds in walked_rounds(step.rounds)]
        walked = [_walked(timeline) for timeline in timelines]
        whole = walked[0] if len(walked) == 1 else walked[1].longer(walked[0], step.rounds - WALKED)
    return Forecast(
        step.plan,
        step.world,
        whole,
        timelines[-1],
        step.memory,
        memory_limit_bytes(config.cluster),
        train.global_batch_size * train.seq_len,
        step.token_bytes,
        model_flops(config.model, config.router, vocab_size=step.vocab_size, seq_len=train.seq_len),
        peak_of(config),
        of_ranks,
        tuple(peak for peak, _ in step.peaks) if isinstance(step, PricedPipeline) else (),
    )


def _of_ranks(step: PricedPipeline, timeline: Timeline) -> tuple[Walked, ...]:
    """Of each pipeline rank, for all micro-batches."""
    step_s, many = timeline.step_s + longer_by(step, timeline), times_as_many(step)
    return tuple(_of_rank(timeline, rank, step_s, many) for rank in range(step.job.ranks))


def _of_rank(timeline: Timeline, rank: int, step_s: float, many: Callable[[int, Event], float]) -> Walked:
    """Of one pipeline rank, in a step that has so `many` of what its cells do.

    Messages of neighbours are a class of their own: waiting for them takes all that is left."""
    exposed_s = dict.fromkeys((*CLASSES.values(), OTHER), 0.0)
    compute_s = 0.0
    for event in timeline.events(rank):
        if event.kind == COMPUTE:
            compute_s += (event.end_s - event.start_s) * many(rank, event)
        elif event.kind == WAIT and event.op not in ("send", "recv"):
            exposed_s[class_of(event)] += event.exposed_s * many(rank, event)
    left_s = step_s - compute_s - sum(exposed_s.values())
    return Walked(step_s, compute_s, {**exposed_s, MESSAGES: max(0.0, left_s)})


def mean_of(of_ranks: Sequence[Walked]) -> Walked:
    """Over ranks of one step."""
    number = len(of_ranks)
    exposed_s = {name: sum(w.exposed_s[name] for w in of_ranks) / number for name in of_ranks[0].exposed_s}
    return Walked(of_ranks[0].step_s, sum(w.compute_s for w in of_ranks) / number, exposed_s)


def walked_rounds(rounds: int) -> tuple[int, ...]:
    """Steps that are walked for one of so many rounds."""
    return (rounds,) if rounds <= WALKED else (WALKED - 1, WALKED)


def _walked(timeline: Timeline) -> Walked:
    found = summary(timeline.events(0), {})
    return Walked(timeline.step_s, found.compute_s, {name: traffic.exposed_s for name, traffic in found.traffic.items()})


def memory_limit_bytes(cluster: ClusterConfig) -> float:
    """What a rank may hold; inf: the cluster's file doesn't say."""
    gib = cluster.hardware.memory_gib
    reserved = 0 if cluster.hardware.host_is_device else RESERVED_BYTES
    return gib * 2**30 - reserved if gib else math.inf


def fits_in(cluster: ClusterConfig, num_bytes: float) -> bool:
    return num_bytes <= memory_limit_bytes(cluster)


def peak_of(config: PretrainConfig) -> float:
    """FLOP/s of a device in the run's type; 0: unknown."""
    hardware = config.cluster.hardware
    known = {"float32": hardware.float32_tflops, "bfloat16": hardware.bfloat16_tflops}
    return (known.get(config.train.dtype) or config.cluster.peak_tflops) * 1e12


def check_work(config: PretrainConfig, world: int) -> None:
    """ValueError, one line, for more ranks or a longer list of instructions than a forecast walks."""
    if world > MOST_RANKS:
        raise ValueError(
            f"cluster.nodes ({config.cluster.nodes}) x cluster.ranks_per_node ({config.cluster.ranks_per_node}) = {world} ranks: "
            f"a forecast takes at most {MOST_RANKS}: lower cluster.nodes"
        )
    parallel = config.parallel
    readers = max(1, world // (parallel.pp * parallel.tp * parallel.cp))
    micro_batches = max(1, config.train.global_batch_size // (config.train.micro_batch_size * readers))
    if parallel.pp > 1:
        _check_pipeline_work(config, walked_number(config, micro_batches))
        return
    walked = min(WALKED, micro_batches) * config.strategy.parts
    if len(training_layers(config.model)) * walked > MOST_LAYERS:
        raise ValueError(
            f"model.num_layers ({config.model.num_layers}) x {walked} micro-batches or parts that are walked is a list of more "
            f"instructions than a forecast takes: at most {MOST_LAYERS // walked} layers; lower model.num_layers"
        )


def _check_pipeline_work(config: PretrainConfig, walked: int) -> None:
    """The lists of all pipeline ranks together have every layer once for each micro-batch."""
    layers = len(training_layers(config.model))
    if layers * walked > MOST_PIPELINE_LAYERS:
        raise ValueError(
            f"model.num_layers ({config.model.num_layers}) x {walked} micro-batches that are walked with parallel.pp="
            f"{config.parallel.pp} are lists of more instructions than a forecast takes: at most "
            f"{MOST_PIPELINE_LAYERS // layers} micro-batches; lower train.global_batch_size or parallel.pp, or take a "
            "strategy.pipeline that repeats itself (1f1b, interleaved, zb_h1, zbv, dualpipev)"
        )
