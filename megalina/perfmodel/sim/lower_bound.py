"""Lower bounds: what no order of a list's instructions can beat on given devices and links."""

from collections.abc import Callable, Sequence

import numpy as np

from megalina.perfmodel.sim.network import Loads, Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import Instruction, Kind, Program, reads_of, writes_of


def lower_bound(
    programs: Sequence[Program],
    *,
    ranks_of: Callable[[str, int], tuple[int, ...]],
    seconds: Callable[[int, Instruction], float],
    network: Network,
    sizes: Sizes,
) -> dict[str, float]:
    """Rank r walks `programs[r]`.  `bound_s`: the longest of `compute_s`, the busiest device; `link_s`, all that the busiest link
    carries; `critical_path_s`, the longest chain of instructions that need each other, with the wire for each alone."""
    starts = {(s.axis, r) for r, program in enumerate(programs) for s in program if s.kind is Kind.START}
    everybody = set(range(len(programs))).union(*(ranks_of(axis, rank) for axis, rank in starts))
    loads = Loads(network, max(everybody) + 1)
    bytes_L = np.zeros(len(loads.capacity_L))
    compute_s = critical_path_s = 0.0
    for rank, program in enumerate(programs):
        ends_s: dict[str, float] = {}
        device_s = 0.0
        for instruction in program:
            took_s = 0.0
            if instruction.kind is Kind.COMPUTE:
                took_s = seconds(rank, instruction)
                device_s += took_s
            elif instruction.kind is Kind.START and len(ranks := ranks_of(instruction.axis, rank)) > 1:
                what, num_bytes, bytes_NN = sizes.sent(instruction, ranks)
                phases = loads.of(instruction.axis, what, ranks, bytes_NN)
                took_s = loads.alone_s(phases, num_bytes)
                if rank == ranks[0]:  # one for all of them
                    bytes_L += sum(load.bytes_on(len(bytes_L)) for load in phases) * num_bytes
            end_s = max((ends_s.get(v, 0.0) for v in reads_of(instruction)), default=0.0) + took_s
            for value in writes_of(instruction):
                ends_s[value] = max(end_s, ends_s.get(value, 0.0))
        compute_s = max(compute_s, device_s)
        critical_path_s = max(critical_path_s, *ends_s.values())
    link_s = float((bytes_L / loads.capacity_L).max())
    bound_s = max(compute_s, link_s, critical_path_s)
    return {"compute_s": compute_s, "link_s": link_s, "critical_path_s": critical_path_s, "bound_s": bound_s}


def in_turn_s(program: Program, *, seconds: Callable[[Instruction], float], link_s: Callable[[Instruction], float]) -> float:
    """What no order of the list's instructions can beat where one link carries all exchanges, in turn or at once.

    No exchange begins before all that leads to it, which one device computes, and after the last one of some there is still what
    follows from it.  So for any exchanges the step takes the least time before one of them, the time of all of them on the link,
    and the least time after one of them (heads and tails of one machine: Carlier 1982, "The one-machine sequencing problem").

    `seconds`: of an instruction that computes; `link_s`: how long a START keeps the link busy at its rate."""
    number = len(program)
    took_s = [seconds(s) if s.kind is Kind.COMPUTE else link_s(s) if s.kind is Kind.START else 0.0 for s in program]
    computes_s = [took if s.kind is Kind.COMPUTE else 0.0 for s, took in zip(program, took_s, strict=True)]
    written_by: dict[str, list[int]] = {}
    needs: list[set[int]] = []
    for i, instruction in enumerate(program):
        needs.append({j for value in reads_of(instruction) for j in written_by.get(value, ())})
        for value in writes_of(instruction):
            written_by.setdefault(value, []).append(i)
    followed_by: list[set[int]] = [set() for _ in program]
    for i, before in enumerate(needs):
        for j in before:
            followed_by[j].add(i)
    head_s = _before(range(number), needs, took_s, computes_s)
    tail_s = _before(range(number - 1, -1, -1), followed_by, took_s, computes_s)
    sent = [(head_s[i], tail_s[i], link_s(s)) for i, s in enumerate(program) if s.kind is Kind.START]
    found_s = 0.0
    for first_s in {head for head, _, _ in sent}:
        busy_s = 0.0
        for head, tail, on_link_s in sorted(sent, key=lambda one: -one[1]):
            if head >= first_s:
                busy_s += on_link_s
                found_s = max(found_s, first_s + busy_s + tail)
    return found_s


def _before(order: Sequence[int], needs: Sequence[set[int]], took_s: Sequence[float], computes_s: Sequence[float]) -> list[float]:
    """Of each instruction the least time before it: the longest chain, or all that one device must have computed."""
    out, all_before = [0.0] * len(order), [0] * len(order)  # bits of instructions
    for i in order:
        chain_s = 0.0
        for j in needs[i]:
            chain_s = max(chain_s, out[j] + took_s[j])
            all_before[i] |= all_before[j] | 1 << j
        device_s = sum(s for j, s in enumerate(computes_s) if all_before[i] >> j & 1)
        out[i] = max(chain_s, device_s)
    return out
