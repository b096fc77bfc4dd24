"""tools/simulate.py as a user runs it: one configuration, a sweep with jobs that can't run, ranks that differ, and mistakes."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalina.cli.simulate import main
from megalina.compose import compose
from megalina.perfmodel.forecast.report import as_json
from megalina.perfmodel.forecast.search import candidate
from megalina.perfmodel.forecast.sweep import Job, append, read, row_of, simulated, trace, weak_scaling
from megalina.perfmodel.forecast.sweep_report import axes_of, baselines, cells, figure_of, page
from megalina.perfmodel.forecast.uneven import MOST_RANKS, Unevenness, forecast_unevenly, matrix_of
from megalina.perfmodel.sim.sizes import Sizes
from megalina.plan_settings import plan_of
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Op
from tests.commands import Done, done
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import config_of, write_tokens
from tests.train.test_timing import timed

WORLD, VOCAB = 8, 4096
SMALL = (
    *("model=bench", "model.num_layers=2", "cluster=h100_400g", "cluster.nodes=1", "train.dtype=bfloat16", "train.seq_len=512"),
    *("train.micro_batch_size=2", "train.global_batch_size=32", "parallel.ep=4"),
)


def run(*words: str) -> Done:
    return done(main, *words)


def job_of(*overrides: str, **unevenness: Any) -> Job:
    config = compose([*SMALL, *overrides])
    return Job(config, WORLD, VOCAB, Unevenness(**unevenness), [*SMALL, *overrides])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("sweep") / "out"
    swept = ("strategy=eager,flow", "parallel.ep=4,3", "simulate.trace=step.json.gz", f"hydra.sweep.dir={folder}")
    return folder, run("-m", *SMALL[:-1], *swept)


@pytest.mark.full
def test_a_sweep_has_a_row_for_every_job_also_for_those_that_cannot_run(sweep: Any) -> None:
    folder, swept = sweep
    assert swept.returncode == 0, swept.stderr
    rows = read(folder / "results.jsonl")
    assert [row["job"] for row in rows] == [0, 1, 2, 3]
    assert [row["reason"] is None for row in rows] == [True, False, True, False]
    assert all("parallel.ep (3)" in row["reason"] and row["step_s"] is None for row in rows[1::2])
    assert [row["swept"]["strategy"] for row in rows] == ["eager", "eager", "flow", "flow"]
    assert rows[0]["step_s"] != rows[2]["step_s"] and rows[2]["plan"] == "flow: 2 parts"
    assert "parallel.ep (3)" in swept.stdout and "as fast as eager" in swept.stdout
    html = (folder / "sweep.html").read_text()
    assert html.count("<tr") == 5 and "<svg" in html and not re.search(r'(src|href)="?https?:', html)
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert (folder / "0" / "step.json.gz").is_file() and not (folder / "1" / "step.json.gz").exists()


@pytest.mark.full
def test_a_row_has_the_keys_of_a_candidate_of_the_planner(sweep: Any) -> None:
    rows = read(sweep[0] / "results.jsonl")
    config = compose(SMALL)
    plain = candidate(config, Plan("eager"), WORLD, vocab_size=config.model.vocab_size)
    of_planner = as_json([plain], world=WORLD, common=())["candidates"][0]
    assert rows[0].keys() - of_planner.keys() == {"job", "swept", "world", "reason"} and of_planner.keys() <= rows[0].keys()
    assert all(rows[0][key] == of_planner[key] for key in of_planner if key != "overrides")
    assert "launch.ranks=8" in rows[0]["overrides"] and not any(word.startswith("simulate.") for word in rows[0]["overrides"])


@pytest.mark.full
def test_a_sweep_does_not_write_into_another_one_and_is_drawn_again_after_a_kill(sweep: Any, tmp_path: Path) -> None:
    folder, _ = sweep
    before = (folder / "results.jsonl").read_text()
    again = run("-m", *SMALL, "strategy=eager,flow", f"hydra.sweep.dir={folder}")
    assert again.returncode == 2 and "holds another sweep" in again.stderr
    assert (folder / "results.jsonl").read_text() == before
    (tmp_path / "results.jsonl").write_text(before + before[:40])  # killed while it wrote
    redrawn = run(f"simulate.redraw={tmp_path}")
    assert redrawn.returncode == 0 and (tmp_path / "sweep.png").is_file() and len(read(tmp_path / "results.jsonl")) == 4


def test_one_configuration_is_a_table_a_trace_a_picture_and_a_row(tmp_path: Path) -> None:
    files = {name: tmp_path / f"step.{name}" for name in ("json", "png", "gz")}
    words = (f"simulate.json={files['json']}", f"simulate.picture={files['png']}", f"simulate.trace={files['gz']}")
    one = run(*SMALL, "strategy=priority", "simulate.sequences_per_rank=8", *words)
    assert one.returncode == 0, one.stderr
    row = json.loads(files["json"].read_text())
    assert f"{row['step_s'] * 1e3:.1f}" in one.stdout and "memory of a rank" in one.stdout
    assert "train.global_batch_size=64" in row["overrides"] and "train.global_batch_size=32" not in row["overrides"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.ep=3"], "parallel.ep (3)"),
        (["simulate.slow=1"], "simulate.slow"),
        (["cluster=local"], "conf/cluster/local.yaml"),
        (["simulate.trace=nowhere/t.json"], "there is no folder"),
        (["-m", "strategy=eager,flw"], "did you mean flow"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(words: list[str], said: str) -> None:
    refused = run(*(word for word in words if word == "-m"), *SMALL, *(word for word in words if word != "-m"))
    assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1 and not refused.stdout


def boxes(path: Path) -> dict[str, set[str]]:
    """The reader of this test: by lane the names of all boxes of rank 0's first step, and the keys of what a click shows."""
    lines = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    own = [x for x in lines if x["ph"] == "X" and x["pid"] == 0]
    first = min(x["ts"] for x in own if x["cat"] == "step")
    until = min((x["ts"] for x in own if x["cat"] == "step" and x["ts"] > first), default=float("inf"))
    found: dict[str, set[str]] = {}
    for x in own:
        if x["ts"] < until and x["cat"] != "step":
            found.setdefault(x["cat"], set()).add(x["name"])
            found.setdefault(f"{x['cat']} keys", set()).update(set(x["args"]) - {"beside", "slowdown"})  # if there was anything
    found["events"] = {x["ph"] for x in lines}
    return found


@pytest.mark.full
def test_a_simulated_trace_and_a_real_one_have_the_same_boxes(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    run_on_ranks(2, _traced, tmp_path)
    real = boxes(tmp_path / "real" / "trace.json.gz")
    config = config_of(tmp_path, "real", ep=2)
    hardware = compose(["cluster=h100_400g"]).cluster
    cluster = replace(hardware, nodes=1, ranks_per_node=2, hardware=replace(hardware.hardware, domain_ranks=2, nics_per_node=2))
    config = replace(config, cluster=cluster, strategy=compose(["strategy=eager"]).strategy)
    uneven = Unevenness(slow_rank=1, slow_factor=1.5)  # so that both ranks walk
    found = simulated(Job(config, 2, 300, uneven, ()))
    trace(tmp_path / "simulated.json.gz", found, 2)
    made = boxes(tmp_path / "simulated.json.gz")
    assert made.keys() == real.keys()
    # In virtual time nobody waits for split sizes by themselves: what needs them doesn't leave before.
    real["waits"] = {name for name in real["waits"] if not name.startswith("F:counts<")}
    for lane in made:
        assert made[lane] == real[lane], lane


def _traced(folder: Path) -> None:
    timed(folder, "real", trace_steps=[2])


def test_ranks_that_differ_in_nothing_take_as_long_as_one_that_walks_for_all() -> None:
    found = simulated(job_of())
    assert found.found is not None
    alike = forecast_unevenly(found.config, found.found, WORLD, vocab_size=VOCAB, unevenness=Unevenness())
    assert alike.step_s == pytest.approx(found.found.step_s, rel=1e-6)
    assert alike.walked.compute_s == pytest.approx(found.found.walked.compute_s, rel=1e-6)
    assert dict(alike.exposed_s) == pytest.approx(dict(found.found.exposed_s), rel=1e-6, abs=1e-9)
    assert alike.memory.peak == found.found.memory.peak


def forecast_of(**unevenness: Any) -> Any:
    found = simulated(job_of(**unevenness)).found
    assert found is not None
    return found


def test_all_wait_for_a_slow_rank() -> None:
    even, slow = forecast_of(), forecast_of(slow_rank=5, slow_factor=1.5)
    added_s = 0.5 * even.walked.compute_s
    assert even.step_s + 0.9 * added_s < slow.step_s < even.step_s + 1.1 * added_s
    assert slow.walked.compute_s == pytest.approx(even.walked.compute_s * (1 + 0.5 / WORLD))  # a mean over the ranks
    assert sum(slow.exposed_s.values()) > sum(even.exposed_s.values()) + 0.5 * added_s
    fast = forecast_of(slow_rank=5, slow_factor=0.5)
    assert fast.step_s == pytest.approx(even.step_s, rel=0.02)  # the others are not faster for it


def test_the_busiest_rank_costs_time_and_memory_and_everybody_gets_their_tokens_back() -> None:
    steps = [forecast_of(busiest_load=load) for load in (1.0, 1.5, 2.0)]
    assert steps[0].step_s < steps[1].step_s < steps[2].step_s
    assert steps[0].memory.peak < steps[1].memory.peak < steps[2].memory.peak
    share_N = Unevenness(busiest_load=2.0).share_N(4)
    assert share_N[0] == 0.5 and share_N.sum() == pytest.approx(1)
    events = {rank: steps[2].timeline.events(rank) for rank in (0, 1)}
    experts = {rank: sum(e.end_s - e.start_s for e in found if e.name == "experts") for rank, found in events.items()}
    assert 1.5 < experts[0] / experts[1] < 3  # twice the mean, and two thirds of it; small products and launches shrink less


@pytest.mark.parametrize(
    ("instruction", "to_experts"),
    [
        (Instruction("F", Kind.START, "dispatch", 0, op=Op.TOKENS), True),
        (Instruction("F", Kind.START, "combine", 0, op=Op.TOKENS), False),
        (Instruction("B", Kind.START, "combine", 0, op=Op.TOKENS), True),  # gradients of what experts gave
        (Instruction("B", Kind.START, "dispatch", 0, op=Op.TOKENS), False),
    ],
)
def test_more_rows_go_to_the_busiest_rank_and_as_many_come_back(instruction: Instruction, to_experts: bool) -> None:
    sent_NN = matrix_of(Sizes(lambda instruction: 120.0), Unevenness(busiest_load=2.0))(instruction, (4, 5, 6, 7))
    assert sent_NN is not None
    got = sent_NN if to_experts else sent_NN.T
    assert np.allclose(got, [[60.0, 20.0, 20.0, 20.0]] * 4)
    assert matrix_of(Sizes(lambda instruction: 1.0), Unevenness())(replace(instruction, op=Op.COUNTS), (0, 1)) is None


@pytest.mark.parametrize(
    ("unevenness", "said"),
    [
        (Unevenness(slow_rank=8), "slow_rank=8"),
        (Unevenness(slow_factor=2.0), "belongs to no rank"),
        (Unevenness(slow_rank=0, slow_factor=0.0), "slow_factor=0"),
        (Unevenness(busiest_load=0.5), "busiest_load=0.5"),
        (Unevenness(busiest_load=5.0), "a group of 4 ranks"),
    ],
    ids=str,
)
def test_unevenness_that_cannot_be_is_refused(unevenness: Unevenness, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        simulated(replace(job_of(), unevenness=unevenness))
    with pytest.raises(ValueError, match=f"at most {MOST_RANKS}"):
        Unevenness(busiest_load=2.0).check(MOST_RANKS + 1)


def test_what_a_strategy_leaves_open_is_searched_as_the_trainer_would() -> None:
    given, packed, auto = (simulated(job_of(*words)) for words in (("strategy=eager",), ("strategy=lina",), ("strategy=auto",)))
    assert given.found and packed.found and auto.found
    first = plan_of(compose([*SMALL, "strategy=lina"]).strategy)
    assert packed.found.step_s <= min(
        candidate(packed.config, replace(first, packing=k), WORLD, vocab_size=VOCAB).found.step_s  # type: ignore[union-attr]
        for k in (1, 2, 4)
    )
    assert auto.found.step_s <= given.found.step_s


def test_a_job_that_does_not_fit_says_how_much_it_needs() -> None:
    job = job_of("cluster.hardware.memory_gib=4.1")
    row = row_of(3, {"a": "1"}, job, simulated(job))
    assert not row["fits"] and re.fullmatch(r"needs \d+\.\d GiB a rank of 0\.1", row["reason"]) and row["step_s"] is None


def test_sequences_per_rank_follow_the_ranks() -> None:
    config = compose([*SMALL, "parallel.tp=2"])
    assert weak_scaling(config, 8, 4).train.global_batch_size == 16 and weak_scaling(config, 8, 0) is config


def row(number: int, step_s: float | None, **swept: str) -> dict[str, Any]:
    exposed = dict.fromkeys(("a2a", "grads", "params", "other"), 0.001)
    return {
        "job": number, "swept": swept, "world": 8, "overrides": [], "strategy": swept.get("strategy"), "plan": "p", "fits": True,
        "memory_bytes": 2**30, "step_s": step_s, "mfu": 0.25, "exposed_s": exposed, "reason": None if step_s else "why not",
    }  # fmt: skip


ROWS = [
    *(row(i, (4 - i) / 100, strategy="eager", **{"cluster.nodes": str(2**i), "model": "a"}) for i in range(3)),
    *(row(3 + i, 0.02 / (i + 1), strategy="flow", **{"cluster.nodes": str(2**i), "model": "a"}) for i in range(3)),
    row(6, None, strategy="flow", **{"cluster.nodes": "8", "model": "a"}),
]  # fmt: skip


def test_ratios_are_to_eager_of_the_same_configuration() -> None:
    assert baselines(ROWS) == pytest.approx({0: 0.04, 1: 0.03, 2: 0.02, 3: 0.04, 4: 0.03, 5: 0.02})
    head, lines = cells(ROWS)
    ratio = head.index("as fast as eager")
    assert [line[ratio] for line in lines] == ["1.00x", "1.00x", "1.00x", "2.00x", "3.00x", "3.00x", ""]
    assert "model" not in head and lines[-1][-1] == "why not"
    assert "as fast as eager" not in cells(ROWS[3:])[0]


def test_the_figure_has_numbers_along_strategies_as_lines_and_nothing_for_no_times() -> None:
    assert axes_of(ROWS) == ("cluster.nodes", "strategy", [])
    figure = figure_of(ROWS)
    assert figure is not None and len(figure.axes) == 5
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [
        pytest.approx([40, 30, 20]),
        pytest.approx([20, 10, 20 / 3]),
    ]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "4"]
    assert figure_of(ROWS[6:]) is None and "why not" in page(ROWS[6:], None)


def test_rows_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for one in ROWS[:2]:
        append(path, one)
    path.write_text(path.read_text() + '{"job": 2, "sw')
    assert [r["job"] for r in read(path)] == [0, 1]
    path.write_text('{"job": 0}\nnot json\n{"job": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(path)
