"""What all-to-alls cost a training step, after sections 2.2 and 4 of the Lina paper (Li et al., USENIX ATC 2023)."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megalina.timeline.contention import Alone, Contention, all_to_alls, quantile, summary
from megalina.timeline.recorder import Event
from papers.lina.moe_layer import all_to_all_share, forward_seconds

# Smallest and largest share of the step by number of experts, which are as many as devices: Table 1 and Figure 4
PAPER_SHARE = {2: (0.334, 0.334), 4: (0.354, 0.382), 16: (0.368, 0.445)}
VALID_OVERRUN = 0.05  # beyond it the emulated devices' times are those of this machine
QUANTILES = {"median": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Analysis:
    """One setting.  Times are medians over steps of means over ranks; shares are of step_s unless said."""

    experts: int  # of a layer
    ep: int  # ranks that share them
    ranks: int
    strategy: str
    step_s: float
    a2a_wire_s: float  # as long as a rank saw it, its waiting for other ranks with it
    a2a_share: float
    a2a_exposed_s: float
    a2a_exposed_share: float
    grads_wire_s: float
    grads_exposed_s: float
    params_exposed_s: float  # ZeRO-1's updated weights
    idle_share: float  # the device did not compute
    busy_under_a2a: float  # share of a2a_wire_s in which it did
    layer_s: Mapping[str, float]  # one MoE layer's forward pass, by what it goes to
    layer_a2a_share: float  # of the sum of layer_s
    slowdowns_under_grads: Sequence[float]  # sorted: all-to-alls of backward that shared the wire with gradients, against alone
    slowdowns_clear: Sequence[float]  # sorted: those of both passes that had the wire for themselves
    overrun_fraction: float  # share of the emulated devices' time by which the real math was late; 0 where devices are real


def analysis_of(
    steps: Sequence[Sequence[Sequence[Event]]],
    alone: Mapping[str, Alone],
    *,
    groups: Sequence[Sequence[int]],
    experts: int,
    strategy: str,
    overrun_fraction: float = 0.0,
) -> Analysis:
    """`steps`: events [step][rank].  `groups`: the rows of ranks along ep, who exchange tokens among themselves."""
    summaries = [[summary(events, alone) for events in by_rank] for by_rank in steps]

    def middle(number: Callable[[Contention], float]) -> float:
        return statistics.median(statistics.fmean(map(number, by_rank)) for by_rank in summaries)

    exchanges = [e for by_rank in steps for row in groups for e in all_to_alls([by_rank[rank] for rank in row], alone)]
    layers = [forward_seconds(events) for by_rank in steps for events in by_rank]
    layer_s = {name: statistics.fmean(layer.get(name, 0.0) for layer in layers) for name in layers[0]}
    return Analysis(
        experts=experts,
        ep=len(groups[0]),
        ranks=len(steps[0]),
        strategy=strategy,
        step_s=middle(lambda c: c.step_s),
        a2a_wire_s=middle(lambda c: c.traffic["a2a"].wire_s),
        a2a_share=middle(lambda c: c.traffic["a2a"].wire_s / c.step_s),
        a2a_exposed_s=middle(lambda c: c.traffic["a2a"].exposed_s),
        a2a_exposed_share=middle(lambda c: c.traffic["a2a"].exposed_s / c.step_s),
        grads_wire_s=middle(lambda c: c.traffic["grads"].wire_s),
        grads_exposed_s=middle(lambda c: c.traffic["grads"].exposed_s),
        params_exposed_s=middle(lambda c: c.traffic["params"].exposed_s),
        idle_share=middle(lambda c: c.idle_share),
        busy_under_a2a=middle(lambda c: c.traffic["a2a"].under.get("compute", 0.0)),
        layer_s=layer_s,
        layer_a2a_share=all_to_all_share(layer_s),
        slowdowns_under_grads=sorted(e.slowdown for e in exchanges if "grads" in e.beside and e.phase == "B"),
        slowdowns_clear=sorted(e.slowdown for e in exchanges if not e.beside),
        overrun_fraction=overrun_fraction,
    )


def as_json(analyses: Sequence[Analysis], *, steps: int, note: str) -> dict[str, Any]:
    """All numbers, and every slowdown; null for quantiles of no slowdowns."""
    settings = [
        asdict(a)
        | {f"slowdown_under_grads_{name}": quantile(a.slowdowns_under_grads, share) for name, share in QUANTILES.items()}
        | {f"slowdown_clear_{name}": quantile(a.slowdowns_clear, share) for name, share in QUANTILES.items()}
        for a in analyses
    ]
    return {"settings": settings, "steps": steps, "note": note}
