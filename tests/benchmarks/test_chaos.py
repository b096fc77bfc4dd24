"""Chaos: the plan of kills, what counts as a problem, and what counts as equal to the last bit."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.chaos_plan import (
    INTERVAL,
    End,
    Kill,
    compare,
    draw,
    last_step,
    problems,
    rows_of,
    saving_step,
    shortages,
    steps_of,
    summary,
    table,
)
from megalina.checkpoint.checkpoints import Checkpoints
from megalina.comm.slice import Slice
from megalina.mesh import build_mesh

ROOT = Path(__file__).resolve().parent.parent.parent
OF_RANK = Kill("running", "rank 1", "SIGKILL", after_steps=3, fraction=0.5, async_save=False, relaunch=False)
OF_LAUNCHER = replace(OF_RANK, target="launcher")
ASKED = replace(OF_RANK, target="launcher", how="SIGTERM")
BLAMED = "rank 1 of 2 was ended by SIGKILL (out of memory?); the job was ended"
# The end of a kill of rank 1 as it should be: killed at step 13, the newest checkpoint of step 10.
GOOD = End(step=13, trained=True, inside_save=False, saved_step=10, returncode=1, said=BLAMED, gone_s=1.2, leftovers=0)


def as_planned(kill: Kill) -> End:
    """The end that the plan hopes for."""
    return replace(GOOD, inside_save=kill.moment == "save", trained=kill.moment != "startup")


def test_a_run_that_goes_by_plan_has_enough_kills_of_each_kind() -> None:
    for kills in range(1, 41):
        for seed in range(20):
            plan = draw(kills, seed)
            assert len(plan) == kills, (kills, seed)
            assert shortages(plan, [as_planned(kill) for kill in plan]) == [], (kills, seed)


def test_a_plan_of_twenty_kills_has_all_that_it_promises() -> None:
    for seed in range(50):
        plan = draw(20, seed)
        assert [kill.async_save for kill in plan] == [False] * 10 + [True] * 10
        inside = [kill for kill in plan if kill.moment == "save"]
        assert len(inside) >= 5 and sum(kill.async_save for kill in inside) >= 2
        assert sum(kill.target == "launcher" and kill.how == "SIGKILL" for kill in plan) >= 3
        assert {kill.how for kill in plan} == {"SIGKILL", "SIGTERM", "SIGINT"}
        lost = [kill for kill in plan if kill.target in ("rank 0", "rank 1") and kill.how == "SIGKILL"]
        assert len(lost) >= 9 and sum(kill.relaunch for kill in lost) >= 2
        assert not any(kill.relaunch for kill in plan if kill not in lost)
        assert all(kill.moment == "running" for kill in plan if kill.graceful)  # the others can't be told apart afterwards


def test_the_seed_alone_decides_the_plan() -> None:
    assert draw(20, 3) == draw(20, 3)
    assert len({tuple(draw(20, seed)) for seed in range(20)}) == 20


def test_the_run_is_longer_than_the_way_to_its_last_kill() -> None:
    for seed in range(50):
        plan = draw(20, seed)
        step = 0
        for kill in plan:  # no kill costs a step, and each save is met one interval late
            step += kill.after_steps + 1
            step += -step % INTERVAL + INTERVAL if kill.moment == "save" else 0
        assert step < steps_of(plan)


@pytest.mark.parametrize(
    "kill, end",
    [
        (OF_RANK, GOOD),
        (OF_RANK, replace(GOOD, step=15)),  # logged, and killed inside its save
        (replace(OF_RANK, async_save=True), replace(GOOD, step=20)),
        (replace(OF_RANK, target="all ranks"), GOOD),
        (replace(OF_RANK, relaunch=True), replace(GOOD, returncode=None)),
        (OF_LAUNCHER, replace(GOOD, returncode=-9, said="")),
        (ASKED, replace(GOOD, saved_step=13, returncode=143)),
        (replace(ASKED, how="SIGINT"), replace(GOOD, saved_step=13, returncode=130)),
        (replace(ASKED, target="rank 1"), replace(GOOD, saved_step=13, returncode=0)),
        (ASKED, replace(GOOD, trained=False, returncode=-15)),  # in the start-up: nothing to save
    ],
)  # fmt: skip
def test_an_end_as_it_should_be_has_no_problem(kill: Kill, end: End) -> None:
    assert problems(kill, end) == []


@pytest.mark.parametrize(
    "kill, end, said",
    [
        (OF_RANK, replace(GOOD, leftovers=1), "1 processes were left"),
        (OF_LAUNCHER, replace(GOOD, returncode=-9, leftovers=2, gone_s=10.0), "2 processes were left after 10 s"),
        (OF_RANK, replace(GOOD, step=16), "6 steps lost, at most 5 allowed"),
        (replace(OF_RANK, async_save=True), replace(GOOD, step=21), "11 steps lost, at most 10 allowed"),
        (ASKED, replace(GOOD, returncode=143), "3 steps lost, at most 0 allowed"),
        (ASKED, replace(GOOD, saved_step=13, returncode=1), "exit code 1 after SIGTERM, 143 expected"),
        (OF_RANK, replace(GOOD, said=BLAMED.replace("rank 1", "rank 0")), "it doesn't say that rank 1 was killed"),
        (OF_RANK, replace(GOOD, returncode=0), "exit code 0"),
        (OF_LAUNCHER, GOOD, "the launcher ended with 1"),
        (replace(OF_RANK, relaunch=True), GOOD, "in place of starting the ranks again"),
    ],
)  # fmt: skip
def test_an_end_that_is_not_as_it_should_be_is_named(kill: Kill, end: End, said: str) -> None:
    (problem,) = problems(kill, end)
    assert said in problem


def test_too_few_kills_of_a_kind_are_named() -> None:
    plan = draw(20, 0)
    ends = [as_planned(kill) for kill in plan]
    missed = [replace(end, inside_save=False) for end in ends]
    assert shortages(plan, missed) == [
        "0 kills inside a save, at least 5 wanted",
        "0 kills inside an asynchronous save, at least 2 wanted",
    ]
    anew = [replace(end, saved_step=0) for end in ends]
    assert shortages(plan, anew) == ["0 kills with a checkpoint to go on from, at least 10 wanted"]
    assert "10 kills, at least 20 wanted" in shortages(plan, ends[:10])


def test_rows_and_totals_tell_the_same_story() -> None:
    plan = draw(20, 0)
    ends = [as_planned(kill) for kill in plan]
    totals = summary(plan, ends, [2.0] * 20)
    rows = totals["rows"]
    moments = Counter(row["moment"] for row in rows)
    assert moments["inside a save"] == totals["inside_save"] == sum(kill.moment == "save" for kill in plan)
    assert sum(row["lost_steps"] for row in rows) == totals["lost_steps"] == 3 * sum(k.moment != "startup" for k in plan)
    assert totals["lost_s"] == 40.0
    lines = table(rows).splitlines()
    assert len(lines) == 21 and lines[0].split() == list(rows[0]) and "rank 1" in table(rows)
    assert [row["lost_s"] for row in rows_of(plan, ends[:3], [2.0, 3.0])] == [2.0, 3.0, None]  # given up after the third


def write(
    folder: Path,
    name: str,
    weight: torch.Tensor,
    *,
    tokens: int = 90,
    loss: float = 5.0,
    routing: str = "f0",
    losses: Sequence[float] = (5.0,),
) -> Path:
    """A run folder with a checkpoint of step 2 and the records of two steps."""
    run = folder / name
    checkpoints = Checkpoints(run / "checkpoints", build_mesh(tp=1, ep=1), keep_last=1, keep_every=0, asynchronous=False)
    state = {"model/weight": Slice(weight, {}), "exp_avg/weight": Slice(torch.zeros(4), {})}
    checkpoints.save(2, state, {"step": 2, "tokens": tokens, "losses": list(losses), "config": {"run": {"dir": name}}})
    write_lines(run / "metrics.jsonl", {"step": 1, "loss": 6.0, "step_s": 0.1}, {"step": 2, "loss": loss, "step_s": len(name)})
    digests = {"samples": [0, 4], "tokens": "1", "random": "2", "loss_hex": "0x1p+2", "grad_norm_hex": "0x1p+0", "updated": True}
    write_lines(run / "ledger.jsonl", *({"step": i, "routing": [of], **digests} for i, of in ((1, "0a"), (2, routing))))
    return run


def write_lines(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


WEIGHT = torch.tensor([1.0, 0.0, float("nan"), -3.5])


def test_runs_that_differ_in_settings_alone_are_equal(tmp_path: Path) -> None:
    found = compare(write(tmp_path, "a", WEIGHT), write(tmp_path, "b", WEIGHT.clone()), 2)
    assert (found["equal"], found["different"], found["different_steps"]) == (True, [], [])
    assert [Path(path).is_dir() for path in found["final"]] == [True, True]


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([1.0, -0.0, float("nan"), -3.5]),
        torch.tensor([1.0 + 2**-23, 0.0, float("nan"), -3.5]),
        WEIGHT.double(),
        WEIGHT.view(2, 2),
        WEIGHT[:3],
    ],
    ids=["sign of zero", "last bit", "type", "shape", "length"],
)
def test_one_bit_is_a_difference(tmp_path: Path, weight: torch.Tensor) -> None:
    found = compare(write(tmp_path, "a", WEIGHT), write(tmp_path, "b", weight), 2)
    assert (found["equal"], found["different"]) == (False, ["model/weight"])


def test_counters_losses_and_routing_are_compared_too(tmp_path: Path) -> None:
    one = write(tmp_path, "a", WEIGHT)
    assert compare(one, write(tmp_path, "tokens", WEIGHT, tokens=91), 2)["different"] == ["tokens"]
    assert compare(one, write(tmp_path, "loss", WEIGHT, loss=5.000000000000001), 2)["different_steps"] == [2]
    assert compare(one, write(tmp_path, "routing", WEIGHT, routing="f1"), 2)["different_steps"] == [2]


def test_runs_in_several_layouts_may_differ_by_rounding_and_by_nothing_else(tmp_path: Path) -> None:
    def found(name: str, weight: torch.Tensor, **records: Any) -> dict[str, Any]:
        return compare(write(tmp_path, name, weight, **records), one, 2, moved=True)

    exact = torch.tensor([1.0, 0.5, -3.5, 2.0], dtype=torch.float64)
    one = write(tmp_path, "one", exact)
    near = found("near", exact * (1 + 1e-13), loss=5.0 * (1 + 1e-14))
    assert (near["equal"], near["different_steps"]) == (True, [])
    assert found("weight", exact * (1 + 1e-8))["different"] == ["model/weight"]
    assert found("loss", exact, loss=5.0 * (1 + 1e-10))["different_steps"] == [2]
    assert found("tokens", exact, tokens=91)["different"] == ["tokens"]
    assert found("near loss", exact, losses=[5.0 * (1 + 1e-14)])["equal"]
    assert found("other loss", exact, losses=[5.0 * (1 + 1e-10)])["different"] == ["losses"]
    assert found("routing", exact, routing="f1")["different_steps"] == [2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_a_step_must_be_recorded_once(tmp_path: Path, name: str) -> None:
    one, two = write(tmp_path, "a", WEIGHT), write(tmp_path, "b", WEIGHT)
    lines = (two / name).read_text().splitlines(keepends=True)
    (two / name).write_text("".join([*lines, lines[1]]))
    assert compare(one, two, 2)["different_steps"] == [2]
    (two / name).write_text(lines[1])
    assert compare(one, two, 2)["different_steps"] == [1]
    (two / name).unlink()
    found = compare(one, two, 2)
    assert name in found["different_steps"][0] and found["equal"]


def test_a_run_without_the_final_checkpoint_is_not_equal(tmp_path: Path) -> None:
    found = compare(write(tmp_path, "a", WEIGHT), write(tmp_path, "b", WEIGHT), 3)
    assert found["equal"] is False and "step_00000003" in found["different"][0]


def test_a_save_is_told_from_the_removal_of_an_older_checkpoint(tmp_path: Path) -> None:
    assert saving_step(tmp_path) is None
    for name in ("step_00000005", "step_00000010"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saving_step(tmp_path) is None
    (tmp_path / "checkpoints" / ".step_00000000.partial").mkdir()
    (tmp_path / "checkpoints" / ".step_00000005.partial").mkdir()
    assert saving_step(tmp_path) is None
    (tmp_path / "checkpoints" / ".step_00000015.partial").mkdir()
    assert saving_step(tmp_path) == 15
    (tmp_path / "checkpoints" / ".step_00000015.partial").rename(tmp_path / "checkpoints" / "step_00000015")
    assert saving_step(tmp_path) is None


def test_a_line_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert last_step(tmp_path) == 0
    path.write_text('{"step": 1}\n{"step": 2, "more": "' + "x" * 40000 + '"}\n{"step": 3, "lo')
    assert last_step(tmp_path) == 2


@pytest.mark.full
@pytest.mark.parametrize("layouts", [["ep"], ["zb_h1"], ["1f1b", "zbv"]], ids=" ".join)
def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path: Path, layouts: list[str]) -> None:
    """The benchmark itself, with one kill: of the launcher inside a save."""
    command = [
        sys.executable,
        ROOT / "benchmarks" / "chaos.py",
        "--kills",
        "1",
        "--layouts",
        *layouts,
        "--dir",
        tmp_path / "runs",
        "--json",
        tmp_path / "found",
    ]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert (found["kills"], found["equal"], found["wrong"], found["leftover_processes"]) == (1, True, [], 0)
    assert found["rows"][0]["moment"] == "inside a save" and found["lost_steps"] <= INTERVAL
    assert all(Path(path, "values.json").is_file() for path in found["final"])
    assert not any(f"{tmp_path}" in line for line in running_commands())


def running_commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found
