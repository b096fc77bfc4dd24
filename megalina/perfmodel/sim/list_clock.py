"""A clock for lists: how long a step takes that all ranks walk alike, for thousands of orders of the same instructions.

It says what `simulate_alike` says, to rounding, in a millisecond: instructions are numbers in flat arrays, nothing is recorded,
and the walk of another order begins where it first differs from one that was walked before.  The walk is one long function, since
local names are what makes it quick; `virtual.py` has the same in readable pieces.
"""

import heapq
import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalina.perfmodel.sim.network import Load, Loads
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.traffic import DIGITS, INSTANT, ROUNDING, fair_rates
from megalina.perfmodel.sim.virtual import Deadlock
from megalina.step.program import Instruction, Kind, Op, Program

COMPUTE, START, WAIT, COUNTS = range(4)
WALK, READY, SHARE, ENDED, ARRIVED, MOVE = range(6)  # events
OPS = {op: i for i, op in enumerate(Op)}
STOPS = 24  # instructions between two states that are kept
State = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Walked:
    """A walk: how long it took, where the device stood still (place in the list, seconds), and states to go on from."""

    step_s: float
    idle: list[tuple[int, float]]
    stops: list[State]


class ListClock:
    """Of the instructions of `program`, numbered by their places in it, in any legal order.

    `seconds`, `sizes`: as of `simulate_alike`; `loads`: of folded ranks or, if there is one group of each axis, of all.
    ValueError for sizes that differ between ranks."""

    def __init__(
        self,
        program: Program,
        *,
        seconds: Callable[[Instruction], float],
        sizes: Sizes,
        loads: Loads,
        ranks_of: Callable[[str, int], tuple[int, ...]],
    ):
        if sizes.matrix_of is not None:
            raise ValueError("matrix_of says that ranks send different sizes: simulate every rank, or leave it out")
        self.program, self._loads, self._at_once = program, loads, loads.network.at_once
        self.seconds = [seconds(s) for s in program]
        self.compute_s = sum(s for s, i in zip(self.seconds, program, strict=True) if i.kind is not Kind.START)
        kinds = {Kind.COMPUTE: COMPUTE, Kind.START: START, Kind.WAIT: WAIT}
        self._kind = [COUNTS if s.kind is Kind.WAIT and s.op is Op.COUNTS else kinds[s.kind] for s in program]
        wire: dict[str, int] = {}
        self._asks: list[tuple[int, ...]] = []  # what must have arrived
        for i, instruction in enumerate(program):
            self._asks.append(tuple(dict.fromkeys(wire[v] for v in instruction.reads if v in wire)))
            if instruction.kind is Kind.START:
                wire.update(dict.fromkeys(instruction.writes, i))
            elif self._kind[i] == COUNTS:  # the reader of the sizes waits for them
                wire[instruction.writes[0]] = wire[instruction.reads[0]]
        axes = dict.fromkeys(s.axis for s in program if s.kind is Kind.START)
        lanes = {axis: n for n, axis in enumerate(axes)}
        self._lane = [lanes[s.axis] if s.kind is Kind.START else -1 for s in program]
        self._lanes = len(lanes)
        self._op = [OPS[s.op] if s.op is not None else -1 for s in program]
        self._classes: dict[tuple[int, int, int], int] = {}  # load, bundle, urgency
        self._class_load: list[tuple[Load, int, int]] = []
        self._phases: list[list[tuple[list[tuple[int, float]], float]]] = []  # of a START: flows, then a latency
        self.alone_s: list[float] = []  # of a START, with the wire to itself
        for instruction in program:
            self._phases.append([])
            self.alone_s.append(0.0)
            if instruction.kind is Kind.START and len(ranks := ranks_of(instruction.axis, 0)) > 1:
                what, num_bytes, _ = sizes.sent(instruction, ranks)
                of_step = loads.of(instruction.axis, what, ranks)
                assert instruction.op is not None
                urgency = loads.network.urgency(instruction.op)
                for load in of_step:
                    amounts = [float(a) * num_bytes for a in load.amount_B]
                    flows = [(self._class(load, b, urgency), amount) for b, amount in enumerate(amounts)]
                    self._phases[-1].append((flows, load.latency_s))
                self.alone_s[-1] = loads.alone_s(of_step, num_bytes)
        self._rates: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}
        self._owners = [load for load, _, _ in self._class_load]  # else their ids could be another's

    def _class(self, load: Load, bundle: int, urgency: int) -> int:
        key = id(load), bundle, urgency
        if key not in self._classes:
            self._classes[key] = len(self._classes)
            self._class_load.append((load, bundle, urgency))
        return self._classes[key]

    def _shared(self, live: tuple[int, ...]) -> tuple[list[float], list[float]]:
        """The rate of one of each class where so many of each are under way, and its inverse."""
        bundles, links, weights, urgencies, which = [], [], [], [], list[int]()
        for number, count in enumerate(live):
            if count:
                load, bundle, urgency = self._class_load[number]
                here_I = load.bundle_I == bundle
                links.append(load.link_I[here_I])
                weights.append(load.weight_I[here_I] * count)
                bundles.append(np.full(int(here_I.sum()), len(which)))
                urgencies.append(urgency)
                which.append(number)
        rates = [0.0] * len(live)
        inverse = [math.inf] * len(live)
        if which:
            used_L, link_I = np.unique(np.concatenate(links), return_inverse=True)
            found = fair_rates(
                self._loads.capacity_L[used_L], np.concatenate(bundles), link_I, np.concatenate(weights), np.array(urgencies)
            )
            for number, rate in zip(which, found.tolist(), strict=True):
                rates[number] = rate
                inverse[number] = 1.0 / rate if rate > 0 else math.inf
        return rates, inverse

    def walk(
        self,
        ids: Sequence[int],
        credit: Sequence[int],
        yields: Sequence[tuple[int, ...]],
        *,
        after: State | None = None,
        most_s: float = math.inf,
    ) -> Walked:
        """A step in the order `ids`, with these credits and what each instruction yields to (places in `OPS`).

        `after`: a stop of another walk with the same instructions before it; `most_s`: once it is sure to take longer, it ends
        with inf.  Deadlock where it has no end."""
        kind, asks, seconds, lane_of, op_of, phases, at_once = (
            self._kind, self._asks, self.seconds, self._lane, self._op, self._phases, self._at_once,
        )  # fmt: skip
        heappush, heappop, n = heapq.heappush, heapq.heappop, len(ids)
        if after is None:
            pos, now, clock, left_s, numbers, shares, joined = 0, 0.0, 0.0, self.compute_s, 0, 0, 0
            moved_s, will_share, dropped, blocked = 0.0, False, True, False
            heap: list[tuple[float, int, int, int]] = []
            done, ready, phase_of = bytearray(len(kind)), bytearray(len(kind)), bytearray(len(kind))
            left = [0] * len(kind)  # flows of a START that have not ended
            queues: list[list[int]] = [[] for _ in range(self._lanes)]
            heads, under_lane, under_op = [0] * self._lanes, [0] * self._lanes, [0] * len(OPS)
            lane_order: list[int] = []
            flows: list[list[tuple[float, int, int, float]]] = [[] for _ in self._class_load]
            given, live = [0.0] * len(flows), [0] * len(flows)
            over: list[tuple[int, int]] = []
            rates, inverse = [0.0] * len(flows), [math.inf] * len(flows)
            idle: list[tuple[int, float]] = []
        else:
            pos, now, clock, left_s, numbers, shares, joined, moved_s, will_share, dropped, blocked = after[:11]
            heap, lane_order, given, live, over, rates, inverse, idle, left, heads, under_lane, under_op = map(list, after[11:23])
            done, ready, phase_of = map(bytearray, after[23:26])
            queues, flows = [list(q) for q in after[26]], [list(f) for f in after[27]]
        stops: list[State] = []
        next_stop = pos
        walking, event = True, WALK
        while True:
            look = share = False
            moves: list[int] = []
            if not walking:
                if not heap:
                    break
                now, _, event, number = heappop(heap)
                if event == ARRIVED:
                    done[number] = 1
                    under_lane[lane_of[number]] -= 1
                    under_op[op_of[number]] -= 1
                    look, walking, blocked = True, blocked, False
                elif event == READY:
                    ready[number] = 1
                    look = True
                elif event == ENDED:
                    if number != shares:
                        continue
                    share = True
                elif event == SHARE:
                    will_share = False
                    share = True
                elif event == MOVE:
                    moves.append(number)
                else:
                    walking = True
            if look:
                for lane in lane_order:
                    queue = queues[lane]
                    while heads[lane] < len(queue):
                        first = queue[heads[lane]]
                        if not ready[first] or not all(done[a] for a in asks[first]):
                            break
                        if (most := credit[first]) and under_lane[lane] >= most:
                            break
                        if at_once and under_lane[lane] >= at_once:
                            break
                        if (to := yields[first]) and self._held(to, queues, heads, under_op, ready):
                            break
                        heads[lane] += 1
                        under_lane[lane] += 1
                        under_op[op_of[first]] += 1
                        moves.append(first)
            if moves or share:
                if took_s := now - moved_s:
                    moved_s, dropped = now, False
                    for c, count in enumerate(live):
                        if count:
                            given[c] += rates[c] * took_s
            for start in moves:  # its next phase joins what is on the links
                of_phase = phases[start][phase_of[start]][0]
                for c, amount in of_phase:
                    insort(flows[c], (given[c] + amount, joined, start, amount))
                    live[c] += 1
                left[start] = len(of_phase)
                if not of_phase:
                    over.append((joined, start))
                joined += 1
                dropped = False
                if not will_share:
                    will_share = True
                    numbers += 1
                    heappush(heap, (now, numbers, SHARE, 0))
            if share:
                if not dropped:
                    dropped = True
                    for c, count in enumerate(live):
                        if count:
                            of_class, nothing = flows[c], INSTANT * now * rates[c] + DIGITS * given[c]
                            while of_class and of_class[0][0] - given[c] <= ROUNDING * of_class[0][3] + nothing:
                                _, order, start, _ = of_class.pop(0)
                                live[c] -= 1
                                left[start] -= 1
                                if not left[start]:
                                    over.append((order, start))
                            if not live[c]:
                                given[c] = 0.0
                if event == ENDED:
                    over.sort()
                    for _, start in over:
                        latency_s = phases[start][phase_of[start]][1]
                        phase_of[start] += 1
                        numbers += 1
                        what = MOVE if phase_of[start] < len(phases[start]) else ARRIVED
                        heappush(heap, (now + latency_s, numbers, what, start))
                    over = []
                shares += 1
                next_s = now if over else math.inf
                key = tuple(live)
                known = self._rates.get(key)
                if known is None:
                    known = self._rates[key] = self._shared(key)
                rates, inverse = known
                for c, count in enumerate(live):
                    if count:
                        ends_s = now + (flows[c][0][0] - given[c]) * inverse[c]
                        if ends_s < next_s:
                            next_s = ends_s
                if next_s < math.inf:
                    numbers += 1
                    heappush(heap, (next_s, numbers, ENDED, shares))
            if not walking:
                continue
            walking = False
            while pos < n:
                if pos >= next_stop:
                    next_stop = pos + STOPS
                    if max(clock, now) + left_s > most_s:
                        return Walked(math.inf, idle, stops)
                    state = (
                        pos, now, clock, left_s, numbers, shares, joined, moved_s, will_share, dropped, blocked,
                        heap[:], lane_order[:], given[:], live[:], over[:], rates, inverse, idle[:], left[:], heads[:],
                        under_lane[:], under_op[:], bytes(done), bytes(ready), bytes(phase_of),
                        [q[:] for q in queues], [f[:] for f in flows],
                    )  # fmt: skip
                    stops.append(state)
                i = ids[pos]
                what = kind[i]
                missing = False
                for a in asks[i]:
                    if not done[a]:
                        missing = True
                        break
                if clock > now and (what or missing):
                    numbers += 1
                    heappush(heap, (clock, numbers, WALK, 0))
                    break
                if what == COMPUTE or (what == WAIT and not missing):
                    if missing:
                        blocked = True
                        break
                    if now > clock:
                        idle.append((pos, now - clock))
                        clock = now
                    clock += seconds[i]
                    left_s -= seconds[i]
                elif what == START:
                    if not phases[i]:
                        done[i] = 1
                    else:
                        lane = lane_of[i]
                        if lane not in lane_order:
                            lane_order.append(lane)
                        queues[lane].append(i)
                        numbers += 1
                        heappush(heap, (now + seconds[i], numbers, READY, i))
                elif what == WAIT:
                    blocked = True
                    break
                pos += 1
        if pos < n:
            raise Deadlock(f"no rank can go on at {self.program[ids[pos]].tag}")
        return Walked(clock, idle, stops)

    def _held(
        self, to: tuple[int, ...], queues: list[list[int]], heads: list[int], under_op: list[int], ready: bytearray
    ) -> bool:
        """Whether something that is yielded to is under way, or heads a lane and the device has it."""
        if any(under_op[op] for op in to):
            return True
        first = (queue[head] for queue, head in zip(queues, heads, strict=True) if head < len(queue))
        return any(ready[i] and self._op[i] in to for i in first)
