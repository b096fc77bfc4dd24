"""tools/compare_strategies.py: what it refuses before a rank starts, what it runs, and one comparison from end to end."""

import gzip
import json
import os
from pathlib import Path

import pytest

from megalina.cli import compare as compare_strategies
from megalina.cli.compare import BAD_INPUT, Job, jobs_of, main, note, variants_of
from megalina.compare.ladder import EAGER_PIECES, EIGHT_RANKS, LADDER, PLAIN, STRATEGIES
from tests.train.small_run import write_tokens

TINY = (
    *("model=tiny", "parallel.ep=2", "model.num_layers=1", "data=indexed", "data.split='80,20'"),
    *("train.seq_len=16", "train.global_batch_size=8", "train.micro_batch_size=4"),
)
BASE = "--nodes 1 --ranks-per-node 2 --strategies flow model=tiny train.micro_batch_size=4"


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, so that clusters of several nodes are looked at; and nothing may run."""

    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("megalina.namespaces.shutil.which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(compare_strategies, "run", started)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--nodes 1 --ranks-per-node 4 --link-mbit 100",
            "--link-mbit 100: one node has no link; leave it out",
        ),
        ("--only 4x1", "--only 4x1 chooses from a suite: give --suite ladder too"),
        ("--suite ladder --only 4x1,5x1", "--only 4x1,5x1: the ladder has 4x1 light, 4x1 heavy, 4x2 light, 4x2 heavy"),
        ("--strategies flwo", "strategy=flwo: there is no such file in conf/strategy (did you mean flow?)"),
        ("--strategies lina_zero parallel.zero=0", "strategy=lina_zero moves ZeRO-1's all-gathers and needs parallel.zero=1"),
        (f"{BASE} strategy.chunks=100000", "100000 chunks of 512 tokens a part are too many: lower it"),
        (f"{BASE} strategy.parts=-1", "strategy.parts=-1 must be at least 1"),
        (f"{BASE} strategy.late_layers=-1", "strategy.late_layers=-1 must be at least 0"),
        (f"{BASE} cluster.experts_ms=nan", "cluster.experts_ms=nan must be a finite number"),
        (f"{BASE} cluster.attention_ms=1", "cluster.attention_ms (1) and cluster.experts_ms (0) go together: give both"),
        (f"{BASE} model.no_such=1", "there is no setting model.no_such"),
        ("--json /no/such/folder/x.json", "/no/such/folder/x.json: there is no folder /no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    no_ranks: None, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    words = arguments.split() if "--strategies" in arguments else ["--strategies", "flow", *arguments.split()]
    assert main(words) == BAD_INPUT
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)


def test_several_nodes_without_root_are_refused_in_one_line(
    no_ranks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["--nodes", "2", "--strategies", "flow"]) == BAD_INPUT
    assert capsys.readouterr().err == "a cluster of network namespaces needs root: run it with sudo\n"


def jobs(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Job]:
    """What would run."""
    found: list[Job] = []

    def parsed(args: object) -> list[Job]:
        found.extend(jobs_of(args))  # type: ignore[arg-type]
        raise ValueError("enough")

    monkeypatch.setattr(compare_strategies, "jobs_of", parsed)
    assert main(list(arguments)) == BAD_INPUT
    return found


def test_the_suite_is_the_ladder_and_eager_runs_in_all_sizes(no_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = jobs(monkeypatch, "--suite", "ladder", "--strategies", "eager")
    assert [job.setting for job in found] == list(LADDER)
    for job in found:
        strategies = [config.strategy for config in job.configs.values()]
        assert [(s.name, int(s.partition_bytes)) for s in strategies] == [("eager", size) for size in EAGER_PIECES]
        assert {c.launch.ranks for c in job.configs.values()} == {job.setting.world}
        factor = EIGHT_RANKS if job.setting.world == 8 else 1  # in slow motion
        assert (pytest.approx(job.link_mbit * factor), note(job)) == (500, "emulated: devices and links of 500 Mbit/s")
        assert {(c.cluster.attention_ms, c.cluster.experts_ms) for c in job.configs.values()} == {(10 * factor, 14 * factor)}


def test_slow_motion_slows_links_and_devices_alike(no_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = ["cluster.device_gflops=10", "cluster.kernel_floor_ms=0.5"]
    (job,) = jobs(monkeypatch, "--slow-motion", "4", "--link-mbit", "50", "--strategies", "flow", *device)
    (cluster,) = {(c.cluster.device_gflops, c.cluster.kernel_floor_ms) for c in job.configs.values()}
    assert (job.setting.slow_motion, job.link_mbit, cluster) == (4, 12.5, (2.5, 2.0))
    (plain,) = jobs(monkeypatch, "--suite", "ladder", "--only", "4x2 light", "--strategies", "flow", "--slow-motion", "1")
    assert (plain.link_mbit, plain.configs["flow"].cluster.attention_ms) == (500, 10)


@pytest.mark.full
def test_every_strategy_runs_unless_some_are_named(no_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs(monkeypatch, "--suite", "ladder", "--only", "4x2 heavy")
    assert {config.strategy.name for config in job.configs.values()} == set(STRATEGIES) - {"flow_packed", PLAIN}
    assert job.configs[PLAIN].parallel.reduce == "flat" and PLAIN not in LADDER[0].strategies  # one rank a node: it is eager
    assert {n for n, c in job.configs.items() if c.strategy.packing == "auto"} == {"lina", "auto"}
    assert [n for n, c in job.configs.items() if c.parallel.zero] == ["lina_zero"]
    assert {c.train.seed for c in job.configs.values()} == {1234}  # the same weights and batches


def test_a_setting_of_ones_own_has_eager_too(no_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs(monkeypatch, "--nodes", "2", "--ranks-per-node", "2", "--link-mbit", "50", "--strategies", "flow", "model=tiny")
    assert list(job.configs) == ["eager whole", "eager 512 KiB", "eager 1024 KiB", "flow"]
    assert (job.setting.world, job.configs["flow"].parallel.ep, job.link_mbit) == (4, 4, 50)
    assert note(job) == "emulated: links of 50 Mbit/s"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("", "nothing is emulated: ranks share this machine"),
        ("cluster.device_gflops=10", "emulated: devices"),
        ("cluster.attention_ms=1 cluster.experts_ms=2", "emulated: devices"),
    ],
)
def test_on_one_node_the_figures_say_what_is_emulated(
    no_ranks: None, monkeypatch: pytest.MonkeyPatch, overrides: str, said: str
) -> None:
    (job,) = jobs(monkeypatch, *BASE.split(), *overrides.split())
    assert (job.link_mbit, note(job)) == (0, said)


def test_variants_are_contestants_with_overrides_of_their_own(no_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--variant", "packed:strategy=flow,strategy.packing=2", "--variant", "late:strategy=flow,strategy.late_layers=2")
    (job,) = jobs(monkeypatch, "--suite", "ladder", "--only", "4x1 light", *flags)
    assert list(job.configs) == ["eager whole", "eager 512 KiB", "eager 1024 KiB", "packed", "late"]
    assert (job.configs["packed"].strategy.packing, job.configs["late"].strategy.late_layers) == ("2", 2)
    for bad in ("packed", "packed:", ":strategy=flow", "packed:flow"):
        with pytest.raises(ValueError, match=f"--variant {bad} must be NAME:OVERRIDE,OVERRIDE"):
            variants_of([bad])


@pytest.mark.full
def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks on one node, with devices: every file, and numbers that fit together."""
    write_tokens(tmp_path / "tokens")
    files = {name: tmp_path / f"found.{name}" for name in ("json", "svg", "md", "png")}
    code = main(
        [
            *("--nodes", "1", "--ranks-per-node", "2", "--strategies", "flow,ddp", "--rounds", "1", "--steps", "2"),
            *("--json", str(files["json"]), "--plot", str(files["svg"]), "--markdown", str(files["md"])),
            *("--picture", str(files["png"]), "--trace", str(tmp_path / "trace.json.gz")),
            *TINY, f"data.prefix={tmp_path / 'tokens'}", f"data.cache_dir={tmp_path / 'cache'}",
            *("cluster.attention_ms=5", "cluster.experts_ms=5", "--slow-motion", "2", "--slowdowns", str(tmp_path / "cdf.svg")),
        ]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads(files["json"].read_text())
    assert result.keys() >= {"settings", "mean_auto_ratio", "mean_best_ratio"}
    (setting,) = result["settings"]
    assert setting.keys() >= {"name", "lower_bound_s", "overrun_fraction", "strategies"}
    strategies = setting["strategies"]
    assert set(strategies) == {"eager", "eager whole", "eager 512 KiB", "eager 1024 KiB", "flow", "ddp"}
    for m in strategies.values():
        assert m["median_step_s"] * m["ratio_to_eager"] == pytest.approx(strategies["eager"]["median_step_s"])
        assert len(m["step_s"]) == 2 and len(m["ratio_spread"]) == 2
        assert m["largest_loss_difference"] < 1e-5
        assert 0.030 < setting["lower_bound_s"] <= m["device_s"] < m["median_step_s"]  # 3 x (5 + 5) ms, and floors
        assert {"a2a_exposed_s", "grads_exposed_s", "a2a_slowdown_median"} <= m.keys()
    assert result["mean_auto_ratio"] is None
    assert result["mean_best_ratio"] == max(m["ratio_to_eager"] for m in strategies.values())
    assert files["md"].read_text() == out
    assert "**1x2**" in out and "(emulated: devices)" in out
    assert "in slow motion" in out and setting["slow_motion"] == 2
    assert (tmp_path / "cdf.svg").exists()
    assert "<!-- 1x2" in files["svg"].read_text()
    assert files["png"].read_bytes()[1:4] == b"PNG"
    lines = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    steps = {line["name"]: line["ts"] for line in lines if line.get("name", "").startswith("step ")}
    assert steps.keys() == {"step 1", "step 2"} and 0 <= steps["step 1"] < steps["step 2"] < 2e6  # eager, then flow, in us
    assert {line["pid"] for line in lines} == {0, 1}
