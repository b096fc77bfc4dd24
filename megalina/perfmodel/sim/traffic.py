"""Traffic: what is on the links at a moment of virtual time, how fast each of it moves, and what ends next.

The same bundle of the same load has the same rate whichever rank sent it, so all that carries a load at one urgency is a stream,
which counts what one of them has been given since it began.  Of those with equally many bytes the first to join ends first.  So
hundreds of pieces under way at once cost no more than one.

Flows share links max-min fairly, by progressive filling, after strict classes (`fair_rates`).

Letters: L links, B bundles of a load, I places of bundles on links.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megalina.perfmodel.sim.collectives import Floats, Ints
from megalina.perfmodel.sim.network import Load

ROUNDING = 1e-12  # of what a bundle had to send: less is nothing
INSTANT = 1e-14  # of the time: what ends so close together ends together
DIGITS = 1e-15  # of what a stream has given: a sum's last digits
FULL = 1e-12  # of a link's capacity: less room than this is rounding


@dataclass(slots=True, eq=False)
class _Stream:
    """All that moves of one load at one urgency."""

    load: Load
    urgency: int
    given_B: Floats  # bytes that one of them got since the stream began
    live_B: Ints  # how many have something left
    rate_B: Floats
    byte_s_B: Floats  # the inverse; inf: stands
    queues: dict[float, "_Queue"] = field(default_factory=dict)  # by the tensor's bytes


@dataclass(slots=True, eq=False)
class _Queue:
    """Those of a stream that have equally many bytes."""

    whole_B: Floats
    head_B: Ints  # number of the first that has something left
    next_B: Floats  # what the stream has given once this one ends; inf: none
    joined: int = 0
    waiting: deque["Moving"] = field(default_factory=deque)  # something of them is left


@dataclass(slots=True, eq=False)
class Moving:
    """A load that is on its way."""

    load: Load
    urgency: int
    whole_B: Floats  # as `Load.amount_B`, for its number of bytes
    order: int  # of joining
    stream: _Stream
    queue: _Queue
    number: int  # in its queue
    ends_B: Floats  # what the stream has given once it ends

    @property
    def left_B(self) -> Floats:
        return np.where(self.number >= self.queue.head_B, self.ends_B - self.stream.given_B, 0.0)

    @property
    def rate_B(self) -> Floats:
        return np.where(self.number >= self.queue.head_B, self.stream.rate_B, 0.0)


class Traffic:
    """All that moves shares the links; whatever joins or ends changes the rates of all."""

    def __init__(self, capacity_L: Floats):
        self._capacity_L = capacity_L
        self._streams: dict[tuple[Load, int], _Stream] = {}
        self._now_s = 0.0
        self._count = 0
        self._links: dict[Load, int] = {}
        self._dropped = True  # since the last move or joining, what has nothing left
        self._rates: dict[
            tuple[tuple[Load, int, bytes], ...], list[tuple[Floats, Floats]]
        ] = {}  # layers are alike: it comes again

    @property
    def moving(self) -> tuple[Moving, ...]:
        return tuple(sorted((m for _, queue in self._queues() for m in queue.waiting), key=lambda m: m.order))

    def add(self, load: Load, num_bytes: float, urgency: int, now_s: float) -> Moving:
        """It moves once `settle` has been called, which must be at the same time."""
        self._advance(now_s)
        stream = self._streams.get((load, urgency))
        if stream is None:
            count = len(load.amount_B)
            stream = _Stream(load, urgency, np.zeros(count), np.zeros(count, int), np.zeros(count), np.full(count, math.inf))
            self._streams[load, urgency] = stream
        queue = stream.queues.get(num_bytes)
        if queue is None:
            whole_B = load.amount_B * num_bytes
            queue = stream.queues[num_bytes] = _Queue(whole_B, np.zeros(len(whole_B), int), np.full(len(whole_B), math.inf))
        ends_B = stream.given_B + queue.whole_B
        moving = Moving(load, urgency, queue.whole_B, self._count, stream, queue, queue.joined, ends_B)
        first_B = queue.head_B == queue.joined
        queue.next_B[first_B] = ends_B[first_B]
        queue.waiting.append(moving)
        queue.joined += 1
        stream.live_B += 1
        self._count += 1
        self._dropped = False
        return moving

    def ended(self, now_s: float) -> list[Moving]:
        """What has nothing left, in the order of joining; it is on no link any more."""
        self._advance(now_s)
        self._drop()
        over = []
        for _, queue in self._queues():
            while queue.waiting and (queue.head_B > queue.waiting[0].number).all():
                over.append(queue.waiting.popleft())
        if over:
            self._streams = {key: s for key, s in self._streams.items() if any(queue.waiting for queue in s.queues.values())}
        return sorted(over, key=lambda m: m.order) if len(over) > 1 else over

    def settle(self, now_s: float) -> float:
        """Share the links anew; when something ends next, which may be now.  inf with nothing on the way."""
        self._advance(now_s)
        next_s = math.inf
        if not self._dropped:
            self._drop()
            if any((queue.head_B > queue.waiting[0].number).all() for _, queue in self._queues()):
                next_s = now_s
        for streams in self._apart():
            key = tuple((s.load, s.urgency, s.live_B.tobytes()) for s in streams)
            if key not in self._rates:
                self._rates[key] = self._shared(streams)
            for stream, rates in zip(streams, self._rates[key], strict=True):
                stream.rate_B, stream.byte_s_B = rates
        for stream in self._streams.values():
            for queue in stream.queues.values():
                left_s = float(((queue.next_B - stream.given_B) * stream.byte_s_B).min(initial=math.inf))
                next_s = min(next_s, now_s + left_s)
        return next_s

    def _apart(self) -> list[list[_Stream]]:
        """The streams by links: those of different lists have none in common, not even through others, and share nothing."""
        found: list[tuple[int, list[int]]] = []
        streams = list(self._streams.values())
        for number, stream in enumerate(streams):
            links, members, others = self._links_of(stream.load), [number], []
            for other_links, other in found:
                if other_links & links:
                    links, members = links | other_links, other + members
                else:
                    others.append((other_links, other))
            found = [*others, (links, members)]
        return [[streams[number] for number in sorted(members)] for _, members in found]

    def _links_of(self, load: Load) -> int:
        """A bit for each link that it is on."""
        if load not in self._links:
            self._links[load] = sum(1 << link for link in set(load.link_I.tolist()))
        return self._links[load]

    def _queues(self) -> Iterator[tuple[_Stream, _Queue]]:
        return ((stream, queue) for stream in self._streams.values() for queue in stream.queues.values() if queue.waiting)

    def _advance(self, now_s: float) -> None:
        took_s, self._now_s = now_s - self._now_s, now_s
        if took_s:
            self._dropped = False
            for stream in self._streams.values():
                stream.given_B = stream.given_B + stream.rate_B * took_s

    def _drop(self) -> None:
        """Bundles that have ended leave the links."""
        if not self._dropped:
            self._dropped = True
            for stream, queue in self._queues():
                self._drop_of(stream, queue)

    def _drop_of(self, stream: _Stream, queue: _Queue) -> None:
        nothing_B = ROUNDING * queue.whole_B + INSTANT * self._now_s * stream.rate_B + DIGITS * stream.given_B
        while (over_B := queue.next_B - stream.given_B <= nothing_B).any():
            queue.head_B = queue.head_B + over_B
            stream.live_B = stream.live_B - over_B
            first = queue.waiting[0].number
            for b in np.flatnonzero(over_B):
                place = queue.head_B[b] - first
                queue.next_B[b] = queue.waiting[place].ends_B[b] if place < len(queue.waiting) else math.inf

    def _shared(self, streams: Sequence[_Stream]) -> list[tuple[Floats, Floats]]:
        """The rates of each stream's bundles, and their inverse; what has ended has none."""
        bundles, links, weights, urgencies = [], [], [], []
        count = 0
        for stream in streams:
            live_B, load = stream.live_B > 0, stream.load
            number_B = count + np.cumsum(live_B) - 1
            live_I = live_B[load.bundle_I]
            bundle_I = load.bundle_I[live_I]
            bundles.append(number_B[bundle_I])
            links.append(load.link_I[live_I])
            weights.append(load.weight_I[live_I] * stream.live_B[bundle_I])
            urgencies.append(np.full(int(live_B.sum()), stream.urgency))
            count += int(live_B.sum())
        rates = np.zeros(0)
        if count:
            used_L, link_I = np.unique(np.concatenate(links), return_inverse=True)
            rates = fair_rates(
                self._capacity_L[used_L], np.concatenate(bundles), link_I, np.concatenate(weights), np.concatenate(urgencies)
            )
        out, at = [], 0
        for stream in streams:
            live_B = stream.live_B > 0
            rate_B, byte_s_B = np.zeros(len(live_B)), np.full(len(live_B), math.inf)
            rate_B[live_B] = rates[at : at + int(live_B.sum())]
            at += int(live_B.sum())
            np.divide(1.0, rate_B, out=byte_s_B, where=rate_B > 0)
            out.append((rate_B, byte_s_B))
        return out


def fair_rates(capacity_L: Floats, bundle_I: Ints, link_I: Ints, weight_I: Floats, urgency_B: Ints) -> Floats:
    """The rate of each bundle.  A rate of one takes `weight_I` of a link.

    All rates of a class rise alike until a link is full; what crosses it stays there, the others go on (Bertsekas and Gallager,
    Data Networks, section 6.5.2).  Smaller urgencies come first, the next class gets what they leave.  Every bundle must be on a
    link."""
    rate_B = np.zeros(len(urgency_B))
    room_L = capacity_L.astype(float)
    for urgency in np.unique(urgency_B):
        rising_B = urgency_B == urgency
        level = 0.0
        while rising_B.any():
            on_I = rising_B[bundle_I]
            pull_L = np.bincount(link_I[on_I], weight_I[on_I], len(room_L))
            crossed_L = pull_L > 0
            level_L = np.full(len(room_L), np.inf)
            level_L[crossed_L] = np.maximum(room_L[crossed_L], 0.0) / pull_L[crossed_L]
            level = max(level, float(level_L.min()))
            full_L = level_L <= level * (1 + FULL)
            stops_B = np.zeros(len(rate_B), bool)
            stops_B[bundle_I[on_I & full_L[link_I]]] = True
            rate_B[stops_B] = level
            rising_B &= ~stops_B
            stops_I = stops_B[bundle_I]
            room_L -= np.bincount(link_I[stops_I], weight_I[stops_I] * level, len(room_L))
        room_L[room_L < FULL * capacity_L] = 0.0
    return rate_B
