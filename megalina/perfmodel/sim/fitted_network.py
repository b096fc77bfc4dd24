"""A network's constants, fitted: those with which lists take as long in virtual time, and wait as long, as they did on ranks.

What a collective takes alone doesn't tell what it takes beside others: flows of TCP end one after another, rings stand still
between two messages, libraries have few threads.  So the constants are those of whole steps, of few lists.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megalina.perfmodel.sim.list_clock import OPS, ListClock
from megalina.perfmodel.sim.network import Network
from megalina.step.program import MOVABLE, Program

LEAST_S = 1e-6  # of a latency: a shorter one can't be told from none


class Free(NamedTuple):
    """A constant that is fitted.  All are in powers of e."""

    step: float  # the first one
    most: float  # so far from where it began, either way
    usual: float  # so far is no surprise


FREE = {
    "nic_bytes_per_s": Free(0.1, math.log(4), 0.2),
    "all_to_all_s": Free(1.0, math.log(100), 1.0),
    "latency_s": Free(1.0, math.log(100), 1.0),
    "hop_s": Free(1.0, math.log(100), 1.0),
    "weight": Free(0.5, math.log(8), 1.0),
}
RATE = {"nic_bytes_per_s": Free(0.4, math.log(100), math.inf)}
LATENCIES = {name: Free(1.0, math.log(100), 10.0) for name in ("all_to_all_s", "latency_s", "hop_s")}
LATENCIES["weight"] = FREE["weight"]
FASTER = 1.15  # the second network's rate over the first one's
FINE = 0.02  # of the first steps: with smaller ones the fit is over
PRICE = 3e-3  # of a constant that has gone its usual way, so that few measurements don't lead it astray
OF_WAITS = 0.5  # what a wait counts beside the time of the step


@dataclass(frozen=True, slots=True)
class Seen:
    """A list that ranks have walked: seconds of the step, and those that the device stood still for tokens and for gradients."""

    program: Program
    step_s: float
    tokens_s: float
    gradients_s: float


ClockOf = Callable[[Network, Program], ListClock]


def fitted(seen: Sequence[Seen], begin: Sequence[Network], clock_of: ClockOf, *, walks: int) -> list[Network]:
    """Two networks that fit, of the best one of those to begin with, after at most so many walks of all lists together.

    Few steps hardly tell a slow link from a faster one on which everything arrives later, and a search makes other lists of
    the second: those that leave what is sent more time.  So it is found with both: first the one whose latencies are about what
    they begin with, then the other.  ValueError for nothing to fit to or to begin with.

    Coordinates are tried in turn with steps that get smaller; so the same input gives the same networks."""
    if not seen or not begin:
        raise ValueError(f"{len(seen)} lists to fit to, {len(begin)} networks to begin with: give one at least of both")
    tries = walks // len(seen) // (2 * len(begin) + 1)
    by_rate = [_descended(seen, network, clock_of, RATE, tries) for network in begin]
    slow = min((_descended(seen, network, clock_of, FREE, tries) for _, network in by_rate), key=lambda found: found[0])[1]
    late = replace(slow, nic_bytes_per_s=slow.nic_bytes_per_s * FASTER)
    return [slow, _descended(seen, late, clock_of, LATENCIES, tries)[1]]


def error_of(seen: Sequence[Seen], network: Network, clock_of: ClockOf) -> float:
    """The sum of squares of what virtual time is off by, in shares of each step; slow lists count little."""
    total, fastest_s = 0.0, min(one.step_s for one in seen)
    for one in seen:
        step_s, tokens_s, gradients_s = walked(clock_of(network, one.program))
        off = (tokens_s - one.tokens_s, gradients_s - one.gradients_s)
        squares = math.log(step_s / one.step_s) ** 2 + sum((OF_WAITS * s / one.step_s) ** 2 for s in off)
        total += squares * (fastest_s / one.step_s) ** 4
    return total


def walked(clock: ListClock) -> tuple[float, float, float]:
    """Seconds of the step of the clock's list as it is, and of them those for tokens and for gradients, as `Seen`."""
    program = clock.program
    marks = [s.credit for s in program], [tuple(OPS[op] for op in s.yields_to) for s in program]
    walk = clock.walk(range(len(program)), *marks)
    tokens_s = sum(s for at, s in walk.idle if program[at].carries_tokens)
    gradients_s = sum(s for at, s in walk.idle if program[at].op in MOVABLE)
    return walk.step_s, tokens_s, gradients_s


def _descended(
    seen: Sequence[Seen], network: Network, clock_of: ClockOf, free: Mapping[str, Free], tries: int
) -> tuple[float, Network]:
    """Error and network."""
    begin = [math.log(max(LEAST_S if name.endswith("_s") else 0.0, _value(network, name))) for name in free]
    now, steps = list(begin), [f.step for f in free.values()]

    def at(x: Sequence[float]) -> Network:
        values = {name: math.exp(v) for name, v in zip(free, x, strict=True)}
        return replace(network, **values, fast_hop_s=values.get("hop_s", network.fast_hop_s))  # type: ignore[arg-type]

    def cost(x: Sequence[float]) -> float:
        moved = sum(((v - b) / f.usual) ** 2 for f, v, b in zip(free.values(), x, begin, strict=True))
        return error_of(seen, at(x), clock_of) + PRICE * moved

    best, tried = cost(now), 1
    while tried < tries and max(step / f.step for f, step in zip(free.values(), steps, strict=True)) > FINE:
        before = best
        for i, f in enumerate(free.values()):
            for step in (steps[i], -steps[i]):
                there = min(begin[i] + f.most, max(begin[i] - f.most, now[i] + step))
                if there == now[i] or tried >= tries:
                    continue
                other = [*now[:i], there, *now[i + 1 :]]
                tried += 1
                if (price := cost(other)) < best:
                    now, best = other, price
                    break
        if best >= before:
            steps = [step / 2 for step in steps]
    return best, at(now)


def _value(network: Network, name: str) -> float:
    value = getattr(network, name)
    return float(network.latency_s if value is None else value)
