"""The search among pipelines: what cells say of a layout beside its whole lists, and what is found where nothing else fits."""

from dataclasses import replace

import pytest

from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import forecast_of
from megalina.perfmodel.forecast.pipeline_search import PipelineSearch, pipelines_of
from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline
from megalina.perfmodel.forecast.priced_step import Shared
from megalina.perfmodel.forecast.search import search
from megalina.step.candidates import EAGER, PAIR
from megalina.validate import check_config

WORLD, VOCAB = 16, 8192
MODEL = (
    *("model=tiny", "model.num_layers=8", "model.d_model=1024", "model.d_ff=1024", "model.num_experts=8", "model.num_heads=8"),
    *("model.tie_embeddings=false", "model.num_kv_heads=8", f"model.vocab_size={VOCAB}", "cluster=h100_400g", "cluster.nodes=2"),
    *("train.dtype=bfloat16", "train.seq_len=1024", "train.global_batch_size=256", "train.micro_batch_size=2"),
)


def config_of(*words: str) -> PretrainConfig:
    return compose([*MODEL, *words])


CASES = [
    ("1f1b", 2, 1, "none"),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (
            ("interleaved", 2, 2, "none"),
            ("zb_h1", 4, 1, "selective"),
            ("zbv", 2, 2, "none"),
            ("dualpipev", 2, 2, "full"),
            ("1f1b", 8, 1, "selective"),
        )
    ),
]


@pytest.mark.parametrize(("schedule", "ranks", "chunks", "recompute"), CASES)
def test_cells_say_what_whole_lists_say(schedule: str, ranks: int, chunks: int, recompute: str) -> None:
    """Step within 4%, memory within 10%: enough to tell which layouts are worth their lists."""
    words = [f"parallel.pp={ranks}", f"parallel.pp_chunks={chunks}", f"strategy.pipeline={schedule}", "parallel.zero=1"]
    plan = PAIR if schedule == "dualpipev" else EAGER
    config = config_of(*words, f"strategy={plan.strategy}")
    config = replace(config, train=replace(config.train, recompute=recompute), parallel=replace(config.parallel, ep=2))
    shared = Shared()
    weighing = PipelineSearch(WORLD, vocab_size=VOCAB, shared=shared)
    weighed = weighing.weighed(config)
    assert weighed is not None
    found, whole = weighing.walked(weighed), forecast_of(PricedPipeline(config, WORLD, plan, vocab_size=VOCAB, shared=shared))
    assert found.step_s == pytest.approx(whole.step_s, rel=0.04)
    assert weighed.step_s == pytest.approx(whole.step_s, rel=0.15)  # by formulas
    assert found.memory_bytes == pytest.approx(whole.memory.peak, rel=0.1)


def test_every_pipeline_is_one_that_layers_allow() -> None:
    pipelines = list(pipelines_of(config_of(), WORLD))
    found = {(c.parallel.pp, c.parallel.pp_chunks, c.strategy.pipeline) for c in pipelines}
    assert {c.strategy.name for c in pipelines} == {"eager", "pair"}
    assert (8, 1, "1f1b") in found and (4, 2, "dualpipev") in found and (2, 4, "interleaved") in found
    assert all(pp * chunks <= 8 and WORLD % pp == 0 for pp, chunks, _ in found)


@pytest.mark.full
def test_where_nothing_fits_without_stages_the_search_finds_some() -> None:
    """Two experts of 12.6 M a layer, of which a rank has one at least; tensor parallelism doesn't cut it."""
    words = ("model.num_layers=16", "model.d_ff=4096", "model.num_experts=2", "train.global_batch_size=64")
    base = config_of(*words)
    small = replace(base.cluster, hardware=replace(base.cluster.hardware, memory_gib=5.2))
    found = search(replace(base, cluster=small), WORLD, vocab_size=VOCAB)
    best = found[0]
    assert best.fits and best.config.parallel.pp > 1
    assert all(c.config.parallel.pp > 1 for c in found if c.fits)
    assert {"parallel.pp", "parallel.pp_chunks", "strategy.pipeline"} <= {word.split("=")[0] for word in best.overrides()}
    again = compose([*MODEL, *words, *best.overrides()])
    check_config(again, WORLD)
    assert (again.parallel, again.train, again.strategy) == (best.config.parallel, best.config.train, best.config.strategy)
