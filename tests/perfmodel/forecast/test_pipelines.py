"""Pipelines in virtual time: the real lists of all pipeline ranks, priced, against formulas and walks of cells."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import Forecast, forecast_of
from megalina.perfmodel.forecast.pipeline_cells import cells_of
from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline
from megalina.perfmodel.sim.memory import peak_of
from megalina.perfmodel.sim.network import Network
from megalina.plan_settings import strategy_of
from megalina.step.candidates import EAGER, PAIR
from megalina.step.pipeline.live import live_peaks
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.walk import Times, walk
from megalina.step.program import Instruction, Kind

FREE = Network(nic_bytes_per_s=float("inf"))
VOCAB = 256
SMALL = (
    *("model=tiny", "cluster=h100_400g", "train.dtype=bfloat16", "train.micro_batch_size=1", "train.seq_len=64"),
    *("model.max_positions=0", "parallel.ep=1", f"model.vocab_size={VOCAB}"),
)
EQUAL, UNEQUAL = Times(1.0, 1.0, 1.0), Times(1.0, 1.3, 0.7)  # seconds of a rank's layers
IN_LOCK_STEP = ("gpipe", "1f1b", "interleaved")  # that have no cells of their own for weights' gradients


def config_of(
    schedule: str, ranks: int, chunks: int, micro_batches: int, *, a_stage: int = 1, words: tuple[str, ...] = ()
) -> PretrainConfig:
    layers = [f"model.num_layers={ranks * chunks * a_stage}", f"parallel.pp={ranks}", f"parallel.pp_chunks={chunks}"]
    layout = "|".join(["t" * a_stage] * (ranks * chunks))
    batch = [f"train.global_batch_size={micro_batches}", f"parallel.pp_layout='E{layout}L'", f"strategy.pipeline={schedule}"]
    return compose([*SMALL, *layers, *batch, *words])


def seconds_of(layers: int, times: Times) -> Callable[[Instruction], float]:
    """Equal layers, of which one instruction takes time; embedding, head and all else are free."""

    def seconds(s: Instruction) -> float:
        if s.kind is not Kind.COMPUTE or s.name != "attention" or s.layer < 0:
            return 0.0
        backward = times.inputs + times.weights * (not s.late)
        return {"F": times.forward, "B": backward, "W": times.weights}[s.phase] / layers

    return seconds


@dataclass
class Activations:
    """Bytes in which a layer's attention keeps 1 for backward, and nothing else is held."""

    @property
    def state(self) -> dict[str, int]:
        return {}

    def ranks(self, axis: str) -> int:
        return 1

    def value(self, name: str, instruction: Instruction) -> int:
        return 0

    def bucket(self, instruction: Instruction) -> int:
        return 0

    def kept(self, instruction: Instruction) -> int:
        return int(instruction.name == "attention")

    def keeps(self, instruction: Instruction) -> tuple[str, ...]:
        return ()

    def deferred(self, instruction: Instruction) -> "Nothing":
        return Nothing()

    def rise(self, instruction: Instruction) -> int:
        return 0

    def received(self, instruction: Instruction, sent: int, arrives: int) -> int:
        return 0


@dataclass
class Nothing:
    reads: bool = False
    gradients: bool = False


CASES = [
    *(("1f1b", 4, 1, 8), ("interleaved", 2, 2, 6), ("zb_h1", 4, 1, 6)),
    *(("zbv", 3, 2, 7), ("dualpipev", 2, 2, 5), ("gpipe", 3, 1, 4)),
]
MORE = [
    *[(name, p, 1, m) for name in ("gpipe", "1f1b", "zb_h1") for p in (2, 4, 8) for m in (p, 2 * p + 1, 3 * p)],
    *[("interleaved", p, v, m) for p in (2, 4) for v in (2, 3) for m in (p, 3 * p)],
    *[("zb_h1", p, 2, m) for p in (2, 4) for m in (p, 3 * p)],
    *[(name, p, 2, m) for name in ("zbv", "dualpipev") for p in (2, 4, 8) for m in (2 * p, 2 * p + 3)],
    *[("greedy", p, v, m) for p in (2, 4) for v in (1, 2) for m in (p, 2 * p + 1)],
]


@pytest.mark.parametrize("times", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.full) for c in MORE)], ids=str)
def test_bubbles_and_peaks_of_the_real_lists_are_those_of_the_formulas(case: tuple[str, int, int, int], times: Times) -> None:
    """Links are free and layers equal, so what is left is the schedule: to rounding.

    But for one thing: messages have the order of cells that take equally long, so cells W may hold some up where F, I and W
    differ."""
    name, ranks, chunks, micro_batches = case
    config = config_of(name, ranks, chunks, micro_batches)
    plan = PAIR if name == "dualpipev" else EAGER
    config = replace(config, strategy=strategy_of(plan, config.strategy))
    step = PricedPipeline(config, ranks, plan, vocab_size=VOCAB, network=FREE, seconds=seconds_of(chunks, times))
    timeline, job = step.walk(micro_batches), step.job_of(micro_batches)
    size, schedule = Size(ranks, chunks, micro_batches, times, paired=plan is PAIR), SCHEDULES[name]
    cells, found = walk(job.pipeline, times), cells_of(timeline, job, step.forward)
    if name in IN_LOCK_STEP or times == EQUAL:
        assert timeline.step_s == pytest.approx(cells.makespan, rel=1e-9)
        assert found.idle == pytest.approx(cells.idle, abs=1e-9)
        bubble = schedule.bubble(size)
        for idle in found.idle if bubble is not None else ():
            assert idle <= bubble + 1e-9 if schedule.bubble_is_bound else idle == pytest.approx(bubble, abs=1e-9)
    assert cells.makespan * (1 - 1e-9) <= timeline.step_s <= 1.03 * cells.makespan
    peaks = [peak_of(Activations(), program)[0] / chunks for program in step.programs(micro_batches)]
    assert peaks == pytest.approx(live_peaks(job.pipeline))
    for rank, peak in enumerate(peaks):
        if (formula := schedule.peak(size, rank)) is not None and name != "greedy":
            assert peak == pytest.approx(formula)


def of_a_cluster(schedule: str, ranks: int, chunks: int, micro_batches: int, *words: str) -> PricedPipeline:
    """MoE layers of some size on whole nodes, with what is sent on their links."""
    cluster = (f"cluster.nodes={ranks}", "parallel.ep=8", "model.num_experts=8", "model.d_model=1024", "model.d_ff=2048")
    sizes = ("model.num_heads=8", "train.seq_len=1024", "parallel.zero=1")
    config = config_of(schedule, ranks, chunks, micro_batches * 8, a_stage=2, words=(*cluster, *sizes, *words))
    plan = PAIR if schedule == "dualpipev" else EAGER
    return PricedPipeline(replace(config, strategy=strategy_of(plan, config.strategy)), 8 * ranks, plan, vocab_size=VOCAB)


STEADY_CASES = [("1f1b", 2, 1), ("zbv", 2, 2)]
MORE_STEADY = [("1f1b", 4, 1), ("interleaved", 2, 2), ("zb_h1", 4, 1), ("zb_h1", 2, 2), ("zbv", 4, 2), ("dualpipev", 4, 2)]


@pytest.mark.parametrize("case", [*STEADY_CASES, *(pytest.param(c, marks=pytest.mark.full) for c in MORE_STEADY)], ids=str)
def test_micro_batches_that_are_not_walked_take_what_the_last_ones_took(case: tuple[str, int, int]) -> None:
    """Within 1% of a step that is walked whole, waits and all, and no more memory."""
    name, ranks, chunks = case
    step = of_a_cluster(name, ranks, chunks, 6 * ranks)
    assert step.walked_number < 6 * ranks == step.micro_batches
    few = forecast_of(step)
    whole = of_a_cluster(name, ranks, chunks, 6 * ranks)
    whole.walked_number = 6 * ranks
    whole.job = whole.job_of(6 * ranks)
    every = forecast_of(whole)
    assert few.step_s == pytest.approx(every.step_s, rel=1e-2)
    assert few.walked.compute_s == pytest.approx(every.walked.compute_s, rel=1e-2)
    for own, wanted in zip(few.of_ranks, every.of_ranks, strict=True):
        for kind, seconds in wanted.exposed_s.items():
            assert own.exposed_s[kind] == pytest.approx(seconds, abs=1e-2 * every.step_s), kind
    assert few.peaks == every.peaks


def test_what_a_rank_holds_is_what_its_list_uses_and_the_largest_counts() -> None:
    step = of_a_cluster("1f1b", 2, 1, 4, "model.tie_embeddings=false")
    for held, program in zip(step.held_by, step.programs(4), strict=True):
        assert set(held.buckets) == {name for s in program for name in s.uses}
    held_by_all = sum(bucket.numel for held in step.held_by for bucket in held.buckets.values())
    assert held_by_all == sum(bucket.numel for bucket in step.held.buckets.values())
    found = forecast_of(step)
    assert found.memory.peak == max(found.peaks) and len(found.peaks) == 2
    assert found.memory.peak > step.state_bytes == max(sum(held.state.values()) for held in step.held_by)


def test_messages_are_a_micro_batchs_tokens_and_take_the_links_time() -> None:
    """Two stages on two nodes: each rank sends its stream through an adapter of its own."""
    step = of_a_cluster("1f1b", 2, 1, 4)
    hardware, cluster = step.config.cluster.hardware, step.config.cluster
    rate = cluster.link_gbit * 1e9 / 8 / hardware.nics_per_node * hardware.collective_efficiency
    sent = [e for e in step.walk(4).events(0) if e.kind == "send" and e.op == "send"]
    assert len(sent) == 4 and {e.num_bytes for e in sent} == {1024 * 1024 * 2}
    latency_s = hardware.kernel_us / 1e6 + cluster.latency_us / 1e6
    assert min(e.end_s - e.start_s for e in sent) == pytest.approx(1024 * 1024 * 2 / rate + latency_s, rel=1e-6)


def slower_links(step: PricedPipeline, factor: float) -> Forecast:
    cluster = replace(step.config.cluster, link_gbit=step.config.cluster.link_gbit / factor)
    config = replace(step.config, cluster=cluster)
    return forecast_of(PricedPipeline(config, step.world, EAGER, vocab_size=VOCAB))


def test_slow_links_between_stages_are_waited_for_as_messages() -> None:
    step = of_a_cluster("1f1b", 2, 1, 4)
    fast, slow = forecast_of(step), slower_links(step, 200)
    assert slow.walked.exposed_s["messages"] > 2 * fast.walked.exposed_s["messages"]
    assert slow.walked.exposed_s["a2a"] == pytest.approx(fast.walked.exposed_s["a2a"])  # inside nodes
