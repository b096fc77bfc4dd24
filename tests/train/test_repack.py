"""Packing switched in the middle of a run changes no number: not the losses, not the weights, not a bit of what is moved."""

import gc
import hashlib
import os
import re
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalina.checkpoint.stored import read_tensors
from megalina.config import PretrainConfig, StrategyConfig
from megalina.parallel import reshard
from megalina.parallel.plan_file import with_plan
from megalina.plan_settings import plan_of
from megalina.rank_pool import RanksFailed
from megalina.step.plan import Plan
from megalina.train.replay import replay
from megalina.train.trainer import Trainer
from tests.in_groups import InGroups
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import Recorder, checkpoint, config_of, records_of, same_checkpoints, start, write_tokens
from tests.train.test_trainer import _process_state  # noqa: F401  handlers of signals come back

WORLD = 4
STEPS, SWITCHES = 6, {1: 2, 2: 4, 4: 1, 5: 2}  # after this step: this packing
DECIDED = 190  # steps in which auto among all strategies has tried plans and measured the lists of its searches
AUTO = {"steps": 20, "eval_interval": 8, "interval": 18}
LINA = {"name": "lina", "yields": True, "partition_bytes": "32768", "chunks": "2"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings, strategy
    "plain": ({"clip_norm": 0.1, "kind": "sigmoid", "bias_update_rate": 0.01}, LINA),
    "zero": ({"zero": 1, "clip_norm": 0.1, "recompute": "selective"}, LINA | {"partition_bytes": "16384"}),
    "weights gathered late": ({"zero": 1, "micro_batch_size": 2}, {"name": "lina_zero", "parts": 2, "yields": True}),
    "balance over all ranks": ({"group": "global", "recompute": "full", "shared_d_ff": 16}, {"name": "flow", "packing": "auto"}),
}
FULL = ("zero", "weights gathered late", "balance over all ranks", "auto", "resumed", "all")  # of `make test-full`
OnRanks = Mapping[str, list[dict[str, Any]]]


def packed_config(folder: Path, run: str, strategy: dict[str, Any], **settings: Any) -> PretrainConfig:
    """Four experts on four ranks, in float64; packing as `strategy` says, or auto."""
    config = config_of(folder, run, **{"ep": WORLD, "dtype": "float64", "steps": STEPS, **settings})
    config.strategy = StrategyConfig(**{"packing": "auto", **strategy})
    return config


def losses_of(run: Trainer, switches: dict[int, int]) -> list[tuple[float, float]]:
    """Loss and norm of each step; the packing changes as `switches` says."""
    seen = []
    for step in range(run.state.step + 1, STEPS + 1):
        verdict, _ = run.runner.compute(step)
        seen.append((verdict.loss, verdict.grad_norm))
        if step in switches:
            run.runner.repack(switches[step])
    return seen


def scenarios(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    gc.freeze()  # each repack collects garbage: not through all that torch has made
    others = {
        "bits": moved_bits,
        "memory": memory_of_many,
        "auto": chosen,
        "resumed": resumed,
        "all": chosen_of_all,
    }
    return {name: switched(folder, name, *CASES[name]) if name in CASES else others[name](folder) for name in names}


def switched(folder: Path, name: str, settings: dict[str, Any], strategy: dict[str, Any]) -> dict[str, Any]:
    """The same run with and without switches: losses, validation and checkpoints."""
    runs = {}
    for kind, switches in (("plain", {}), ("packed", SWITCHES)):
        run = start(packed_config(folder, f"{name} {kind}", strategy, **settings))
        seen = losses_of(run, switches)
        val_loss = run.validate()
        run.state.save()
        runs[kind] = {
            "seen": seen,
            "val_loss": val_loss,
            "shape": run.built.mesh.shape,
            "axes": {e.axis for e in run.runner.log.entries()},
        }
    return runs


def moved_bits(folder: Path) -> dict[str, bool]:
    """bfloat16, master weights, ZeRO-1: after a round through all packings every tensor has its bits."""
    run = start(packed_config(folder, "bits", LINA, dtype="bfloat16", zero=1, kind="sigmoid", bias_update_rate=0.01))
    run.runner.compute(1)
    before = {name: [part.local.clone() for part in parts] for name, parts in run.state.tensors().items()}
    run.built.trainable.adopt(Plan("eager", piece_bytes=1024))
    sent_bytes = [run.runner.repack(k) for k in (2, 4, 2, 1)]
    after = run.state.tensors()
    run.runner.repack(4)
    plan = run.built.trainable.plan == Plan("eager", piece_bytes=1024, packing=4)
    run.runner.repack(1)
    kinds = {name.split("/")[0] for name in before}
    same = all(torch.equal(a, b.local) for name in before for a, b in zip(before[name], after[name], strict=True))
    counts = run.built.optimizer.step_count == 1
    try:
        run.runner.repack(3)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "same": same,
        "all kinds": kinds >= {"exp_avg", "exp_avg_sq", "master", "model"},
        "sent": all(sent_bytes[:2]) and run.runner.repack(1) == 0,
        "counts": counts,
        "plan": plan,
        "refused": refused == "there are groups for packing 1, 2, 4, not for 3: set strategy.packing=auto or 3",
    }


def memory_of_many(folder: Path) -> dict[str, Any]:
    """What was moved out of is gone, with the threads of its lanes."""
    run = start(packed_config(folder, "memory", LINA))
    run.runner.compute(1)
    run.validate()
    before = lanes()
    gone = []
    for step, k in enumerate((2, 4, 1, 2, 1), start=2):
        model = weakref.ref(run.built.trainable.gpt)
        run.runner.repack(k)
        gone.append(model() is None)
        run.runner.compute(step)
        run.validate()
    gc.collect()
    return {"gone": all(gone), "lanes": lanes() - before}


def lanes() -> Counter[str]:
    """This process' threads of lanes, by axis."""
    return Counter(t.name.partition("/")[0] for t in threading.enumerate() if t.name.startswith("lane"))


def chosen(folder: Path) -> dict[str, Any]:
    """The loop of a run under auto: made-up times, other ones on each rank, lead to packing 2 and stay there."""
    times_s = {1: 1.0, 2: 0.6, 4: 0.8}
    config = packed_config(folder, "auto", LINA, **AUTO)
    run = start(config)
    adapt = run.runner.adapt
    run.runner.adapt = lambda step_s: adapt(times_s[run.built.mesh.packing] * (1 + 0.01 * dist.get_rank()))  # type: ignore[method-assign]
    run.loop()
    assert isinstance(run.tracker, Recorder)
    calm = records_of(packed_config(folder, "calm", {**LINA, "packing": "1"}, **AUTO))
    packings, losses = run.tracker.of("packing"), run.tracker.of("loss")
    values = [r["val_loss"] for r in run.tracker.records if "val_loss" in r]
    calm_values = [r["val_loss"] for r in calm.records if "val_loss" in r]
    return {"packings": packings, "losses": losses, "calm": calm.of("loss"), "val": values, "calm val": calm_values}


def resumed(folder: Path) -> dict[str, Any]:
    """Run "auto" goes on from step 16, where it had chosen, and its steps are replayed from where it was saved."""
    config = packed_config(folder, "auto", LINA, **AUTO)
    run = start(config, checkpoint(config, 18))
    packing, searching = run.built.mesh.packing, run.runner.searching
    run.loop()
    assert isinstance(run.tracker, Recorder)
    other = start(packed_config(folder, "fixed", {**LINA, "packing": "2"}, **AUTO), checkpoint(config, 18))
    fixed = losses_of_rest(other)
    verified = start(packed_config(folder, "auto", LINA, **AUTO))
    replay(verified.runner, checkpoint(config, 20), checkpoint(config, 18))
    mixed = start(packed_config(folder, "plain packed again", *CASES["plain"][1:], **CASES["plain"][0]))
    replay(mixed.runner, checkpoint(packed_config(folder, "plain packed", {}), STEPS), None)
    return {
        "packing": packing,
        "searching": searching,
        "losses": run.tracker.of("loss"),
        "fixed": fixed,
        "fixed packing": other.built.mesh.packing,
        "verified": (verified.state.step, verified.built.mesh.packing, mixed.state.step, mixed.built.mesh.packing),
    }


def chosen_of_all(folder: Path) -> dict[str, Any]:
    """strategy=auto where flow with packing 2 is fastest, by made-up times, until a list is searched; then the run is resumed."""
    settings = {"steps": DECIDED + 10, "micro_batch_size": 2, "eval_interval": 0, "interval": DECIDED}
    config = packed_config(folder, "all", {"name": "auto", "search_evaluations": 200}, **settings)
    run = start(config)
    adapt = run.runner.adapt

    def made_up(_: float) -> None:
        plan = run.built.trainable.plan
        adapt({"eager": 1.0, "lina": 0.8, "lancet": 0.75, "flow": 0.7}[plan.strategy] * (0.9 if plan.packing == 2 else 1.0))

    run.runner.adapt = made_up  # type: ignore[method-assign]
    run.loop()
    assert isinstance(run.tracker, Recorder)
    again = start(config, checkpoint(config, DECIDED))
    calm = records_of(packed_config(folder, "all calm", {"name": "eager", "packing": "1"}, **settings))
    found = config_of_plan(config, Path(config.run.dir) / "plan.json")
    return {
        "plan file": str(found),
        "plans": run.tracker.of("plan"),
        "losses": run.tracker.of("loss"),
        "again": (str(again.built.trainable.plan), again.runner.undecided, losses_of_rest(again)),
        "calm": calm.of("loss"),
    }


def config_of_plan(config: PretrainConfig, path: Path) -> Plan:
    """What a run begins with that is given the file."""
    strategy = with_plan(replace(config, strategy=replace(config.strategy, plan=str(path))), WORLD).strategy
    return plan_of(strategy, packing=int(strategy.packing))


def losses_of_rest(run: Trainer) -> list[float]:
    return [run.runner.compute(step)[0].loss for step in range(run.state.step + 1, run.config.train.steps + 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repack")
    write_tokens(path / "tokens")
    return path


@pytest.fixture(scope="module")
def on_ranks(folder: Path) -> OnRanks:
    """What each scenario gave on each rank."""

    def made(names: Sequence[str]) -> OnRanks:
        ranks = run_on_ranks(WORLD, scenarios, folder, names)
        return {name: [rank[name] for rank in ranks] for name in names}

    return InGroups([("plain", "bits", "memory"), FULL], made)


every_case = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n in FULL)) for n in CASES])


@pytest.mark.full
@every_case
def test_losses_norms_and_validation_are_those_of_the_unpacked_run(on_ranks: OnRanks, name: str) -> None:
    for rank in on_ranks[name]:
        plain, packed = rank["plain"], rank["packed"]
        for expected, found in zip(plain["seen"], packed["seen"], strict=True):
            assert found == pytest.approx(expected, rel=1e-10)
        assert packed["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-10)
        assert (plain["shape"]["ep"], packed["shape"]["ep"]) == (4, 2)
        assert len({loss for loss, _ in plain["seen"]}) == STEPS  # it learns
        assert "ep" in plain["axes"] and "ep/2" in packed["axes"]  # the hang doctor sees the new groups


@every_case
def test_weights_moments_and_biases_are_those_of_the_unpacked_run(folder: Path, on_ranks: OnRanks, name: str) -> None:
    assert on_ranks[name]
    paths = [checkpoint(packed_config(folder, f"{name} {kind}", {}), STEPS) for kind in ("plain", "packed")]
    plain, packed = map(read_tensors, paths)
    assert list(plain) == list(packed) and any("router.bias_E" in n for n in plain) == (name == "plain")
    for tensor_name, expected in plain.items():
        torch.testing.assert_close(packed[tensor_name], expected, rtol=1e-10, atol=1e-12, msg=tensor_name)


@pytest.mark.parametrize("name", ["plain", pytest.param("zero", marks=pytest.mark.full)])
def test_a_checkpoint_written_under_packing_loads_without_it(folder: Path, on_ranks: OnRanks, name: str) -> None:
    """In one process."""
    val_loss = on_ranks[name][0]["plain"]["val_loss"]
    packed = checkpoint(packed_config(folder, f"{name} packed", {}), STEPS)
    settings = CASES[name][0] | {"zero": 0, "ep": 1, "micro_batch_size": 2}
    run = start(packed_config(folder, f"{name} alone", {"name": "eager", "packing": "1"}, **settings), packed)
    assert run.validate() == pytest.approx(val_loss, rel=1e-10)
    run.state.save()
    alone = checkpoint(packed_config(folder, f"{name} alone", {}), STEPS)
    assert same_checkpoints(packed, alone) == []


def test_every_bit_comes_through_all_packings(on_ranks: OnRanks) -> None:
    assert all(all(rank.values()) for rank in on_ranks["bits"]), on_ranks["bits"]


def test_what_was_moved_out_of_is_gone(on_ranks: OnRanks) -> None:
    for rank in on_ranks["memory"]:
        assert rank["gone"] and rank["lanes"]["lane dp"] <= 1, rank  # one may begin late


@pytest.mark.full
def test_auto_tries_each_keeps_the_fastest_and_changes_no_number(on_ranks: OnRanks) -> None:
    for auto in on_ranks["auto"]:
        assert [k for k, _ in groupby(auto["packings"])] == [1, 2, 4, 1, 2] and auto["packings"][-4:] == [2] * 4
        assert auto["losses"] == pytest.approx(auto["calm"], rel=1e-10)
        assert len(auto["val"]) == 3 and auto["val"] == pytest.approx(auto["calm val"], rel=1e-10)


@pytest.mark.full
def test_a_resumed_run_is_packed_as_it_was_and_verifies(on_ranks: OnRanks) -> None:
    for auto, again in zip(on_ranks["auto"], on_ranks["resumed"], strict=True):
        assert (again["packing"], again["searching"], again["fixed packing"]) == (2, False, 2)
        assert again["losses"] == auto["losses"][18:] == again["fixed"]  # to the last bit
        assert again["verified"] == (20, 2, STEPS, 2)


@pytest.mark.full
def test_auto_among_all_strategies_changes_no_number_and_is_kept_by_a_checkpoint(on_ranks: OnRanks) -> None:
    for found in on_ranks["all"]:
        assert found["plans"] == on_ranks["all"][0]["plans"]
        tried = [plan for plan, _ in groupby(found["plans"]) if "order" not in plan]
        strategies = {plan.partition(":")[0] for plan in tried}
        assert strategies == {"eager", "lina", "lancet", "flow"} and found["plans"][0].startswith("eager")
        *_, chosen, other = tried  # by trials; what else the search of lists measures
        assert chosen.startswith("flow: 2 parts") and chosen.endswith("packing 2") and "deferred weights of all" in other
        assert "order" in found["plans"][-1] and "packing 2" in found["plans"][-1]
        assert found["losses"] == pytest.approx(found["calm"], rel=1e-10)
        # where weights' gradients go is part of the order, which needs no times any more
        assert found["plan file"] == re.sub("times of step [0-9]+, ", "", found["plans"][-1])
        assert found["again"] == (found["plans"][-1], False, found["losses"][DECIDED:])  # to the last bit


# a kill in the middle


def killed(folder: Path) -> None:
    """Rank 1 is killed while the tensors of rank 0 are on the wire."""
    config = packed_config(folder, "killed", LINA, ep=2, zero=1, steps=4)
    run = start(config)
    for step in (1, 2):
        run.runner.compute(step)
    run.state.save()
    run.runner.compute(3)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "before").write_text(digest_of(Path(config.run.dir)))
    dist.barrier()
    real = reshard.start_all_to_all

    def start_or_die(*arguments: Any) -> Any:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    reshard.start_all_to_all = start_or_die
    run.runner.repack(2)
    (folder / "survived").write_text("")


def digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "logs" not in p.parts):
        digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def test_a_kill_in_the_middle_touches_nothing_that_was_saved(folder: Path) -> None:
    with pytest.raises(RanksFailed):
        run_on_ranks(2, killed, folder)
    config = packed_config(folder, "killed", LINA, ep=1, steps=4)
    assert not (folder / "survived").exists()
    assert digest_of(Path(config.run.dir)) == (folder / "before").read_text()
    resumed_losses = losses_of_rest(start(config, checkpoint(config, 2)))
    whole = losses_of_rest(start(packed_config(folder, "whole", LINA, ep=1, steps=4)))
    assert resumed_losses == pytest.approx(whole[2:], rel=1e-10)
