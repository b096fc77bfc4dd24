"""Dozens of schedules on four gloo ranks, each rank delayed at random in its program, its lanes and its device: all end, with
the numbers of the plain schedule, with one ledger a group, which is that of virtual time, and with each gradient sent once.

.venv/bin/python -m pytest tests/parallel/test_random_delays.py -rP     # prints how many schedules were tried
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.collective_log import Entry
from megalina.config import OptimConfig
from megalina.mesh import Mesh, build_mesh
from megalina.parallel.emulated_device import EmulatedDevice
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.sim.network import one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import simulate
from megalina.step.plan import Plan
from megalina.step.program import Kind, Op, Program, check
from megalina.step.strategy import STRATEGIES, Setting, given, training_step
from megalina.train.bucket_optimizer import BucketOptimizer
from tests.parallel.delays import Delays
from tests.parallel.ranks import run_on_ranks
from tests.perfmodel.sim.schedules import WALKING, order_of, ranks_of
from tests.train.small_run import VOCABULARY, config_of, random_batch

WORLD, STEPS = 4, 2  # the second step runs on what the first has updated, and lina_zero gathered
PIECE_BYTES = 8192
LAYOUTS: dict[tuple[int, int, int], dict[str, Any]] = {  # (edp, ep, tp): two parts of a micro-batch, two micro-batches
    (2, 2, 1): {"ep": 2, "shared_d_ff": 16, "micro_batch_size": 2},
    (1, 2, 2): {"ep": 2, "tp": 2, "dense_layers_first": 1, "num_layers": 3, "micro_batch_size": 2},
}
STUCK_S = 30.0

Group = tuple[str, tuple[int, ...]]  # axis, ranks
Ledger = dict[Group, list[str]]


@dataclass
class Schedule:
    """What one step is to be, on all ranks alike."""

    layout: tuple[int, int, int]
    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name} {self.seed} on {self.layout}"

    @property
    def emulated(self) -> bool:
        """Every other one has a device that is late at random: then all that is sent goes through the lanes' threads."""
        return (list(STRATEGIES).index(self.name) + self.seed) % 2 == 1

    def setting(self, base: Setting) -> Setting:
        """The first of each strategy has all mechanisms; the numbers of the others are drawn."""
        random, first = Random(str(self)), self.seed == 0
        gaps = (("experts", 400 * base.element_bytes), ("attention", 900 * base.element_bytes))
        sharded = any(spec.sharded for spec in base.buckets.values())  # shards belong to pieces: not to be drawn
        piece = None if sharded else random.choice((None, 300, 1000))
        return replace(
            base,
            buckets=base.buckets if first or sharded else {n: replace(s, piece=piece) for n, s in base.buckets.items()},
            recompute_mode="none" if first else random.choice(("none", "selective", "full")),
            plan=Plan(
                self.name,
                parts=2 if self.name in WALKING else 1,
                chunks=tuple(2 if first else random.choice((1, 2, 3)) for is_moe in base.shape.moe if is_moe),
                merge_bytes=5000 * base.element_bytes if self.name == "ddp" else 0,
                yields=self.name not in ("eager", "ddp", "serial", "fixed") and (first or random.random() < 0.6),
                gap_bytes=() if first else random.choice(((), gaps)),
            ),
        )

    def program(self, setting: Setting) -> Program:
        """The strategy's list; from the second on in another legal order."""
        program = training_step(self.name, setting)
        if self.seed > 0:
            program = order_of(program, Random(str(self)))
            check(program, given(program, setting), setting.buckets)
        return program


@dataclass
class Numbers:
    """What a schedule gives on one rank, over its steps."""

    losses: list[float]  # loss, balance loss, z loss and norm of each step
    gradients: list[dict[str, Tensor]]  # this rank's slices of each bucket
    weights: dict[str, Tensor]
    ledgers: list[list[Entry]]


@dataclass
class Outcome:
    """What is reported of a schedule by one rank."""

    error: float  # the greatest difference to the plain schedule, relative to the greatest element
    ledger: Ledger  # what each of its groups saw: class, instruction, type and size
    tags: Ledger
    simulated: Ledger
    times_sent: dict[str, set[int]]  # bucket -> how often its elements were reduced
    slept_s: float


class Model:
    """A model of one layout whose steps are done again and again, from the same weights."""

    def __init__(self, folder: Path, layout: tuple[int, int, int], mesh: Mesh, *, zero: int):
        self.layout, self.mesh = layout, mesh
        config = config_of(folder, "run", dtype="float64", zero=zero, **LAYOUTS[layout])
        config.strategy.partition_bytes = str(PIECE_BYTES)
        self.trainable = Trainable(config, mesh, vocab_size=VOCABULARY, device=torch.device("cpu"), wish_to_stop=lambda: False)
        self.base = self.trainable.setting
        self.buckets = self.trainable.buckets
        self._weights = {name: bucket.param.clone() for name, bucket in self.buckets.items()}
        share = 8 // mesh.dp.size
        self._batches = [random_batch(share, first=8 * step + mesh.dp.rank * share) for step in range(STEPS)]
        self.plain = self.run(replace(self.base, recompute_mode="none"), training_step("eager", self.base))

    def run(self, setting: Setting, program: Program) -> Numbers:
        """The steps, by this list."""
        self.trainable.setting = setting
        self.trainable.run_with(program, self.trainable.functions)
        for name, bucket in self.buckets.items():
            bucket.param.copy_(self._weights[name])
        optimizer = BucketOptimizer(OptimConfig(name="sgd", lr=0.5), self.buckets)
        out = Numbers([], [], {}, [])
        for batch in self._batches:
            gradients: dict[str, Tensor] = {}

            def update(name: str, result: StepResult, gradients: dict[str, Tensor] = gradients) -> None:
                bucket = self.buckets[name]
                gradients[name] = torch.cat([bucket.grad[s.start : s.stop] for s in bucket.slices])
                optimizer.update(name, result)

            self.trainable.log.position.step += 1
            result = self.trainable.step(batch, update)
            out.losses += [result.loss, result.balance_loss, result.z_loss, result.grad_norm]
            out.gradients.append(gradients)
            out.ledgers.append([e for e in self.trainable.log.entries() if e.step == self.trainable.log.position.step])
        self.trainable.settle()
        out.weights = {name: bucket.param.clone() for name, bucket in self.buckets.items()}
        return out

    def outcome(self, schedule: Schedule) -> Outcome:
        """A schedule with delays, against the plain one without."""
        setting = schedule.setting(self.base)
        program, delays = schedule.program(setting), Delays(self.trainable.log, str(schedule))
        if schedule.emulated:  # what is sent leaves when the device is there
            self.trainable.device = EmulatedDevice(lambda instruction: delays.seconds(f"device {instruction.tag}"))
        with delays.everywhere():
            found = self.run(setting, program)
        self.trainable.device = None
        ledgers = [by_group(entries, lambda e: e.key) for entries in found.ledgers]
        assert all(ledger == ledgers[0] for ledger in ledgers), "two steps of one list have two ledgers"
        return Outcome(
            error=max(errors(found, self.plain)),
            ledger=ledgers[0],
            tags=by_group(found.ledgers[0], lambda e: e.tag),
            simulated=simulated(program, self.layout, self.mesh.world.rank),
            times_sent=times_sent(found.ledgers[0], program, setting),
            slept_s=delays.slept_s,
        )


def by_group(entries: list[Entry], what: Callable[[Entry], str]) -> Ledger:
    out: Ledger = {}
    for entry in entries:
        out.setdefault((entry.axis, entry.ranks), []).append(what(entry))
    return out


def errors(found: Numbers, plain: Numbers) -> Iterator[float]:
    for got, want in zip(found.losses, plain.losses, strict=True):
        yield abs(got - want) / abs(want)
    for got_of, want_of in zip([*found.gradients, found.weights], [*plain.gradients, plain.weights], strict=True):
        assert got_of.keys() == want_of.keys()
        for name, value in want_of.items():
            yield float((got_of[name] - value).abs().max() / value.abs().max())


def simulated(program: Program, layout: tuple[int, int, int], rank: int) -> Ledger:
    """What the groups of this rank see of the list in virtual time."""
    timeline = simulate(
        [program] * WORLD,
        ranks_of=ranks_of(layout),
        seconds=lambda rank, instruction: 1e-4,
        network=one_level(1e6, 1e-5),
        sizes=Sizes(lambda instruction: 1000.0),
    )
    return {group: list(tags[rank]) for group, tags in timeline.ledger.items() if rank in tags}


def times_sent(entries: list[Entry], program: Program, setting: Setting) -> dict[str, set[int]]:
    """Of each bucket that has somebody to be summed with, how often its elements went on the wire, by the log."""
    starts = {s.tag: s for s in program if s.op is Op.GRADS and s.kind is Kind.START}
    counts: dict[str, list[int]] = {}
    for entry in entries:
        if (instruction := starts.get(entry.tag)) is None:
            continue
        left = entry.count or 0  # elements that are on the wire
        for name in instruction.buckets:
            numel = setting.buckets[name].numel
            first, stop = instruction.piece if len(instruction.buckets) == 1 else (0, numel)
            assert left >= stop - first, (entry, instruction)
            left -= stop - first
            counts.setdefault(name, [0] * numel)
            counts[name][first:stop] = [n + 1 for n in counts[name][first:stop]]
        assert left == 0, (entry, instruction)
    return {name: set(n) for name, n in counts.items()}


def schedules_of(seeds: int) -> list[Schedule]:
    """So many of each strategy in each layout; if one, then the list as it is in one layout, in another order in the other."""
    seeds_of = {layout: range(seeds) if seeds > 1 else [n] for n, layout in zip((1, 0), LAYOUTS, strict=True)}
    return [Schedule(layout, name, seed) for layout in LAYOUTS for name in STRATEGIES for seed in seeds_of[layout]]


def outcomes(folder: Path, seeds: int) -> dict[str, Outcome]:
    """Of all schedules, on this rank."""
    found: dict[str, Outcome] = {}
    for edp, ep, tp in LAYOUTS:
        mesh = build_mesh(tp=tp, ep=ep, timeout_s=STUCK_S)
        models = [Model(folder, (edp, ep, tp), mesh, zero=zero) for zero in (0, 1)]
        for schedule in schedules_of(seeds):
            if schedule.layout == (edp, ep, tp):
                zero = 1 if schedule.name == "lina_zero" else Random(str(schedule)).randrange(2)
                try:
                    found[str(schedule)] = models[zero].outcome(schedule)
                except Exception as error:
                    error.add_note(f"in schedule {schedule}, ZeRO-{zero}")
                    raise
        for model in models:
            model.trainable.close()
    return found


def on_ranks(folder: Path, seeds: int) -> Iterator[list[dict[str, Outcome]]]:
    started_s = time.monotonic()
    ranks = run_on_ranks(WORLD, outcomes, folder, seeds, time_limit_s=60.0 * seeds + 60)
    assert len(ranks) == WORLD and all(len(rank) == len(schedules_of(seeds)) for rank in ranks)
    yield ranks
    slept_s = sum(o.slept_s for rank in ranks for o in rank.values())
    print(f"\nschedules on {WORLD} gloo ranks: {len(ranks[0])}, none hung; delays of {slept_s:.0f} s in all ranks together,")
    print(f"{time.monotonic() - started_s:.0f} s in all; greatest error {max(o.error for r in ranks for o in r.values()):.1e}")


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.full), pytest.param(30, marks=pytest.mark.full)],
    ids=["dozens", "hundreds"],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Outcome]]]:
    yield from on_ranks(tmp_path_factory.mktemp("delays"), request.param)


def test_every_schedule_gives_the_numbers_of_the_plain_one(ranks: list[dict[str, Outcome]]) -> None:
    """Losses, norm, every gradient, and weights after two steps; that they are here says that all schedules ended."""
    assert [(what, o.error) for rank in ranks for what, o in rank.items() if not o.error < 1e-12] == []
    assert all(o.slept_s > 0 for rank in ranks for o in rank.values())


def test_all_ranks_of_a_group_have_one_ledger(ranks: list[dict[str, Outcome]]) -> None:
    for what in ranks[0]:
        ledgers: dict[Group, list[list[str]]] = {}
        for rank, found in enumerate(ranks):
            for group, keys in found[what].ledger.items():
                assert rank in group[1]
                ledgers.setdefault(group, []).append(keys)
        for group, keys_of in ledgers.items():
            assert len(keys_of) == len(group[1]) and all(keys == keys_of[0] for keys in keys_of), (what, group)


def test_the_ledger_of_each_group_is_that_of_virtual_time(ranks: list[dict[str, Outcome]]) -> None:
    for rank, found in enumerate(ranks):
        for what, outcome in found.items():
            assert outcome.tags == outcome.simulated, (what, rank)


def test_every_gradient_is_reduced_exactly_once(ranks: list[dict[str, Outcome]]) -> None:
    for found in ranks:
        for what, outcome in found.items():
            shared = {"dense.0", "dense.1", "embedding"} if what.endswith("1)") else {"copied.0", "experts.1", "dense.0"}
            assert shared <= outcome.times_sent.keys(), what
            assert {name: n for name, n in outcome.times_sent.items() if n != {1}} == {}, what


def test_split_sizes_sequence_parallel_and_norm_collectives_are_in_the_ledger(ranks: list[dict[str, Outcome]]) -> None:
    for name in STRATEGIES:
        outcome = ranks[0][f"{name} 0 on (1, 2, 2)"]
        tags = {axis: {tag.split(".")[0] for tag in tags} for (axis, _), tags in outcome.tags.items()}
        assert tags["counts"] == {"F:counts>"}
        assert {"F:attention_gather>", "F:attention_sum>", "B:attention_gather>", "B:attention_sum>"} <= tags["tp"]
        assert {"F:dispatch>", "F:combine>", "B:dispatch>", "B:combine>"} == tags["ep"]
        assert "U:measured>" in tags["world"] and "U:divisor>" in tags["dp"]
