"""The search shares lists and folded networks, which changes nothing; and what is said of layouts that don't fit."""

from dataclasses import replace
from typing import Any

import pytest

from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import RESERVED_BYTES, WALKED, forecast, forecast_of
from megalina.perfmodel.forecast.priced_step import PricedStep, Shared
from megalina.perfmodel.forecast.report import load_table, memory_table, timeline_text
from megalina.perfmodel.forecast.search import candidate, search, under_loads, what_fits
from megalina.perfmodel.sim.memory import memory_of, peak_of
from megalina.plan_settings import strategy_of
from megalina.step.candidates import EAGER, OF_A_LAYOUT
from megalina.step.plan import Plan
from megalina.timeline.recorder import Event

WORLD, VOCAB = 8, 4096
SMALL = (
    *("model=bench", "cluster=h100_400g", "cluster.nodes=1", "parallel.ep=4", "train.global_batch_size=32", "train.seq_len=512"),
    *("train.micro_batch_size=2", "train.dtype=bfloat16"),
)


def config_of(*overrides: str) -> PretrainConfig:
    return compose([*SMALL, *overrides])


def with_memory(config: PretrainConfig, **values: Any) -> PretrainConfig:
    return replace(config, cluster=replace(config.cluster, hardware=replace(config.cluster.hardware, **values)))


def test_what_is_shared_changes_nothing() -> None:
    config, shared = config_of("train.global_batch_size=128"), Shared()
    for plan in (EAGER, Plan("flow", parts=2), EAGER, Plan("lina", chunks=(2,), packing=2)):
        for micro in (1, 2):
            one = replace(config, train=replace(config.train, micro_batch_size=micro))
            alone, together = (forecast(one, WORLD, vocab_size=VOCAB, plan=plan, shared=s) for s in (None, shared))
            assert alone.walked == together.walked and alone.memory == together.memory


@pytest.mark.full
def test_a_search_gives_what_each_candidate_gives_alone_and_the_same_again() -> None:
    config = config_of("train.global_batch_size=64", "model.num_layers=2")
    found, again = (search(config, WORLD, vocab_size=VOCAB) for _ in range(2))
    told = [[(c.overrides(), c.memory_bytes, c.found and c.found.walked) for c in one] for one in (found, again)]
    assert told[0] == told[1]
    for c in found[:: len(found) // 5]:
        alone = candidate(c.config, c.plan, WORLD, vocab_size=VOCAB)
        assert alone.memory_bytes == c.memory_bytes
        assert (alone.found and alone.found.walked) == (c.found and c.found.walked)


EVERY_OTHER = [p if i % 2 == 0 else pytest.param(p, marks=pytest.mark.full) for i, p in enumerate(OF_A_LAYOUT)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("plan", EVERY_OTHER, ids=str)
def test_rounds_that_are_not_walked_take_what_one_more_takes(plan: Plan) -> None:
    """Within 0.1% of a step that is walked whole, and no more memory."""
    packed = replace(plan, packing=min(plan.packing, 2), piece_bytes=min(plan.piece_bytes, 2**20))
    base = config_of("train.global_batch_size=96", "parallel.zero=1")
    config = replace(base, strategy=strategy_of(packed, base.strategy))
    step = PricedStep(config, WORLD, packed, vocab_size=VOCAB)
    assert step.memory.peak == memory_of(step.held, step.program).peak == peak_of(step.held, step.program)[0]
    few = forecast_of(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megalina.perfmodel.forecast.forecast.WALKED", 6)
        every = forecast_of(step)
    assert few.step_s == pytest.approx(every.step_s, rel=1e-3)
    assert few.timeline.step_s < every.timeline.step_s or packed.parts * WALKED >= 6


def test_skew_costs_memory_and_recompute_saves_it() -> None:
    config, shared = config_of(), Shared()
    even, twice = under_loads(config, EAGER, WORLD, (1.0, 2.0), vocab_size=VOCAB, shared=shared)
    assert even.peaks["none"] == forecast(config, WORLD, vocab_size=VOCAB, plan=EAGER).memory.peak
    assert even.peaks["none"] > even.peaks["selective"] >= even.peaks["full"]
    assert all(twice.peaks[mode] > even.peaks[mode] for mode in even.peaks)
    tokens, rows = 2 * 512, 2
    assert even.received == tokens * rows * config.model.d_model * 2 and twice.received == 2 * even.received
    text = load_table([even, twice], even.peaks["none"], {1.0: 0.5})
    assert "too much" in text.splitlines()[1] and "500.0 ms" in text and "does not fit" in text


def test_rows_of_memory_sum_to_the_peak() -> None:
    memory = forecast(config_of(), WORLD, vocab_size=VOCAB).memory
    assert sum(memory.rows().values()) == memory.peak
    *rows, last = memory_table(memory, float("inf")).splitlines()
    shown = [float(line.split()[-2]) for line in rows]
    assert sum(shown) == pytest.approx(float(last.split()[-2]), abs=0.005 * (len(shown) + 1))


@pytest.mark.parametrize(
    ("short_of", "words"),
    [
        (0.98, ("train.recompute=selective",)),
        (0.8, ("parallel.zero=1",)),
        (0.01, ()),
    ],
)
def test_the_smallest_change_that_fits_is_found(short_of: float, words: tuple[str, ...]) -> None:
    config = config_of("train.micro_batch_size=1")
    peak = forecast(config, WORLD, vocab_size=VOCAB, plan=EAGER).memory.peak
    small = with_memory(config, memory_gib=(RESERVED_BYTES + short_of * peak) / 2**30)
    assert not candidate(small, EAGER, WORLD, vocab_size=VOCAB).fits
    found = what_fits(small, EAGER, WORLD, vocab_size=VOCAB)
    assert found == words
    if words:
        changed = with_memory(config_of("train.micro_batch_size=1", *found), memory_gib=small.cluster.hardware.memory_gib)
        assert candidate(changed, EAGER, WORLD, vocab_size=VOCAB).fits


def test_a_timeline_in_letters() -> None:
    def event(kind: str, op: str, start_s: float, end_s: float) -> Event:
        return Event(kind, "", "F", "", 0, "0", op, "", 0, start_s, start_s, end_s)

    events = [event("compute", "", 0.0, 5.0), event("send", "tokens", 5.0, 6.2), event("send", "grads", 9.0, 10.0)]
    lines = [line.split("|")[1] for line in timeline_text(events, 10.0, width=10).splitlines()]
    assert lines[:3] == ["#####     ", "     #+   ", "         #"]
