"""The tables of an analysis of all-to-alls, with the Lina paper's numbers beside (Li et al., USENIX ATC 2023)."""

from collections.abc import Sequence

from megalina.timeline.contention import quantile
from papers.lina.alltoall import PAPER_SHARE, QUANTILES, VALID_OVERRUN, Analysis

Line = tuple[str, ...]


def report(analyses: Sequence[Analysis], *, steps: int, note: str = "") -> str:
    """All tables, for people.  `note` stands in the first line, such as that devices are emulated."""
    first = analyses[0]
    head = f"{first.ranks} ranks, strategy {first.strategy}, {steps} steps" + (f"; {note}" if note else "")
    late = max(a.overrun_fraction for a in analyses)
    if late > VALID_OVERRUN:
        head += f"\nnot valid: the real math was late by {late:.1%} of the devices' time (more than {VALID_OVERRUN:.0%}): give "
        head += "the devices longer times, or the machine fewer ranks and less other work"
    return "\n\n".join([head, _step(analyses), _layer(analyses), _slowdowns(analyses), _device(analyses)])


def _step(analyses: Sequence[Analysis]) -> str:
    title = "All-to-all in a step.  The paper's mean over its models: 34.1% of the step (section 2.2)"
    lines = [("experts", "on ranks", "step ms", "all-to-all ms", "share", "device waits ms", "share", "paper's share")]
    for a in analyses:
        wire, waits = (_ms(a.a2a_wire_s), f"{a.a2a_share:.1%}"), (_ms(a.a2a_exposed_s), f"{a.a2a_exposed_share:.1%}")
        lines.append((str(a.experts), str(a.ep), _ms(a.step_s), *wire, *waits, _papers(a.experts)))
    return _table(title, lines)


def _papers(experts: int) -> str:
    if experts not in PAPER_SHARE:
        return "-"
    low, high = PAPER_SHARE[experts]
    return f"{low:.1%}" if low == high else f"{100 * low:.1f} to {high:.1%}"


def _layer(analyses: Sequence[Analysis]) -> str:
    title = "The forward pass of one MoE layer, without attention.  The paper's all-to-alls: 74.9% of it (Figure 2)"
    lines: list[Line] = [("ms", *(f"{a.experts} experts" for a in analyses))]
    for name in dict.fromkeys(name for a in analyses for name in a.layer_s):
        lines.append((name, *(_ms(a.layer_s.get(name, 0.0)) for a in analyses)))
    lines.append(("all-to-alls, share", *(f"{a.layer_a2a_share:.1%}" for a in analyses)))
    return _table(title, lines)


def _slowdowns(analyses: Sequence[Analysis]) -> str:
    title = "Slowdown of all-to-alls: times as long as with all links to themselves.  The paper: Figure 3"
    lines: list[Line] = [("experts", "in backward under gradients", *QUANTILES, "beside nothing", *QUANTILES)]
    for a in analyses:
        lines.append((str(a.experts), *_distribution(a.slowdowns_under_grads), *_distribution(a.slowdowns_clear)))
    lines.append(("paper", "1,500", "1.83", "-", "4.14", "-", "-", "-", "-"))
    return _table(title, lines)


def _device(analyses: Sequence[Analysis]) -> str:
    title = "The device.  The paper's computes at 3.7% of its rate while an all-to-all runs (SM efficiency, section 2.2)"
    lines: list[Line] = [("experts", "idle, of the step", "computes, of the time of all-to-alls", "waits for gradients ms")]
    for a in analyses:
        lines.append((str(a.experts), f"{a.idle_share:.1%}", f"{a.busy_under_a2a:.1%}", _ms(a.grads_exposed_s)))
    return _table(title, lines)


def _distribution(slowdowns: Sequence[float]) -> Line:
    values = (quantile(slowdowns, share) for share in QUANTILES.values())
    return f"{len(slowdowns):,}", *("-" if value is None else f"{value:.2f}" for value in values)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _table(title: str, lines: Sequence[Line]) -> str:
    """The first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(f"{text:{'<' if i == 0 else '>'}{widths[i]}}" for i, text in enumerate(line)).rstrip() for line in lines]
    return "\n".join([title, *(f"  {row}" for row in rows)])
