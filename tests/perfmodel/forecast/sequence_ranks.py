"""One step on gloo ranks and the same step in virtual time, written down alike: per group and rank, what was sent, in order."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from megalina.batch import Batch
from megalina.collective_log import Entry
from megalina.config import BYTES, PretrainConfig, StrategyConfig
from megalina.data.source import TokenData, open_data
from megalina.layout import ranks_of
from megalina.mesh import Mesh, build_meshes
from megalina.model.permute import RowOrder
from megalina.parallel.executor import Functions
from megalina.perfmodel.forecast.priced_step import PricedStep, nodes_that_sum
from megalina.perfmodel.sim.collectives import Collective, Floats
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import Group, simulate
from megalina.plan_settings import plan_of
from megalina.step.passes import decides
from megalina.step.program import Instruction, Program
from megalina.timeline.recorder import SEND, Event, Recorder
from megalina.train.step_runner import StepRunner
from tests.perfmodel.forecast.counted import Counts
from tests.perfmodel.sim.schedules import delays
from tests.train.small_run import LENGTH, VOCABULARY, config_of, random_batch

WORLD = 4
KINDS = {"all-to-all": Collective.ALL_TO_ALL, "gather": Collective.ALL_GATHER, "scatter": Collective.REDUCE_SCATTER}
Begun = tuple[Collective, float, Floats | None]


@dataclass(frozen=True, slots=True)
class Sent:
    """A collective as one rank has asked for it."""

    tag: str
    op: str
    what: str  # the class of collective
    sent_bytes: tuple[float, ...]  # all-to-all: to each rank of the group; gather: of the result; else of the tensor
    num_bytes: float  # as `Pending` counts


Sequences = Mapping[Group, Mapping[int, Sequence[Sent]]]


# on gloo
@dataclass(frozen=True, slots=True)
class Seen:
    """What one rank tells of its step."""

    program: Program
    entries: list[Entry]
    events: list[Event]
    rows: dict[tuple[int, str], list[int]]  # (layer, part) -> rows for each expert


def steps_of(configs: Sequence[PretrainConfig]) -> list[Seen]:
    """The first step of each, on this rank, by the trainer's own hands."""
    return [_step_of(config, number) for number, config in enumerate(configs, 1)]


def _step_of(config: PretrainConfig, number: int) -> Seen:
    data = _data(config.data.prefix)
    parallel, per_node = config.parallel, nodes_that_sum(config)
    runner = StepRunner(config, data, device=torch.device("cpu"), meshes=_meshes(parallel.tp, parallel.ep, per_node))
    trainable, rows, recorder = runner.trainable, dict[tuple[int, str], list[int]](), Recorder()
    program = trainable.program
    trainable.run_with(program, counting(trainable.functions, rows))
    runner.log.position.step = number
    batch = padded(random_batch(runner.own_samples.count, first=runner.own_samples.first(0)))
    trainable.step(batch, runner.built.optimizer.update, record=recorder)
    entries = [e for e in runner.log.entries() if e.step == number]
    until_s = time.monotonic() + 10  # gloo's thread may note the end after the program has gone on
    while len(events := sends(recorder.events())) < len(entries) and time.monotonic() < until_s:
        time.sleep(0.001)
    trainable.close()
    return Seen(program, entries, events, rows)


@cache
def _data(prefix: str) -> TokenData:
    config = config_of(Path(prefix).parent, "run")
    return open_data(config.data, seq_len=LENGTH, seed=config.train.seed)


@cache
def _meshes(tp: int, ep: int, ranks_per_node: int) -> dict[int, Mesh]:
    """Groups cost more than a step does."""
    return build_meshes(tp=tp, ep=ep, packings=[k for k in (1, 2, 4) if ep % k == 0], ranks_per_node=ranks_per_node)


def padded(batch: Batch) -> Batch:
    """No two sequences have as many tokens, so no two ranks have."""
    length_B1 = LENGTH - (batch.sample_B % 7).unsqueeze(1)
    valid_BS = torch.arange(LENGTH) < length_B1
    return Batch(batch.tokens_BS, batch.labels_BS, valid_BS, valid_BS, batch.position_BS, None, batch.sample_B)


def counting(functions: Functions, rows: dict[tuple[int, str], list[int]]) -> Functions:
    """Note what the routers decide; the split sizes of the dispatcher are not looked at."""

    def of(instruction: Instruction) -> Callable[..., Any]:
        function = functions(instruction)
        if instruction.phase != "F" or not (decides(instruction) or instruction.name == "pack"):
            return function

        def routed(*arguments: Any) -> Any:
            out = function(*arguments)
            (order,) = (v for v in out if isinstance(v, RowOrder))
            rows[instruction.layer, instruction.part] = order.count_E.tolist()
            return out

        return routed

    return of


def sends(events: Sequence[Event]) -> list[Event]:
    return [e for e in events if e.kind == SEND]


def on_gloo(seen: Sequence[Seen]) -> Sequences:
    """From the log of collectives and the recorder's events of all ranks."""
    out: dict[Group, dict[int, list[Sent]]] = defaultdict(lambda: defaultdict(list))
    for rank, own in enumerate(seen):
        event = {e.tag: e for e in own.events}
        assert len(event) == len(own.events) == len(own.entries), (rank, len(own.events), len(own.entries))
        for e in own.entries:
            row_bytes = getattr(torch, e.dtype.removeprefix("torch.")).itemsize * prod(e.row)
            what = KINDS.get(e.kind, Collective.ALL_REDUCE)
            if e.count is None:
                sent = tuple(float(row_bytes * rows) for rows in e.send)
            else:
                sent = (float(row_bytes * e.count * (len(e.ranks) if what is Collective.ALL_GATHER else 1)),)
            group = e.axis.partition("/")[0], e.ranks  # the log tells packings apart
            out[group][rank].append(Sent(e.tag, event[e.tag].op, what.value, sent, event[e.tag].num_bytes))
    return out


def counts_of(seen: Sequence[Seen]) -> Counts:
    return {key: np.array([own.rows[key] for own in seen]) for key in seen[0].rows}


# in virtual time
@dataclass(frozen=True, slots=True)
class Forecasted:
    """What is known of a configuration without running it."""

    program: Program
    sizes: Sizes  # of even routing
    axes: Mapping[str, int]
    row_bytes: tuple[int, int]  # of a token on its way to its experts, and back


def forecasted(config: PretrainConfig) -> Forecasted:
    packing = config.strategy.packing
    plan = plan_of(config.strategy, packing=1 if packing == "auto" else int(packing))
    step = PricedStep(config, WORLD, plan, vocab_size=VOCABULARY)
    row_bytes, axes = config.model.d_model * BYTES[config.train.dtype], step.held.axes
    weights = config.model.num_experts // axes["ep"] * max(4, BYTES[config.train.dtype])
    there = row_bytes + weights * (config.parallel.dispatch == "once_per_rank")
    return Forecasted(step.program, step.sizes, axes, (there, row_bytes))


def in_virtual_time(programs: Sequence[Program], sizes: Sizes, axes: Mapping[str, int], *, seed: int = 0) -> Sequences:
    """From the ledger and the events of a simulated step, and the sizes that it asked for; delays are drawn."""
    begun: dict[Group, list[Begun]] = defaultdict(list)
    timeline = simulate(
        programs,
        ranks_of=ranks_of(axes),
        seconds=delays(Random(seed)),
        network=Network(nic_bytes_per_s=1e6, ranks_per_node=2, fast_bytes_per_s=1e7, hop_s=1e-5),
        sizes=watched(sizes, begun),
    )
    events = [{e.tag: e for e in sends(timeline.events(rank))} for rank in range(len(programs))]
    out: dict[Group, dict[int, list[Sent]]] = {}
    for group, tags_of in timeline.ledger.items():
        whats = begun[group]
        assert all(len(tags) == len(whats) for tags in tags_of.values()), group
        out[group] = {
            rank: [Sent(tag, event.op, what[0].flat.value, sent_by(group[1].index(rank), len(group[1]), *what), event.num_bytes)
                   for tag, what in zip(tags, whats, strict=True) for event in [events[rank][tag]]]
            for rank, tags in tags_of.items()
        }  # fmt: skip
    assert sum(map(len, events)) == sum(len(tags) for tags_of in timeline.ledger.values() for tags in tags_of.values())
    return out


def watched(sizes: Sizes, begun: dict[Group, list[Begun]]) -> Sizes:
    """Note what the simulator puts on the links."""

    class Watched(Sizes):
        def sent(self, instruction: Instruction, ranks: tuple[int, ...]) -> Begun:
            begun[instruction.axis, ranks].append(super().sent(instruction, ranks))
            return begun[instruction.axis, ranks][-1]

    return Watched(sizes.bytes_of, sizes.scattered, sizes.matrix_of, sizes.by_node)


def sent_by(place: int, ranks: int, what: Collective, num_bytes: float, bytes_NN: Floats | None) -> tuple[float, ...]:
    """The bytes of one rank of the group."""
    if what is not Collective.ALL_TO_ALL:
        return (num_bytes,)
    return (num_bytes / ranks,) * ranks if bytes_NN is None else tuple((num_bytes * bytes_NN[place]).tolist())


# both
def difference(real: Sequences, virtual: Sequences) -> str:
    """The first thing that is not the same, for people; "" if there is none."""
    for group in {**real, **virtual}:
        if group not in real or group not in virtual:
            return f"{group}: {'on gloo' if group in real else 'in virtual time'} alone"
        for rank in group[1]:
            for i, (a, b) in enumerate(zip_longest(real[group][rank], virtual[group].get(rank, ()))):
                if a != b:
                    return f"{group}, rank {rank}, collective {i}:\n  on gloo         {a}\n  in virtual time {b}"
    return ""


def configs_of(folder: Path, cases: Mapping[str, tuple[StrategyConfig, Mapping[str, Any]]]) -> dict[str, PretrainConfig]:
    """`accumulate`: micro-batches of a step; all else as in `small_run.config_of`."""
    out = {}
    for name, (strategy, settings) in cases.items():
        rest = {"micro_batch_size": 2, **settings}
        dp = WORLD // rest.get("tp", 1)
        batch = rest.pop("accumulate", 1) * rest["micro_batch_size"] * dp
        config = config_of(folder, "run", global_batch_size=batch, **rest)
        config.strategy = strategy
        if config.parallel.reduce == "by_node":
            config.cluster.nodes, config.cluster.ranks_per_node = 2, WORLD // 2
        out[name] = config
    return out
