"""The plan of benchmarks/chaos.py and its verdict: which kills, what must come of each, and what must be equal at the end."""

import json
import math
import operator
import os
import random
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from megalina.checkpoint.files import read_values
from megalina.checkpoint.stored import read_tensors
from megalina.track.metrics import read_metrics
from megalina.train.ledger import difference

Record = Mapping[str, Any]

RANKS, INTERVAL = 2, 5  # of the run; steps between its checkpoints
LOSS_TOLERANCE, TOLERANCE = 1e-12, 1e-10  # relative, of runs in several layouts: of losses; of all else, which Adam magnifies
COUNTED, LOSSES = ("step", "consumed_samples", "tokens", "lr"), ("loss", "aux_loss", "z_loss")  # keys of metrics
OF_LAYOUTS = ("config", "arithmetic", "plan", "ledger", "ledger_saved_lines")  # values of checkpoints that several layouts have
ASKS = [("launcher", "SIGTERM"), ("rank 1", "SIGTERM"), ("launcher", "SIGINT")]  # to stop: all ranks save and end


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill as it is planned."""

    moment: str  # startup | running | save
    target: str  # rank 0 | rank 1 | all ranks | launcher
    how: str  # SIGKILL | SIGTERM | SIGINT
    after_steps: int  # so many steps are trained before (not in the start-up)
    fraction: float  # of the start-up, of a step or of a save, that goes by before it
    async_save: bool  # the run's checkpoint.async_save
    relaunch: bool  # the launcher has launch.restarts and goes on by itself

    @property
    def graceful(self) -> bool:
        return self.how != "SIGKILL"


@dataclass(frozen=True, slots=True)
class End:
    """What was seen after a kill."""

    step: int  # the last one in metrics.jsonl
    trained: bool  # this start of the ranks had logged a step of its own
    inside_save: bool
    saved_step: int  # of the newest complete checkpoint
    returncode: int | None  # None: the launcher still runs
    said: str  # by the launcher and rank 0
    gone_s: float  # until every process that was to end had ended
    leftovers: int  # processes that had not by then

    @property
    def lost_steps(self) -> int:
        return max(0, self.step - self.saved_step) if self.trained else 0


def draw(kills: int, seed: int) -> list[Kill]:
    """The plan: of N kills 40% inside a save, a few in the start-up, a fifth of the launcher, a fifth that ask to stop."""
    rng = random.Random(seed)
    plan = []
    for async_save in (False, True):
        count = kills - kills // 2 if not async_save else kills // 2
        saves, startups, asked = ceil(0.4 * count), count // 8, (count + 2) // 5
        moments = ["save"] * saves + ["startup"] * startups + ["running"] * (count - saves - startups)
        ways = [("launcher", "SIGKILL")] * ceil(0.2 * count) + [("all ranks", "SIGKILL")] * (count // 8)
        ways = (ways + [(f"rank {rng.randrange(RANKS)}", "SIGKILL") for _ in range(count)])[: count - asked]
        rng.shuffle(ways)
        # Who is asked to stop completes its save: only a step of the training is of interest.
        ways += [ASKS[(async_save * asked + i) % len(ASKS)] for i in range(asked)]
        half = []
        for moment, (target, how) in zip(moments, ways, strict=True):
            # A save is met after another one is complete, so that there is something to go on from.
            after = rng.randint(*(INTERVAL + 1, 2 * INTERVAL) if moment == "save" else (1, 2 * INTERVAL))
            half.append(Kill(moment, target, how, after, rng.random(), async_save, relaunch=False))
        rng.shuffle(half)
        plan += half
    lost = [kill.target.startswith("rank") and kill.how == "SIGKILL" and kill.moment != "startup" for kill in plan]
    of_ranks = [i for i in range(kills) if lost[i]]
    for i in rng.sample(of_ranks, len(of_ranks) // 3):
        plan[i] = replace(plan[i], relaunch=True)
    return plan


def steps_of(plan: Sequence[Kill]) -> int:
    """So many steps that the run can't end before its last kill, even if no kill costs it one."""
    return sum(kill.after_steps + (2 * INTERVAL if kill.moment == "save" else 1) for kill in plan) + 2 * INTERVAL


def problems(kill: Kill, end: End) -> list[str]:
    """What after a kill was not as it should be."""
    found = []
    if end.leftovers:
        found.append(f"{end.leftovers} processes were left after {end.gone_s:.0f} s")
    limit = 0 if kill.graceful else INTERVAL * (2 if kill.async_save else 1)
    if end.lost_steps > limit:
        found.append(f"{end.lost_steps} steps lost, at most {limit} allowed")
    if kill.relaunch:
        if end.returncode is not None:
            found.append(f"the launcher ended with {end.returncode} in place of starting the ranks again")
    elif kill.graceful:
        wanted = 128 + signal.Signals[kill.how] if kill.target == "launcher" else 0
        if end.trained and end.returncode != wanted:
            found.append(f"exit code {end.returncode} after {kill.how}, {wanted} expected")
    elif kill.target == "launcher":
        if end.returncode != -signal.SIGKILL:
            found.append(f"the launcher ended with {end.returncode}")
    else:
        rank = r"\d" if kill.target == "all ranks" else kill.target[-1]
        if end.returncode != 1 or not re.search(rf"rank {rank} of {RANKS} was .*SIGKILL", end.said):
            found.append(f"exit code {end.returncode}, and it doesn't say that {kill.target} was killed: {end.said[-300:]!r}")
    return found


def shortages(plan: Sequence[Kill], ends: Sequence[End]) -> list[str]:
    """Which kinds of kills were too few, of as many as were planned."""
    kills = len(plan)
    found = summary(plan, ends, [])
    counts = {
        "kills": (found["kills"], kills),
        "kills with a checkpoint to go on from": (found["with_checkpoint"], (kills + 1) // 2),
        "kills inside a save": (found["inside_save"], kills // 4),
        "kills inside an asynchronous save": (found["inside_async_save"], kills // 10),
        "kills of the launcher": (found["of_launcher"], 3 * kills // 20),
        "signals that ask to stop": (found["asked_to_stop"], kills // 10),
    }
    return [f"{there} {what}, at least {least} wanted" for what, (there, least) in counts.items() if there < least]


def differences(disturbed: Path, undisturbed: Path, *, moved: bool = False) -> list[str]:
    """The tensors and values of two checkpoints that are not the same to the last bit; settings don't count.

    `moved`: of a run in several layouts, whose tensors may differ by rounding."""
    one, two = read_tensors(disturbed), read_tensors(undisturbed)
    found = sorted(one.keys() ^ two.keys())
    for name in sorted(one.keys() & two.keys()):
        a, b = one[name], two[name]
        same_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
        if not same_kind or not (_near(a, b) if moved else _same_bits(a, b)):
            found.append(name)
    values, others = read_values(disturbed), read_values(undisturbed)
    keys = sorted((values.keys() | others.keys()) - set(OF_LAYOUTS if moved else OF_LAYOUTS[:1]))
    same = _near_values if moved else lambda a, b: json.dumps(a) == json.dumps(b)
    return found + [key for key in keys if not same(values.get(key), others.get(key))]


def _near_values(a: Any, b: Any) -> bool:
    """Values of JSON; numbers that aren't whole are losses."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=LOSS_TOLERANCE)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_near_values, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_near_values(value, b[key]) for key, value in a.items())
    return bool(a == b)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # 0.0 is not -0.0


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """By the largest element."""
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def different_steps(disturbed: Path, undisturbed: Path, *, moved: bool = False) -> list[int]:
    """The steps that two runs have not recorded once each, and alike: losses in metrics.jsonl, digests in ledger.jsonl.  `moved`:
    in several layouts, whose losses may differ by rounding."""
    kinds: dict[str, Callable[[Record, Record], bool]] = {"metrics.jsonl": _same_numbers, "ledger.jsonl": operator.eq}
    if moved:
        kinds = {"metrics.jsonl": _near_numbers, "ledger.jsonl": _near_digests}
    found: set[int] = set()
    for name, alike in kinds.items():
        one, two = read_metrics(disturbed / name), read_metrics(undisturbed / name)
        for step in {int(r["step"]) for r in (*one, *two)}:
            own, other = ([r for r in records if r["step"] == step] for records in (one, two))
            if len(own) != 1 or len(other) != 1 or not alike(own[0], other[0]):
                found.add(step)
    return sorted(found)


def _same_numbers(record: Record, other: Record) -> bool:
    return all(record.get(key) == other.get(key) for key in (*COUNTED, *LOSSES, "grad_norm"))  # times differ


def _near_numbers(record: Record, other: Record) -> bool:
    near = {**dict.fromkeys(LOSSES, LOSS_TOLERANCE), "grad_norm": TOLERANCE}
    return all(record.get(key) == other.get(key) for key in COUNTED) and all(
        math.isclose(record.get(key, 0.0), other.get(key, 0.0), rel_tol=tolerance) for key, tolerance in near.items()
    )


def _near_digests(record: Record, other: Record) -> bool:
    return record["routing"] == other["routing"] and not difference(other, record, tolerance=TOLERANCE, moe_layers=())


def compare(disturbed: Path, undisturbed: Path, steps: int, *, moved: bool = False) -> dict[str, Any]:
    """What differs in the final checkpoints of two runs, and in the records of their steps; what can't be read differs.  `moved`:
    the disturbed run went on in other layouts."""
    final = [run / "checkpoints" / f"step_{steps:08d}" for run in (disturbed, undisturbed)]
    try:
        tensors = differences(*final, moved=moved)
    except (ValueError, OSError) as error:
        tensors = [str(error)]
    try:
        records: list[Any] = different_steps(disturbed, undisturbed, moved=moved)
    except (ValueError, OSError) as error:
        records = [str(error)]
    return {"equal": not tensors, "final": list(map(str, final)), "different": tensors, "different_steps": records}


def summary(plan: Sequence[Kill], ends: Sequence[End], lost_s: Sequence[float]) -> dict[str, Any]:
    """The totals, and under "rows" each kill."""
    done = list(zip(plan, ends))  # a run that was given up has fewer ends
    return {
        "kills": len(ends),
        "inside_save": sum(end.inside_save for end in ends),
        "inside_async_save": sum(end.inside_save and kill.async_save for kill, end in done),
        "of_launcher": sum(kill.target == "launcher" and not kill.graceful for kill, _ in done),
        "asked_to_stop": sum(kill.graceful for kill, _ in done),
        "restarted_by_launcher": sum(kill.relaunch for kill, _ in done),
        "with_checkpoint": sum(end.saved_step > 0 for end in ends),  # else the run starts anew, which proves less
        "lost_steps": sum(end.lost_steps for end in ends),
        "lost_s": round(sum(lost_s), 1),
        "leftover_processes": sum(end.leftovers for end in ends),
        "slowest_end_s": round(max((end.gone_s for end in ends), default=0.0), 2),
        "rows": rows_of(plan, ends, lost_s),
    }


def rows_of(plan: Sequence[Kill], ends: Sequence[End], lost_s: Sequence[float]) -> list[dict[str, Any]]:
    """One kill a row; `lost_s`: seconds from the kill to the next step that was trained, or to the next kill."""
    rows = []
    for number, (kill, end) in enumerate(zip(plan, ends)):  # a run that was given up has fewer ends
        moment = "inside a save" if end.inside_save else "between saves" if end.trained else "start-up"
        rows.append(
            {
                "kill": number + 1,
                "step": end.step,
                "what": kill.target,
                "how": kill.how,
                "moment": moment,
                "saves": "async" if kill.async_save else "sync",
                "lost_steps": end.lost_steps,
                "lost_s": round(lost_s[number], 1) if number < len(lost_s) else None,
                "gone_s": round(end.gone_s, 2),
                "started_by": "launcher" if kill.relaunch else "command",
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows with their columns under each other."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def saved_steps(run: Path) -> tuple[int, int]:
    """Of the newest checkpoint, by its name (to have one means to be complete), and of the newest hidden one; 0: none."""
    try:
        names = os.listdir(run / "checkpoints")
    except FileNotFoundError:
        names = []
    steps = [
        [int(m[1]) for name in names if (m := re.fullmatch(form, name))] for form in (r"step_(\d+)", r"\.step_(\d+)\.partial")
    ]
    return max(steps[0], default=0), max(steps[1], default=0)


def saving_step(run: Path) -> int | None:
    """The step whose save is under way, or was when the run was killed.  Hidden folders of older steps are being removed."""
    complete, hidden = saved_steps(run)
    return hidden if hidden > complete else None


def last_step(run: Path) -> int:
    """Of the last whole line of its metrics; 0: there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0
