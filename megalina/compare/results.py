"""What interleaved runs have shown: step times and their ratios to eager, exposed times, slowdowns, bounds, losses."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megalina.compare.interleaved import Competitor, Layout, is_variant, layout_of, rows_along
from megalina.compare.ladder import PLAIN
from megalina.layout import by_node as nodes_of
from megalina.layout import rows
from megalina.mesh import all_gather_object
from megalina.perfmodel.sim.lower_bound import in_turn_s, lower_bound
from megalina.perfmodel.sim.network import one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import Instruction, Kind, Program
from megalina.timeline.contention import MESSAGES, STAGES, AllToAll, Alone, all_to_alls, class_of, quantile, summary
from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event

EAGER = "eager"
VALID_OVERRUN = 0.05  # share of the emulated devices' time by which real math may be late


def link_bytes(
    by_rank: Sequence[Sequence[Event]], shape: Mapping[str, int], *, ranks_per_node: int, sharded: bool, by_node: bool = False
) -> float:
    """What a step puts on the busiest node's link, out of it: all ranks' events of one step.

    All-to-alls count with the share of the ranks that are on other nodes, as if all got equally many; sums as a ring
    (2 (n - 1) / n of the value over each edge), gathers and scatters as half of one; `by_node`: as `megalina.comm.by_node` has
    them.  Inside a node nothing counts."""
    sent = bytes_of_links(by_rank, rows(shape), ranks_per_node=ranks_per_node, sharded=sharded, by_node=by_node)
    return max((sum(by_tag.values()) for by_tag in sent.values()), default=0.0)


def bytes_of_links(
    by_rank: Sequence[Sequence[Event]],
    table: Mapping[str, Sequence[Sequence[int]]],
    *,
    ranks_per_node: int,
    sharded: bool,
    by_node: bool = False,
    tokens_by_node: bool = False,
) -> dict[int, dict[str, float]]:
    """Of each node, by instruction.  `table`: the rows of ranks along each axis (`rows_along`); `by_node`, `tokens_by_node`: how
    gradients and tokens travel."""
    out: dict[int, dict[str, float]] = {}
    for rank, events in enumerate(by_rank):
        node = rank // ranks_per_node
        for e in events:
            if e.kind != SEND:
                continue
            row = next(row for row in table[e.axis.partition("/")[0]] if rank in row)
            n = len(row)
            if e.op == "tokens" and tokens_by_node:
                sent = float(e.num_bytes)
            elif e.op in ("tokens", "counts"):
                sent = e.num_bytes * sum(other // ranks_per_node != node for other in row) / (n - 1)
            elif e.op in MESSAGES:
                sent = e.num_bytes * any(other // ranks_per_node != node for other in row)
            elif by_node and e.op in ("grads", "params") and (nodes := nodes_of(row, ranks_per_node)):
                sent = _over_an_edge(e, len(nodes), sharded)  # with the rank at the same place of the next node
                sent /= 1 if e.op == "params" else len(nodes[0])  # each has its part of the value
            else:
                after = row[(row.index(rank) + 1) % n]
                sent = _over_an_edge(e, n, sharded) if after // ranks_per_node != node else 0.0
            by_tag = out.setdefault(node, {})
            by_tag[e.tag] = by_tag.get(e.tag, 0.0) + sent
    return out


def _over_an_edge(event: Event, ranks: int, sharded: bool) -> float:
    if event.op in ("gather", "params"):
        return event.num_bytes * (ranks - 1)  # each rank's own part goes round
    if event.op == "scatter" or (event.op == "grads" and sharded):
        return event.num_bytes * (ranks - 1) / ranks
    return 2 * event.num_bytes * (ranks - 1) / ranks


def bounds_of(
    program: Program,
    events: Sequence[Event],
    *,
    seconds: Callable[[Instruction], float],
    ranks: int,
    link_bytes_per_s: float,
    bytes_of_link: Mapping[str, float],
) -> dict[str, float]:
    """compute_s: the device; critical_path_s: the longest chain of instructions of this very list that need each other, with the
    whole link for each exchange; in_turn_s: the busiest link, with what comes before and after what it carries (`in_turn_s`).
    All ranks are taken to be alike; `events`: of one rank, for the bytes; `bytes_of_link`: of the busiest link, by tag."""
    sent = {e.tag: e.num_bytes for e in events if e.kind == SEND}

    def whole_bytes(instruction: Instruction) -> float:
        size = sent.get(instruction.tag, 0)
        return (
            size * ranks / (ranks - 1)
            if instruction.op is not None and instruction.op.name in ("TOKENS", "COUNTS", "EVEN")
            else size
        )

    found = lower_bound(
        [program],
        ranks_of=lambda axis, rank: tuple(range(ranks)),
        seconds=lambda rank, instruction: seconds(instruction) if instruction.kind is Kind.COMPUTE else 0.0,
        network=one_level(link_bytes_per_s, 0.0),
        sizes=Sizes(whole_bytes),
    )
    turn_s = in_turn_s(program, seconds=seconds, link_s=lambda s: bytes_of_link.get(s.tag, 0.0) / link_bytes_per_s)
    return {"compute_s": found["compute_s"], "critical_path_s": found["critical_path_s"], "in_turn_s": turn_s}


@dataclass(frozen=True, slots=True)
class Measured:
    """One strategy in one setting.  Times are medians over timed steps, of the rank that took longest or waited longest."""

    plan: str  # with which numbers it ran
    plan_values: Mapping[str, Any]  # the same for programs (`Plan.from_json`), its order of instructions included
    median_step_s: float
    ratio_to_eager: float  # above 1: faster than eager
    ratio_spread: tuple[float, float]  # quartiles of the ratio over rounds
    ratio_to_ddp: float | None
    ratio_to_plain: float | None  # to eager without what lessens its bytes; None: it did not run
    a2a_exposed_s: float
    a2a_exposed_forward_s: float
    a2a_exposed_backward_s: float
    grads_exposed_s: float
    messages_exposed_s: float  # other stages of a pipeline
    other_exposed_s: float  # split sizes, sums
    idle_s: float  # the devices did not compute, mean over ranks: of a pipeline its bubble, and what was waited for in cells
    compute_s: float  # the device computed
    a2a_slowdown_median: float | None  # under gradients, backward; None: none were
    a2a_slowdown_p95: float | None
    slowdowns: list[float]
    device_s: float  # what its list costs on the emulated device; of a pipeline's lists the dearest
    critical_path_s: float  # of a pipeline, whose ranks hold lists of their own, no more than device_s
    link_s: float  # the busiest node's link
    in_turn_s: float  # the same, with the least that comes before and after what it carries
    overrun_fraction: float  # share of the devices' time by which real math was late
    peak_mb: float
    search_steps: int
    largest_loss_difference: float  # to eager, relative, over all steps that both took
    step_s: list[float]
    tail_s: list[float]  # of each step, after the last backward instruction


def numbers_of_rank(competitor: Competitor, known: Mapping[str, Alone]) -> dict[str, Any]:
    """What a rank tells the others of its timed steps."""
    found = [summary(events, known) for events in competitor.events]
    return {
        "step_s": competitor.step_s,
        "tail": list(map(tail_of, competitor.events)),
        "a2a": [c.traffic["a2a"].exposed_s for c in found],
        **{f"a2a {phase}": [_waited_for_tokens(events, phase) for events in competitor.events] for phase in "FB"},
        "grads": [c.traffic["grads"].exposed_s + c.traffic["params"].exposed_s for c in found],
        "messages": [c.traffic[STAGES].exposed_s if STAGES in c.traffic else 0.0 for c in found],
        "other": [c.traffic["other"].exposed_s for c in found],
        "compute": [c.compute_s for c in found],
        "idle": [step_s - c.compute_s for c, step_s in zip(found, competitor.step_s, strict=True)],
        "device": _device_s(competitor),
        "busy": competitor.busy_s,
        "overrun": competitor.overrun_s,
        "peak": competitor.peak_bytes,
        "losses": competitor.losses,
    }


def tail_of(events: Sequence[Event]) -> float:
    """Seconds of a step from the end of its last backward instruction to its own."""
    here = [e for e in events if e.kind in (COMPUTE, WAIT)]
    return max(e.end_s for e in here) - max(e.end_s for e in here if e.kind == COMPUTE and e.phase in ("B", "W"))


def _waited_for_tokens(events: Sequence[Event], phase: str) -> float:
    """Seconds that the device stood still for tokens in forward or in backward."""
    return sum(e.exposed_s for e in events if e.kind == WAIT and class_of(e) == "a2a" and e.phase == phase)


def _device_s(competitor: Competitor) -> float:
    """What this rank's list costs on its emulated device; 0 without one."""
    trainable = competitor.runner.trainable
    device = trainable.device
    return sum(device.seconds(s) for s in trainable.program if s.kind is Kind.COMPUTE) if device is not None else 0.0


def measure(
    competitors: Sequence[Competitor],
    known: Mapping[Layout, Mapping[str, Alone]],
    *,
    ranks_per_node: int,
    link_mbit: float,
    turn: int,
) -> dict[str, Measured]:
    """By name, the same on every rank.  "eager" and a size is eager with such pieces; the fastest is `eager`.

    `known`: by layout, exchanges alone; where it has nothing of a layout there are no slowdowns."""
    known_by = {c.name: known.get(layout_of(c.runner.mesh), {}) for c in competitors}
    numbers = {c.name: all_gather_object(c.runner.mesh, numbers_of_rank(c, known_by[c.name])) for c in competitors}
    step_s = {name: slowest([n["step_s"] for n in by_rank]) for name, by_rank in numbers.items()}
    base = _fastest(EAGER, step_s, lambda name: statistics.median(step_s[name]))
    out = {}
    for competitor in competitors:
        name, by_rank = competitor.name, numbers[competitor.name]
        runner, trainable = competitor.runner, competitor.runner.trainable
        exchanges, last = _exchanges(competitor, known_by[name])
        under = sorted(e.slowdown for e in exchanges if e.phase == "B" and "grads" in e.beside)
        program = trainable.program
        seconds = trainable.device.seconds if trainable.device is not None else None
        bound = {"compute_s": 0.0, "critical_path_s": 0.0, "in_turn_s": 0.0}
        rate = link_mbit * 1e6 / 8
        sharded = runner.config.parallel.zero == 1
        by_node = trainable.mesh.sums_by_node
        of_links = bytes_of_links(
            last,
            rows_along(trainable),
            ranks_per_node=ranks_per_node,
            sharded=sharded,
            by_node=by_node,
            tokens_by_node=trainable.mesh.ep.nodes is not None,
        )
        busiest = max(of_links.values(), key=lambda by_tag: sum(by_tag.values()), default={})
        if trainable.pipelined is not None:
            device_s = max(n["device"] for n in by_rank)
            link_s = sum(busiest.values()) / rate if rate else 0.0
            bound = {"compute_s": device_s, "critical_path_s": device_s, "in_turn_s": max(device_s, link_s)}
        elif seconds is not None:
            ranks, link = runner.mesh.world.size, rate or math.inf  # one node: no link to wait for
            bound = bounds_of(program, last[0], seconds=seconds, ranks=ranks, link_bytes_per_s=link, bytes_of_link=busiest)
        ratios = by_round(step_s[base], step_s[name], turn)
        losses = by_rank[0]["losses"]
        out[name] = Measured(
            plan=str(trainable.plan),
            plan_values=trainable.plan.as_json(),
            median_step_s=statistics.median(step_s[name]),
            ratio_to_eager=statistics.median(step_s[base]) / statistics.median(step_s[name]),
            ratio_spread=(quantile(ratios, 0.25) or 0.0, quantile(ratios, 0.75) or 0.0),
            ratio_to_ddp=_ratio("ddp", name, step_s),
            ratio_to_plain=_ratio(PLAIN, name, step_s),
            a2a_exposed_s=statistics.median(slowest([n["a2a"] for n in by_rank])),
            a2a_exposed_forward_s=statistics.median(slowest([n["a2a F"] for n in by_rank])),
            a2a_exposed_backward_s=statistics.median(slowest([n["a2a B"] for n in by_rank])),
            grads_exposed_s=statistics.median(slowest([n["grads"] for n in by_rank])),
            messages_exposed_s=statistics.median(slowest([n["messages"] for n in by_rank])),
            other_exposed_s=statistics.median(slowest([n["other"] for n in by_rank])),
            idle_s=statistics.median(map(statistics.fmean, zip(*(n["idle"] for n in by_rank), strict=True))),
            compute_s=statistics.median(slowest([n["compute"] for n in by_rank])),
            a2a_slowdown_median=quantile(under, 0.5),
            a2a_slowdown_p95=quantile(under, 0.95),
            slowdowns=under,
            device_s=bound["compute_s"],
            critical_path_s=bound["critical_path_s"],
            link_s=sum(busiest.values()) / rate if rate else 0.0,
            in_turn_s=bound["in_turn_s"] if rate else 0.0,
            overrun_fraction=_late([n["overrun"] for n in by_rank], [n["busy"] for n in by_rank]),
            peak_mb=max(n["peak"] for n in by_rank) / 1e6,
            search_steps=competitor.search_steps,
            largest_loss_difference=difference(losses, numbers[base][0]["losses"]),
            step_s=step_s[name],
            tail_s=slowest([n["tail"] for n in by_rank]),
        )
    return out


def _ratio(base: str, name: str, step_s: Mapping[str, Sequence[float]]) -> float | None:
    """Of medians; None where `base` did not run."""
    return statistics.median(step_s[base]) / statistics.median(step_s[name]) if base in step_s else None


def in_own_time(measured: Measured, slow_motion: float) -> Measured:
    """Of a cluster in slow motion: its times as they would be without."""
    own: dict[str, Any] = {}
    for key, value in asdict(measured).items():
        if key.endswith("_s"):
            own[key] = [t / slow_motion for t in value] if isinstance(value, list) else value / slow_motion
    return replace(measured, **own)


def _exchanges(competitor: Competitor, known: Mapping[str, Alone]) -> tuple[list[AllToAll], list[list[Event]]]:
    """All exchanges of tokens, and all ranks' events of the last step."""
    mesh, out, last = competitor.runner.mesh, [], []
    for events in competitor.events:
        last = all_gather_object(mesh, events)
        for row in mesh.rows["ep"]:
            out += all_to_alls([last[rank] for rank in row], known)
    return out, last


def _late(overrun_s: Sequence[Sequence[float]], busy_s: Sequence[Sequence[float]]) -> float:
    """The share of the devices' time by which real math was late: of each step over all ranks, then the median over steps, as for
    their times."""
    steps = zip(zip(*overrun_s, strict=True), zip(*busy_s, strict=True), strict=True)
    return statistics.median([sum(late_s) / sum(of_s) for late_s, of_s in steps] or [0.0])


def slowest(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Of each step the longest time."""
    return [max(times) for times in zip(*by_rank, strict=True)]


def _fastest(baseline: str, step_s: Mapping[str, Sequence[float]], median_s: Callable[[str], float]) -> str:
    """Of the baseline's variants that took the most turns."""
    names = [name for name in step_s if is_variant(name, baseline)]
    most = max(len(step_s[name]) for name in names)
    return min((name for name in names if len(step_s[name]) == most), key=median_s)


def by_round(base_s: Sequence[float], step_s: Sequence[float], turn: int) -> list[float]:
    """The ratio of the medians of each round's steps."""
    rounds = range(0, len(step_s), turn)
    return [statistics.median(base_s[i : i + turn]) / statistics.median(step_s[i : i + turn]) for i in rounds]


def difference(losses: Sequence[float], base: Sequence[float]) -> float:
    """The largest relative difference over the steps that both took."""
    return max((abs(a - b) / abs(b) for a, b in zip(losses, base, strict=False)), default=0.0)


def lower_bound_s(found: Mapping[str, Measured]) -> float:
    """The longer one of compute and the busiest link, each of the strategy with the least of it among those that pack nothing:
    what no schedule of this setting can beat."""
    plain = [m for m in found.values() if "packing" not in m.plan]
    return max(min(m.device_s for m in plain), min(m.link_s for m in plain))


def tighter_bound_s(found: Mapping[str, Measured]) -> float:
    """The same with what must come before what the link carries, and after it, of the strategy with the least of it: the order of
    its instructions is free, but which instructions there are is not."""
    plain = [m for m in found.values() if "packing" not in m.plan]
    return max(lower_bound_s(found), min(m.in_turn_s for m in plain))


def plain_bound_s(found: Mapping[str, Measured]) -> float | None:
    """The bound as the plain baseline has it, whose bytes nothing has lessened; None where it did not run."""
    plain = found.get(PLAIN)
    return None if plain is None else max(plain.device_s, plain.link_s)


def tuned_eager(found: Mapping[str, Measured]) -> str:
    """The name of eager's fastest variant."""
    return _fastest(EAGER, {name: m.step_s for name, m in found.items()}, lambda name: found[name].median_step_s)


def as_json(name: str, found: Mapping[str, Measured], *, slow_motion: float = 1.0) -> dict[str, Any]:
    """A setting, as tools/compare_strategies.py writes it.  `eager`: the fastest of its variants."""
    base = tuned_eager(found)
    strategies = {n: asdict(m) for n, m in found.items()}
    strategies[EAGER] = strategies[base]
    overrun = max(m.overrun_fraction for m in found.values())
    return {
        "name": name,
        "slow_motion": slow_motion,
        "lower_bound_s": lower_bound_s(found),
        "tighter_bound_s": tighter_bound_s(found),
        "plain_bound_s": plain_bound_s(found),
        "overrun_fraction": overrun,
        "valid": overrun <= VALID_OVERRUN,
        "strategies": strategies,
    }
