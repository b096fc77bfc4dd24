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
