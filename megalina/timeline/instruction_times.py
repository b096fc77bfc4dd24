"""What instructions of a step took, from its events: measured ones, or those of virtual time."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from megalina.timeline.recorder import COMPUTE, SEND, Event


def times_of(events: Sequence[Event], shares: Mapping[str, float]) -> dict[str, float]:
    """Microseconds by `Instruction.timed_as`, the median of what whole micro-batches would take: of instructions that compute, of
    exchanges of tokens while they are on the wire.  `shares`: of the program, as `megalina.step.program.shares_of` has them."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.kind in (COMPUTE, SEND) and event.tag in shares and event.phase in "FBW":
            arrow = ">" if event.kind == SEND else ""
            found[f"{event.phase}:{event.name}{arrow}"].append(1e6 * (event.end_s - event.start_s) / shares[event.tag])
    return {kind: statistics.median(times_us) for kind, times_us in found.items()}
