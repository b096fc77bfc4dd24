"""A MoE layer's forward pass, taken apart: what its time goes to."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from megalina.timeline.recorder import COMPUTE, SEND, Event

ALL_TO_ALL = "all-to-all"


def forward_seconds(events: Sequence[Event]) -> dict[str, float]:
    """{instruction: seconds}, of one rank's step, mean over its MoE layers; nothing if there are none.

    Attention isn't in it.  An exchange counts with its time on the wire, as long as this rank saw it, "all-to-all dispatch"
    and "all-to-all combine" among them; what overlaps is counted twice."""
    layers = {e.layer for e in events if e.op == "tokens"}
    total_s: defaultdict[str, float] = defaultdict(float)
    for e in events:
        if e.phase != "F" or e.layer not in layers or e.name.startswith("attention") or e.kind not in (COMPUTE, SEND):
            continue
        total_s[f"{ALL_TO_ALL} {e.name}" if e.op == "tokens" else e.name] += e.end_s - e.start_s
    return {name: seconds / len(layers) for name, seconds in total_s.items()}


def all_to_all_share(seconds: Mapping[str, float]) -> float:
    """The share of the all-to-alls in `forward_seconds`."""
    total_s = sum(seconds.values())
    return sum(s for name, s in seconds.items() if name.startswith(ALL_TO_ALL)) / total_s if total_s else 0.0
