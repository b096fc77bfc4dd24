"""A simulator of the simplest kind, to hold the real one against: fractions, names of links, loops; from change to change."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megalina.perfmodel.sim.collectives import Phase
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import Instruction, Kind, Op, Program

Link = Hashable


def way(network: Network, source: int, target: int) -> list[Link]:
    """The names of the links from a rank to another."""
    node, other = source // network.ranks_per_node, target // network.ranks_per_node
    out: list[Link] = []
    if node == other or network.nic_behind_port:
        out += [("port out", source), ("port in", target)]
    if node != other:
        cards, per_node = network.nics_per_node, network.ranks_per_node
        out += [
            ("nic out", node, source % per_node * cards // per_node),
            ("nic in", other, target % per_node * cards // per_node),
        ]
        if network.nodes_per_group and node // network.nodes_per_group != other // network.nodes_per_group:
            out += [("up", node // network.nodes_per_group), ("down", other // network.nodes_per_group)]
    return out


def capacity(network: Network, link: Link) -> Fraction:
    kind = link[0]
    if "port" in kind:
        return Fraction(network.fast_bytes_per_s)
    if "nic" in kind:
        return Fraction(network.nic_bytes_per_s)
    cards = network.nodes_per_group * network.nics_per_node
    return cards * Fraction(network.nic_bytes_per_s) / Fraction(network.oversubscription)


@dataclass(eq=False)
class Stream:
    """A flow; or all of a collective, with bytes as if its fullest link were a second long."""

    takes: dict[Link, Fraction]  # of each link for a rate of one
    left: Fraction
    urgency: int
    owner: tuple


def rates(streams: Sequence[Stream], capacities: Callable[[Link], Fraction]) -> dict[Stream, Fraction]:
    found: dict[Stream, Fraction] = {}
    for urgency in sorted({s.urgency for s in streams}):
        rising = [s for s in streams if s.urgency == urgency]
        while rising:
            level: dict[Link, Fraction] = {}
            for link in {link for s in rising for link in s.takes}:
                used = sum(found[s] * s.takes[link] for s in found if link in s.takes)
                level[link] = (capacities(link) - used) / sum(s.takes[link] for s in rising if link in s.takes)
            lowest = min(level.values())
            stopped = [s for s in rising if any(level[link] == lowest for link in s.takes)]
            found.update(dict.fromkeys(stopped, lowest))
            rising = [s for s in rising if s not in stopped]
    return found


def streams_of(network: Network, phase: Phase, num_bytes: Fraction, urgency: int, owner: tuple) -> list[Stream]:
    flows = []
    for source, target, part in zip(phase.source_F.tolist(), phase.target_F.tolist(), phase.bytes_F.tolist(), strict=True):
        size = Fraction(part).limit_denominator(10**6) * num_bytes
        flows.append(Stream(dict.fromkeys(way(network, source, target), Fraction(1)), size, urgency, owner))
    if network.share == "flow" or not flows:
        return flows
    bytes_on: dict[Link, Fraction] = {}
    for flow in flows:
        for link in flow.takes:
            bytes_on[link] = bytes_on.get(link, Fraction(0)) + flow.left
    alone = max(size / capacity(network, link) for link, size in bytes_on.items())
    return [Stream({link: size / alone for link, size in bytes_on.items()}, alone, urgency, owner)]


def step_s(
    program: Program,
    ranks: int,
    *,
    ranks_of: Callable[[str, int], tuple[int, ...]],
    seconds: Mapping[tuple[int, Instruction], Fraction],
    network: Network,
    sizes: Sizes,
) -> Fraction:
    """Of a list without anything that is held back."""
    now, at, busy = Fraction(0), [0] * ranks, [Fraction(0)] * ranks
    here: dict[tuple, set[int]] = {}
    phases: dict[tuple, list[Phase]] = {}
    size: dict[tuple, Fraction] = {}
    due: dict[tuple, Fraction] = {}  # when the latency of what was sent last is over
    arrived: set[tuple] = set()
    streams: list[Stream] = []

    def go(owner: tuple) -> None:
        tokens = owner[0].axis == "ep" and owner[0].op in (Op.GATHER, Op.SCATTER)  # all of them, to all experts
        urgency = network.urgency(Op.TOKENS if tokens else owner[0].op)
        flows = streams_of(network, phases[owner][0], size[owner], urgency, owner)
        streams.extend(flows)
        if not flows:
            end(owner)

    def end(owner: tuple) -> None:
        phase = phases[owner].pop(0)
        hops_s = phase.hops * Fraction(network.hop_s) + phase.fast_hops * Fraction(network.fast_hop_s)
        due[owner] = now + hops_s + (0 if phases[owner] else Fraction(network.latency_s))

    def walk(rank: int) -> bool:
        instruction = program[at[rank]]
        if instruction.kind is Kind.COMPUTE:
            busy[rank] = now + seconds[rank, instruction]
        elif instruction.kind is Kind.START:
            owner = (instruction, ranks_of(instruction.axis, rank))
            here.setdefault(owner, set()).add(rank)
            if here[owner] == set(owner[1]):
                what, num_bytes, bytes_NN = sizes.sent(instruction, owner[1])
                phases[owner], size[owner] = list(network.phases(what, owner[1], bytes_NN)), Fraction(num_bytes)
                go(owner)
        elif (next(s for s in program if s.writes == instruction.reads), ranks_of(instruction.axis, rank)) not in arrived:
            return False
        at[rank] += 1
        return True

    def go_on() -> bool:
        """What ends or begins at this very moment; whether there was anything."""
        over = [owner for owner, time in due.items() if time <= now]
        for owner in over:
            del due[owner]
            if phases[owner]:
                go(owner)
            else:
                arrived.add(owner)
        return bool(over) or any(busy[r] <= now and at[r] < len(program) and walk(r) for r in range(ranks))

    while True:
        while go_on():
            pass
        if all(busy[r] <= now and at[r] == len(program) for r in range(ranks)):
            return now
        speed = rates(streams, lambda link: capacity(network, link))
        ends = [now + s.left / speed[s] for s in streams if speed[s]] + [t for t in (*busy, *due.values()) if t > now]
        after = min(ends)
        for s in streams:
            s.left -= speed[s] * (after - now)
        over = {s.owner for s in streams if not s.left} - {s.owner for s in streams if s.left}
        streams[:] = [s for s in streams if s.left]
        now = after
        for owner in over:
            end(owner)
