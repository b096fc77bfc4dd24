"""Which ranges of the forward pass to partition, and into how many parts: a dynamic program over virtual times (Lancet, Jiang et
al. 2024, section 5.1).

The fastest way to an instruction is the fastest way to an earlier one and then the range between them, whole or in parts.  Ranges
begin at a block or behind a router, and end at a block.  The paper's limit of one MoE layer for a range is wider here.
"""

from collections.abc import Iterator
from dataclasses import replace

from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.plan_settings import AUTO, plan_of
from megalina.step.partition import MOST_PARTS, NONE, Range, in_parts, routes, with_own_counts
from megalina.step.plan import Plan
from megalina.step.program import Program
from megalina.step.strategy import forward_pass

LONGEST = 3  # layers of a range, but for the widest one


def with_partition(config: PretrainConfig, world: int) -> PretrainConfig:
    """The configuration with the ranges that are fastest on its cluster, where strategy.partition=auto asks for them.

    ValueError where the cluster's file lacks figures."""
    strategy = config.strategy
    if strategy.partition != AUTO:
        return config
    vocab_size = config.model.vocab_size or config.data.vocab_size
    plan = best_partition(config, world, plan_of(strategy, packing=1), vocab_size=vocab_size)
    return replace(config, strategy=replace(strategy, partition=plan.partition, partition_backward=plan.partition_backward))


def best_partition(config: PretrainConfig, world: int, plan: Plan, *, vocab_size: int, step: PricedStep | None = None) -> Plan:
    """The plan with the fastest of: no partition, the widest ranges in 2 to 8 parts, those of the dynamic program; backward whole
    and mirrored.  `step`: the same plan without partition, priced elsewhere."""
    plan = replace(plan, partition=NONE, partition_backward="whole")
    step = step or PricedStep(config, world, plan, vocab_size=vocab_size)
    try:
        took_s = {plan: step.walk().step_s}
    except ValueError as error:
        raise ValueError(
            f"strategy.partition=auto simulates steps on cluster={config.cluster.name}, and can't: {error}; give a cluster with "
            "figures (megalina plan --help, tools/measure_cluster.py), or a number of parts"
        ) from error
    numbers = parts_of(config)
    texts = [*map(str, numbers), ",".join(map(str, best_ranges(step, numbers)))]
    for text in filter(None, texts):
        for backward in ("whole", "mirrored"):
            other = replace(plan, partition=text, partition_backward=backward)
            took_s[other] = step.under(other).walk().step_s
    return min(took_s, key=lambda p: took_s[p])


def parts_of(config: PretrainConfig) -> list[int]:
    """Into how many parts a micro-batch can be cut."""
    sequences = config.train.micro_batch_size // config.parallel.tp
    return [k for k in range(2, MOST_PARTS + 1) if sequences % k == 0 and config.train.micro_batch_size % config.parallel.tp == 0]


def best_ranges(step: PricedStep, numbers: list[int]) -> tuple[Range, ...]:
    """Of a forward pass by itself."""
    shape = step.setting.shape
    forward = with_own_counts(forward_pass(step.setting))
    points = _points(forward)
    if not points or not numbers:
        return ()
    known: dict[tuple[object, ...], float] = {}

    def seconds(start: int, stop: int, parts: int) -> float:
        body = forward[start:stop]
        base = body[0].layer
        key = parts, *((s.name, s.kind, s.layer - base, s.chunk, s.part, s.late) for s in body)
        if key not in known:
            if parts > 1:
                body = tuple(in_parts(body, forward[stop:], parts, one_group=shape.micro_batch_groups))
            known[key] = step.walk(program=body).step_s
        return known[key]

    best: dict[int, tuple[float, tuple[Range, ...]]] = {points[0]: (0.0, ())}
    for n, stop in enumerate(points[1:], 1):
        before = points[n - 1]
        options = [(best[before][0] + seconds(before, stop, 1), best[before][1])]
        for start in _starts(forward, points[:n], stop, whole_routers=shape.whole_routers):
            for parts in numbers:
                r = Range(_name(forward, start), _name(forward, stop - 1), parts)
                options.append((best[start][0] + seconds(start, stop, parts), (*best[start][1], r)))
        best[stop] = min(options, key=lambda option: option[0])
    return best[points[-1]][1]


def _name(forward: Program, at: int) -> str:
    return f"{forward[at].name}.{forward[at].layer}"


def _points(forward: Program) -> list[int]:
    """Where ranges may begin: at a block, or behind a router; the end of the last layer is the last one."""
    layers = [i for i, s in enumerate(forward) if s.layer >= 0]
    routers = [i for i in layers if routes(forward[i])]
    if not routers:
        return []
    blocks = [i for i in layers if i == layers[0] or _reads_stream(forward, i)]
    return sorted({*blocks, *(i + 1 for i in routers), layers[-1] + 1})


def _reads_stream(forward: Program, i: int) -> bool:
    """Whether layers read but one value of what went before: the residual stream."""
    before = {v for s in forward[:i] for v in s.writes}
    return len({v for s in forward[i:] if s.layer >= 0 for v in s.reads} & before) == 1


def _starts(forward: Program, points: list[int], stop: int, *, whole_routers: bool) -> Iterator[int]:
    """Where a range that ends at `stop` may begin."""
    if stop < len(forward) and forward[stop].layer >= 0 and not _reads_stream(forward, stop):
        return  # behind a router nothing ends
    for start in points:
        body = forward[start:stop]
        layers = {s.layer for s in body}
        if not any(s.carries_tokens for s in body) or (whole_routers and any(map(routes, body))):
            continue
        if len(layers) <= LONGEST:
            yield start
