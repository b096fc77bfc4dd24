"""From seconds to figures: rates, the curve of products, what passes reach of the memory, and lines of collectives.  Pure.

Of two passes over everything the faster time counts: what disturbs a machine makes it slower.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalina.measure.shapes import Sizes, expert_key, pass_key, sent_key, sizes_of
from megalina.perfmodel.sim.collectives import Collective, phases_of

Curve = tuple[tuple[float, float], ...]
HALF_SIZES = tuple(2.0 ** (i / 4) for i in range(-8, 49))  # among which the half-size formula's best is looked for


@dataclass(frozen=True, slots=True)
class Measured:
    """What rank 0 writes.  `passes`: seconds by key, of everything twice; all times are of the slowest rank."""

    kind: str  # cpu | cuda
    device: str  # its name
    torch: str  # its version
    nodes: int
    ranks_per_node: int
    threads: int  # of each rank
    memory_gib: float  # of a rank
    dtypes: tuple[str, ...]  # the first one is what passes and attention were measured in
    instructions: int  # of the step of next to nothing ...
    instruction_kernels: float  # ... and its kernels
    tiny_ops: int
    passes: tuple[Mapping[str, float], ...]
    contention: Mapping[str, Mapping[str, Any]]
    core_share: float  # of its cores that the rank with the least had
    load: float  # average of the machine's last minute before it began

    @property
    def seconds(self) -> dict[str, float]:
        return {key: min(of[key] for of in self.passes) for key in self.passes[0]}

    @property
    def spread(self) -> dict[str, float]:
        """Of each time, by how much the slowest pass is above the fastest one."""
        return {key: max(of[key] for of in self.passes) / least - 1 for key, least in self.seconds.items()}

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.kind)


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a collective: latency_s + s_per_byte x bytes of the whole tensor; `error`: root mean square, relative."""

    latency_s: float
    s_per_byte: float
    error: float


@dataclass(frozen=True, slots=True)
class Wire:
    """One kind of link, as virtual time knows it: each message that waits for another one, and what a rank sends.

    `errors`: by collective, root mean square and relative, of this one line for all."""

    hop_s: float
    bytes_per_s: float  # inside a node of a rank's link, over nodes of a node's
    own: Mapping[str, Line]  # by collective
    errors: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Figures:
    flops_per_s: Mapping[str, float]  # by type, the best of all products
    curves: Mapping[str, Curve]  # by type: the smallest side, and the share of the best rate
    curve_error: float  # few rows, few columns, little depth, which it takes for one: root mean square of the logarithm
    half_size: float  # of the formula that fits the same products best ...
    half_size_error: float  # ... and its own error
    copy_bytes_per_s: float
    pass_bytes_per_s: float  # the model's own passes, in bytes that the cost model counts
    attention_share: float  # of the best rate
    kernel_s: float
    host_instruction_s: float
    wires: Mapping[str, Wire]  # inside | over

    @property
    def memory_bytes_per_s(self) -> float:
        """What is the most that either has reached: passes over what lies in a cache may be faster than a copy."""
        return max(self.copy_bytes_per_s, self.pass_bytes_per_s)


def figures_of(measured: Measured) -> Figures:
    seconds, sizes, own = measured.seconds, measured.sizes, measured.dtypes[0]
    kernel_s = seconds["tiny"] / measured.tiny_ops
    rates = {dtype: _rates(sizes, dtype, seconds) for dtype in measured.dtypes}
    best = {dtype: max(map(max, of_sides)) for dtype, of_sides in rates.items()}
    curves = {
        dtype: curve([(s, statistics.geometric_mean(of) / best[dtype]) for s, of in zip(sizes.sides, of_sides, strict=True)])
        for dtype, of_sides in rates.items()
    }
    half_size, half_size_error = _half_size(sizes, rates[own], best[own])
    attention_s = max(seconds["attention"], 1e-12)
    host_instruction_s = (seconds["tiny step"] - measured.instruction_kernels * kernel_s) / measured.instructions
    return Figures(
        flops_per_s=best,
        curves=curves,
        curve_error=_rms([math.log(rate / statistics.geometric_mean(of)) for of in rates[own] for rate in of]),
        half_size=half_size,
        half_size_error=half_size_error,
        copy_bytes_per_s=2 * sizes.copied_bytes / seconds["copy"],
        pass_bytes_per_s=statistics.harmonic_mean(*_rates_and_bytes(measured, kernel_s)),
        attention_share=min(1.0, sizes.attention_flops(own) / attention_s / best[own]),
        kernel_s=kernel_s,
        host_instruction_s=max(0.0, host_instruction_s),
        wires={where: wire_of(measured, where, kernel_s) for where in wheres(measured)},
    )


def pass_rates(measured: Measured, kernel_s: float) -> dict[str, float]:
    """Bytes a second of each pass, launches taken off."""
    out = {}
    for name, work in measured.sizes.passes(measured.dtypes[0]).items():
        took_s = measured.seconds[pass_key(name)]
        out[name] = work.moved_bytes / max(took_s - work.kernels * kernel_s, took_s / 10)
    return out


def _rates_and_bytes(measured: Measured, kernel_s: float) -> tuple[list[float], list[float]]:
    """For the rate of all passes together."""
    rates, passes = pass_rates(measured, kernel_s), measured.sizes.passes(measured.dtypes[0])
    return list(rates.values()), [passes[name].moved_bytes for name in rates]


def wheres(measured: Measured) -> list[str]:
    """Which links there are."""
    there = {"inside": measured.ranks_per_node > 1, "over": measured.nodes > 1}
    return [where for where, is_there in there.items() if is_there]


def curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Sizes, rising, with shares such that a smaller product takes no longer than a larger one: noise, and kernels that a library
    chooses badly for a size, are smoothed away by lifting the smaller one."""
    out: list[tuple[float, float]] = []
    for size, share in reversed(points):
        if out:
            larger, its_share = out[-1]
            share = max(share, its_share * size / larger)
        out.append((float(size), min(1.0, share)))
    return tuple(reversed(out))


def line(points: Sequence[tuple[float, float]]) -> Line:
    """Of (bytes, seconds) by least squares of relative errors; neither falls nor begins below zero."""
    latency_s, s_per_byte = _non_negative(np.array([(1 / s, n / s) for n, s in points]), np.ones(len(points)))
    return Line(latency_s, s_per_byte, _rms([(latency_s + s_per_byte * n) / s - 1 for n, s in points]))


def wire_of(measured: Measured, where: str, kernel_s: float) -> Wire:
    """One line for all collectives: each costs `kernel_s`, its messages that wait for one another, and what a rank sends.

    Over nodes all ranks of a node send side by side, and share its link."""
    ranks = measured.ranks_per_node if where == "inside" else measured.nodes
    beside = 1 if where == "inside" else measured.ranks_per_node
    points = {op: [(n, measured.seconds[sent_key(where, op.value, n)]) for n in measured.sizes.sent_bytes] for op in Collective}
    asked = {op: hops_and_bytes(op, ranks) for op in Collective}
    rows = [(asked[op][0] / s, asked[op][1] * beside * n / s) for op in Collective for n, s in points[op]]
    target = [1 - kernel_s / s for op in Collective for _, s in points[op]]
    hop_s, s_per_byte = _non_negative(np.array(rows), np.array(target))

    def found_s(op: Collective, num_bytes: float) -> float:
        hops, share = asked[op]
        return kernel_s + hops * hop_s + share * beside * num_bytes * s_per_byte

    errors = {op.value: _rms([found_s(op, n) / s - 1 for n, s in of]) for op, of in points.items()}
    return Wire(hop_s, 1 / max(s_per_byte, 1e-15), {op.value: line(of) for op, of in points.items()}, errors)


def hops_and_bytes(op: Collective, ranks: int) -> tuple[int, float]:
    """As virtual time has it: messages that wait for one another, and what a rank sends of a tensor of one byte."""
    phases = phases_of(op, range(ranks), ranks_per_node=ranks, algorithm="ring")
    sent = sum(float(np.bincount(phase.source_F, phase.bytes_F).max()) for phase in phases)
    return sum(phase.hops + phase.fast_hops for phase in phases), sent


def experts_s(measured: Measured) -> dict[int, float]:
    """Seconds of the layer of experts, by rows of each."""
    return {rows: measured.seconds[expert_key(measured.dtypes[0], rows)] for rows in measured.sizes.expert_rows}


def _rates(sizes: Sizes, dtype: str, seconds: Mapping[str, float]) -> list[list[float]]:
    """Of each side: with few rows, few columns, little depth."""
    return [[shape.flops / seconds[shape.key] for shape in of_side] for of_side in sizes.products(dtype)]


def _half_size(sizes: Sizes, rates: Sequence[Sequence[float]], best: float) -> tuple[float, float]:
    """The formula knows rows and columns alone."""
    large = sizes.large_side

    def error(half: float) -> float:
        found = [side / (side + half) * large / (large + half) for side in sizes.sides]
        return _rms([math.log(share * best / rate) for share, of in zip(found, rates, strict=True) for rate in of[:2]])

    half = min(HALF_SIZES, key=error)
    return half, error(half)


def _non_negative(rows_N2: Any, target_N: Any) -> tuple[float, float]:
    """Least squares with two unknowns, neither below zero."""
    first, second = np.linalg.lstsq(rows_N2, target_N, rcond=None)[0]
    if first >= 0 and second >= 0:
        return float(first), float(second)
    alone = [max(0.0, float(column @ target_N / (column @ column))) for column in rows_N2.T]
    misses = [float(((column * value - target_N) ** 2).sum()) for column, value in zip(rows_N2.T, alone, strict=True)]
    return (alone[0], 0.0) if misses[0] < misses[1] else (0.0, alone[1])


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(v * v for v in values))
