"""Hypotheses about gradients that were summed over other ranks than those that hold copies."""

from collections.abc import Iterator

from torch import Tensor

from megalina.verify.evidence import Cause, Evidence, Pair, close, counted, held, merged, total

Ranks = list[list[int]]  # a partition of the ranks


def experts_over_other_ranks(evidence: Evidence) -> Iterator[Cause]:
    """Expert gradients summed along another axis.

    A rank's part P is not recorded, only sums of it.  If they are sums along `axis`, ranks of one row of it have the same; and
    over any set of ranks that is made of whole rows of `axis` and of whole rows of copies, those sums and the right ones
    (which the reference has) add up to the same: all P of the set.
    """
    wrong = evidence.wrong("gradient")
    if evidence.layout.world == 1 or not wrong or not all(evidence.is_expert(p.name) for p in wrong):
        return
    copies = evidence.rows["copies"]
    axes: dict[str, Ranks] = {"nobody": [[r] for r in range(evidence.layout.world)]}
    axes |= {axis: evidence.rows[axis] for axis in ("tp", "edp", "ep", "dp", "world")}
    tried: list[Ranks] = [copies]
    for axis, parts in axes.items():
        finer = all(any(set(part) <= set(row) for row in copies) for part in parts)
        if parts in tried or (finer and all(p.copies_agree for p in wrong)):
            continue
        tried.append(parts)
        if not all(_explains(evidence, pair, parts) for pair in wrong):
            continue
        where = f"over {axis} (ranks {parts[0]} and so on)" if axis != "nobody" else "over nobody"
        name = "expert_gradient_not_reduced" if finer else "groups_exchanged"
        why = "copies of an expert have different gradients" if finer else "gradients of different experts are mixed"
        yield Cause(
            name, f"gradients of the experts ({counted(wrong)}) are summed {where}, not over edp x tp (ranks {copies[0]}): {why}"
        )


def copied_over_tp(evidence: Evidence) -> Iterator[Cause]:
    """Gradients of what every tp rank holds are parts, whose sum over tp is right."""
    wrong = evidence.wrong("gradient")
    if evidence.layout.tp == 1 or not wrong or not all(evidence.is_copied(p.name) for p in wrong):
        return
    if all(p.copies_agree for p in wrong):
        return
    for pair in wrong:
        for row in evidence.rows["tp"]:
            whole, here = pair.want.value, total([pair.on_ranks[r] for r in row])
            some = held(here)
            if not any(held(pair.on_ranks[r]).any() for r in row):
                continue  # of a ZeRO-1 shard it may have nothing
            if not some.any() or not close(whole.where(some, 0.0), here.where(some, 0.0), pair.floor):
                return
    norms = [p for p in wrong if "norm" in p.name]
    text = f"gradients of {counted(wrong)} are this rank's part: only their sum over the {evidence.layout.tp} tp ranks is right"
    if norms and evidence.layout.sequence:
        yield Cause("sequence_norm_not_summed", f"{text}; sequence parallelism's {len(norms)} norms are not summed over tp")
    else:
        yield Cause("unknown", text)


def copies_disagree(evidence: Evidence) -> Iterator[Cause]:
    """Worth saying, whatever the cause."""
    split = [p for p in evidence.wrong("gradient") if not p.copies_agree]
    if split:
        yield Cause("unknown", f"ranks that hold the same parameters have different gradients ({counted(split)})")


def _explains(evidence: Evidence, pair: Pair, parts: Ranks) -> bool:
    copies = evidence.rows["copies"]
    sums = [merged([_local(evidence, pair.on_ranks[r], r) for r in part], pair.floor) for part in parts]
    for ranks in _joined(parts, copies):
        found = [s for s, part in zip(sums, parts) if set(part) <= ranks]
        if any(s is None for s in found):
            return False
        right = [_local(evidence, pair.want.value, row[0]) for row in copies if set(row) <= ranks]
        if not close(total(right), total([s for s in found if s is not None]), pair.floor):
            return False
    return True


def _local(evidence: Evidence, whole: Tensor, rank: int) -> Tensor:
    """A rank's experts."""
    width = len(whole) // evidence.layout.ep
    first = evidence.place(rank)[1] * width
    return whole[first : first + width]


def _joined(one: Ranks, other: Ranks) -> list[set[int]]:
    """The smallest sets of ranks that are made of whole rows of both partitions."""
    out: list[set[int]] = []
    for row in map(set, one + other):
        touched = [s for s in out if s & row]
        out = [s for s in out if not s & row] + [row.union(*touched)]
    return out
