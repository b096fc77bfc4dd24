"""The dynamic program that chooses ranges: never worse than any ranges that one could have named, and what it needs."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest

from megalina.config import ClusterConfig, ModelConfig, PretrainConfig, StrategyConfig, TrainConfig
from megalina.perfmodel.forecast import partition as forecast
from megalina.perfmodel.forecast.partition import best_partition, best_ranges, parts_of, with_partition
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.perfmodel.sim.network import one_level
from megalina.plan_settings import plan_of
from megalina.step.partition import Range, partition, with_own_counts
from megalina.step.program import Instruction, Kind
from megalina.step.strategy import forward_pass

WORLD = 4
MODEL = ModelConfig(num_layers=2, d_model=64, num_experts=4, d_ff=64, vocab_size=256)


def job(micro_batch_size: int = 4, **strategy: object) -> PretrainConfig:
    return PretrainConfig(
        model=MODEL,
        strategy=StrategyConfig(name="lancet", **strategy),  # type: ignore[arg-type]
        train=TrainConfig(global_batch_size=16, micro_batch_size=micro_batch_size, seq_len=64),
        cluster=ClusterConfig(attention_ms=10, experts_ms=14, kernel_floor_ms=1),
        parallel=replace(PretrainConfig().parallel, ep=4),
    )


def priced(config: PretrainConfig, mbit: float) -> PricedStep:
    def seconds(instruction: Instruction) -> float:
        full = {"attention": 0.010, "experts": 0.014}.get(instruction.name, 0.0)
        times = {"F": 1, "B": 2}.get(instruction.phase, 0)
        return times * (0.001 + full * instruction.share) * (instruction.kind is Kind.COMPUTE and full > 0)

    network = one_level(mbit * 1e6 / 8, 0.001)
    plan = plan_of(config.strategy, packing=1)
    return PricedStep(config, WORLD, plan, vocab_size=256, network=network, seconds=seconds)


def every_partition(step: PricedStep, numbers: list[int]) -> list[tuple[Range, ...]]:
    """Of ranges from block to block, with every number of parts."""
    forward = with_own_counts(forward_pass(step.setting))
    blocks = ["attention.0", "route.0", "attention.1", "route.1", ""]
    before = {"route.0": "attention.0", "attention.1": "mix.0", "route.1": "attention.1", "": "mix.1"}
    single = [Range(a, before[b], n) for a, b in combinations(blocks, 2) for n in numbers]
    out: list[tuple[Range, ...]] = [()]
    for chosen in [(a,) for a in single] + list(combinations(single, 2)):
        try:
            partition(forward, chosen)
        except ValueError:
            continue
        out.append(chosen)
    return out


@pytest.mark.parametrize("mbit", [20, 100, 100_000])
def test_no_ranges_are_faster(mbit: float) -> None:
    step = priced(job(), mbit)
    numbers = parts_of(job())
    assert numbers == [2, 4]
    forward = with_own_counts(forward_pass(step.setting))

    def forward_s(ranges: tuple[Range, ...]) -> float:
        return step.walk(program=partition(forward, ranges)).step_s

    found = best_ranges(step, numbers)
    every = every_partition(step, numbers)
    assert len(every) > 30
    # what is cut goes on where the other ended, so a sum of ranges is never below the whole
    assert forward_s(found) <= min(map(forward_s, every)) * 1.02
    assert found or mbit == 100_000


def test_the_plan_is_no_slower_than_none_or_the_widest() -> None:
    step = priced(job(), 100)
    plan = best_partition(job(), WORLD, step.plan, vocab_size=256, step=step)

    def step_s(text: str, backward: str) -> float:
        return step.under(replace(step.plan, partition=text, partition_backward=backward)).walk().step_s

    took_s = step.under(plan).walk().step_s
    assert took_s <= min(step_s(text, b) for text in ("2", "4") for b in ("whole", "mirrored"))
    assert took_s < step.walk().step_s


def test_parts_are_whole_sequences_on_every_rank() -> None:
    assert parts_of(job(1)) == []
    assert parts_of(job(6)) == [2, 3, 6]
    with_tp = job(8)
    assert parts_of(replace(with_tp, parallel=replace(with_tp.parallel, tp=2, ep=2))) == [2, 4]


def test_without_figures_of_a_cluster_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(job(partition="auto"), cluster=ClusterConfig())
    wanted = "strategy.partition=auto simulates steps on cluster=local, and can't: .* a number of parts"
    with pytest.raises(ValueError, match=wanted):
        with_partition(config, WORLD)
    plain = job()
    assert with_partition(plain, WORLD) is plain

    def chosen(*_: object, **__: object) -> object:
        return replace(plan_of(config.strategy), partition="2", partition_backward="mirrored")

    patched: Callable[..., object] = chosen
    monkeypatch.setattr(forecast, "best_partition", patched)
    found = with_partition(config, WORLD).strategy
    assert (found.partition, found.partition_backward) == ("2", "mirrored")
