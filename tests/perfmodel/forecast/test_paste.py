"""The planner's last line is the planned job, whole: composed again it is the configuration that was planned."""

import shlex
from dataclasses import replace

import pytest

from megalina.cli.plan import main
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import MOST_LAYERS, MOST_RANKS, check_work
from megalina.perfmodel.forecast.report import command, heads, joined, origin, planned_for
from megalina.perfmodel.forecast.search import candidate, search
from megalina.step.candidates import OF_A_LAYOUT

TINY = ["model=tiny", "cluster=h100_400g", "train.global_batch_size=64", "train.seq_len=32"]


def pasted(line: str) -> PretrainConfig:
    words = shlex.split(line)
    return compose(words[words.index("pretrain_gpt_moe.py") + 1 :])


def same_job(found: PretrainConfig, planned: PretrainConfig) -> bool:
    return replace(found, run=planned.run, launch=planned.launch) == planned


@pytest.mark.parametrize(
    ("words", "nodes"),
    [
        (["nodes=2", "parallel.ep=4", "train.micro_batch_size=1", "--vocab-size", "5000"], 2),
        (["nodes=1", "strategy=lina", "strategy.packing=1", "parallel.ep=4"], 1),
        pytest.param(
            ["nodes=2", "model.d_model=128", "model.num_heads=1", "model.num_kv_heads=1", "--search"], 2, marks=pytest.mark.full
        ),
    ],
    ids=["two nodes", "one node", "search"],
)
def test_the_line_to_paste_is_the_planned_job(
    words: list[str], nodes: int, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    planned: list[PretrainConfig] = []

    def remembered(words, config, **rest):
        planned.append(config)
        return planned_for(words, config, **rest)

    monkeypatch.setattr("megalina.perfmodel.forecast.report.planned_for", remembered)
    assert main([*TINY, *words]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    found = pasted(line)
    if nodes == 1:
        assert line.startswith("python pretrain_gpt_moe.py ") and found.launch.ranks == 8
    else:
        assert line.startswith(f"torchrun --nnodes {nodes} --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 ")
        assert "launch.ranks" not in line
    assert found.model.vocab_size == (5000 if "5000" in words else 32768)
    assert found.cluster.nodes == nodes and found.train.global_batch_size == 64
    asked = replace(planned[-1], model=replace(planned[-1].model, vocab_size=found.model.vocab_size))
    rest = {"parallel": found.parallel, "strategy": found.strategy, "train": found.train}
    assert same_job(found, replace(asked, **rest))


EVERY_OTHER = [p if i % 2 == 0 else pytest.param(p, marks=pytest.mark.full) for i, p in enumerate(OF_A_LAYOUT)]


@pytest.mark.parametrize("plan", EVERY_OTHER, ids=str)
def test_every_plan_comes_back_as_it_was(plan) -> None:
    words = [*TINY, "cluster.nodes=1", "parallel.ep=4", "parallel.zero=1", "model.num_layers=4", "strategy=flow"]
    config = compose(words)
    planned = candidate(config, plan, 8, vocab_size=512)
    line = command(joined(planned_for(words, config, world=8, vocab_size=512), planned.overrides()), nodes=2, ranks_per_node=4)
    wanted = replace(planned.config, model=replace(config.model, vocab_size=512))
    found = pasted(line)
    assert same_job(found, wanted), (found.strategy, wanted.strategy)
    assert sum(word.startswith("strategy=") for word in shlex.split(line)) == 1


def test_heads_and_the_model_that_overrides_start_from_are_shown() -> None:
    config = compose(["model=tiny", "model.d_model=2048"])
    assert heads(config).startswith("4 heads x 512, 4 of keys and values; warning: heads wider than 256")
    assert heads(compose(["model=tiny"])) == "4 heads x 16, 4 of keys and values"
    windows = heads(compose(["model=tiny", "train.seq_len=4096", "model.window=128", "model.full_attention_every=2"]))
    # 2 layers x 2 x 4 heads x 16 numbers of 4 bytes: 4,096 tokens of each, or 159 of one
    assert windows.endswith(
        "; windows of 128 tokens in 1 of 2 layers: generation keeps 2.18 MB of a sequence of 4096, and 4.19 without"
    )
    assert origin(["model.d_model=2048"], config) == "model.d_model=2048 start from model=tiny, as no model=NAME is given"
    assert origin(["model=tiny", "model.d_model=2048"], config) == origin(["optim.lr=1"], config) == ""


def test_what_a_minute_does_not_walk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(["model=tiny"])
    check_work(config, MOST_RANKS)
    for words, said in (
        (
            ["nodes=100000", "train.global_batch_size=800000", "train.micro_batch_size=1"],
            f"ranks: a forecast takes at most {MOST_RANKS}",
        ),
        (
            ["nodes=1", "train.global_batch_size=32", "model.num_layers=100000"],
            "model.num_layers (100000) x 2 micro-batches or parts",
        ),
    ):
        assert main(["model=tiny", "cluster=h100_400g", *words]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and said in err
    assert MOST_LAYERS // 3 >= 1000


@pytest.mark.full
def test_the_fastest_that_fits_under_skew_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, "nodes=1", "parallel.ep=4"]
    assert main(words) == 0
    assert "at a skew" not in capsys.readouterr().out
    tight = compose([*TINY, "cluster.nodes=1"])
    best, second = search(tight, 8, vocab_size=32768)[:2]
    assert best.found and second.found
    asked: list[float] = []

    def second_fits(found, load, world, *, vocab_size, shared):
        asked.append(load)
        return len(asked) > 1

    monkeypatch.setattr("megalina.perfmodel.forecast.search.fits_under", second_fits)
    assert main([*TINY, "nodes=1", "--search"]) == 0
    out = capsys.readouterr().out
    assert f"at a skew of 1.5 it does not fit; the fastest that does: {second.found.step_s * 1e3:.1f} ms with parallel.tp=" in out
    assert asked == [1.5, 1.5]
