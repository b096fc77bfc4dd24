"""A stage of a pipeline is killed at any moment: the run goes on in the same layout with the same bits, in another exactly."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import megalina
from megalina import worker
from megalina.checkpoint.stored import read_tensors
from megalina.collective_log import Position
from megalina.config import PretrainConfig
from megalina.launch import later_starts
from megalina.train.trainer import train
from tests.train.forked_ranks import Outcome, run_job
from tests.train.small_run import VOCABULARY, checkpoint, config_of, same_checkpoints, write_tokens

RUN: dict[str, Any] = {
    "num_layers": 4, "dense_layers_first": 1, "steps": 6, "interval": 2, "dtype": "float64", "micro_batch_size": 1, "zero": 1,
}  # fmt: skip
TWO, FOUR = {"pp": 2, "pp_layout": "Ett|ttL"}, {"pp": 2, "pp_chunks": 2, "pp_layout": "Et|t|t|tL"}
LAYOUTS: dict[str, dict[str, Any]] = {"ep": {"ep": 2}, "1f1b": TWO, "zb_h1": TWO, "zbv": FOUR, "dualpipev": FOUR}
KILLED_STEP = 4  # the checkpoint of step 2 is there
NEAR = 1e-12  # relative, of losses; of weights, which Adam's division moves, 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_tokens(path / "tokens")
    return path


Job = Callable[..., tuple[PretrainConfig, Outcome]]


@pytest.fixture
def job(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """`job(name, first, then, rank, tag)`: a run on two ranks in layout `first`, of which `rank` is killed where it comes to
    instruction `tag`, and which is started again in layout `then`.  Without `tag` nobody is killed."""

    def run(name: str, first: str, then: str = "", rank: int = 0, tag: str = "") -> tuple[PretrainConfig, Outcome]:
        configs = {layout: of_layout(folder, name, layout) for layout in (first, then) if layout}
        run_dir = Path(configs[first].run.dir)
        write(configs[first])
        next_start = later_starts(run_dir / "checkpoints", "none")

        def again() -> tuple[list[str], str]:
            write(configs[then])
            resume, origin = next_start()
            return [resume], origin

        restarts = 1 if tag else 0
        arguments = (run_dir, rank, tag)
        return configs[then or first], run_job(
            monkeypatch, capsys, run_dir, rank_of_job, *arguments, restarts=restarts, again=again
        )

    return run


def of_layout(folder: Path, name: str, layout: str) -> PretrainConfig:
    config = config_of(folder, name, **RUN, **LAYOUTS[layout])
    schedule = config.strategy.pipeline if layout == "ep" else layout
    return replace(config, strategy=replace(config.strategy, pipeline=schedule))


def write(config: PretrainConfig) -> None:
    (Path(config.run.dir) / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def rank_of_job(rank: int, resume: list[str], run_dir: Path, killed: int, tag: str) -> int:
    flag, enter = run_dir / "killed", Position.enter

    def entered(self: Position, now: str, waits: bool) -> None:
        enter(self, now, waits)
        if rank == killed and self.step == KILLED_STEP and now == tag and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Position.enter = entered  # type: ignore[method-assign]
    return worker.main([str(run_dir / "config.yaml"), *resume], train)


def records_of(config: PretrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


WHOLE = {"loss": NEAR, "aux_loss": NEAR, "z_loss": NEAR, "grad_norm": 1e-10}
CASES = [
    ("1f1b", "1f1b", 0, "F:stream>.2.1"),  # in the middle of a SEND
    ("1f1b", "ep", 1, "F:stream<.2.1"),  # waiting for it
    ("zb_h1", "zb_h1", 1, "W:experts.3.2"),
    ("zb_h1", "zbv", 0, "B:stream<.2.3"),
    ("zbv", "ep", 1, "B:experts.2.0"),
    ("ep", "dualpipev", 0, "B:experts.1.0"),
    ("dualpipev", "1f1b", 0, "U:verdict.-.0"),
    ("1f1b", "zb_h1", 1, "U:measured<.-.0"),
]


@pytest.mark.full
@pytest.mark.parametrize(("first", "then", "rank", "tag"), CASES)
def test_a_run_with_a_killed_stage_is_the_run_without(job: Job, folder: Path, first: str, then: str, rank: int, tag: str) -> None:
    config, outcome = job(f"{first}_{then}", first, then, rank, tag)
    assert outcome.error == ""
    assert f"rank {rank} of 2 was ended by SIGKILL (out of memory?) in step {KILLED_STEP}, instruction {tag}" in outcome.text
    assert "start 2 of 2, from checkpoint step_00000002" in outcome.text
    alone, whole_outcome = job(f"whole_{first}", first)
    assert whole_outcome.error == ""
    records, whole = records_of(config), records_of(alone)
    assert [r["step"] for r in records] == [r["step"] for r in whole] == list(range(1, 7))
    ends = checkpoint(config, 6), checkpoint(alone, 6)
    if first == then:
        assert same_checkpoints(*ends) == []
        assert all(r[key] == other[key] for r, other in zip(records, whole, strict=True) for key in WHOLE)
        return
    for key, tolerance in WHOLE.items():
        for own, other in zip(records, whole, strict=True):
            assert math.isclose(own[key], other[key], rel_tol=tolerance), (key, own["step"], own[key], other[key])
    found, wanted = (read_tensors(end) for end in ends)
    assert found.keys() == wanted.keys()
    for tensor, value in wanted.items():
        assert float((found[tensor] - value).abs().max()) <= 1e-10 * max(1e-3, float(value.abs().max())), tensor


@pytest.mark.full
def test_a_pipelines_checkpoint_is_read_by_whoever_evaluates_or_writes(job: Job) -> None:
    models = []
    for name in ("zbv", "ep"):
        config, outcome = job(f"read_{name}", name)
        assert outcome.error == ""
        models.append(megalina.open_checkpoint(checkpoint(config, 6), dtype=torch.float64))
    tokens = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    pipeline, plain = (model.logits(tokens) for model in models)
    torch.testing.assert_close(pipeline, plain, rtol=1e-6, atol=1e-6)
    assert models[0].generate([1, 2, 3], max_tokens=8) == models[1].generate([1, 2, 3], max_tokens=8)
