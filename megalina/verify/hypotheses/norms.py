"""Hypotheses about the gradients' norm, all gradients being right."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from megalina.verify.evidence import Cause, Evidence, Pair, close, held

PARTS = ("experts", "what tp cuts", "what is copied")


def without_experts(evidence: Evidence) -> Iterator[Cause]:
    """The same number on all ranks: the root of the other gradients' squares."""
    pair = evidence.pair("norm", "grad_norm")
    experts, cut, copied = _whole_squares(evidence)
    if experts > 0 and _is_on_all(pair, cut + copied):
        yield Cause(
            "norm_without_experts",
            f"the norm of the gradients is {pair.got.value:.6g}, not {pair.want.value:.6g}: the root of the squares without the "
            f"experts' ({(experts / (experts + cut + copied)).item():.1%} of all)",
        )


def of_each_rank(evidence: Evidence) -> Iterator[Cause]:
    """Ranks have different norms: each that of what it holds, or of some part of it."""
    pair = evidence.pair("norm", "grad_norm")
    norms = torch.stack(pair.on_ranks).double()
    if len(norms) < 2 or bool((norms - norms[0]).abs().max() <= 1e-9 * norms.abs().max()):
        return
    whole = [s.expand(len(norms)) for s in _whole_squares(evidence)]
    own = _own_squares(evidence)
    values = ", ".join(f"{n:.6g}" for n in norms.tolist())
    text = f"ranks have norms of their own ({values}) instead of {pair.want.value:.6g}: "
    for takes_own in itertools.product((True, False), repeat=3):
        if any(takes_own) and close(sum(o if t else w for o, w, t in zip(own, whole, takes_own)).sqrt(), norms):
            what = ", ".join(p for p, t in zip(PARTS, takes_own) if t) if not all(takes_own) else "every gradient"
            yield Cause("norm_per_rank", f"{text}of {what} each rank counts only what it holds itself")
            return
    if close(pair.want.value.square(), norms.square().sum()):
        yield Cause("norm_per_rank", f"{text}their squares sum to the square of the right norm, but nobody sums them")


def counted_often(evidence: Evidence) -> Iterator[Cause]:
    """A group's squares are counted as often as it is copied, or not at all."""
    pair, squares = evidence.pair("norm", "grad_norm"), _whole_squares(evidence)
    factors = {1.0: "", 0.0: "left out"} | {float(s): f"counted {s} = {n} times" for n, s in evidence.sizes().items()}
    factors |= {1.0 / s: f"divided by {s} = {n}" for n, s in evidence.sizes().items()}
    for chosen in sorted(itertools.product(factors, repeat=3), key=lambda c: sum(f != 1.0 for f in c)):
        if any(f != 1.0 for f in chosen) and _is_on_all(pair, sum((f * s for f, s in zip(chosen, squares)), torch.zeros(()))):
            what = "; ".join(f"{p}: {factors[f]}" for p, f, s in zip(PARTS, chosen, squares) if factors[f] and s > 0)
            if what:
                yield Cause("unknown", f"the norm of the gradients is {pair.got.value:.6g}, not {pair.want.value:.6g}: {what}")
                return


def _is_on_all(pair: Pair, squares: Tensor) -> bool:
    return all(close(squares.double().sqrt(), value) for value in pair.on_ranks)


def _group(evidence: Evidence, name: str) -> int:
    return 0 if evidence.is_expert(name) else 1 if evidence.is_cut(name) else 2


def _whole_squares(evidence: Evidence) -> Tensor:
    """[3]: sums of squares of the reference's gradients, see `PARTS`."""
    out = torch.zeros(3, dtype=torch.float64)
    for pair in evidence.all("gradient"):
        out[_group(evidence, pair.name)] += pair.want.value.square().sum()
    return out


def _own_squares(evidence: Evidence) -> Tensor:
    """[3, ranks]: of what each rank holds."""
    out = torch.zeros(3, evidence.layout.world, dtype=torch.float64)
    for pair in evidence.all("gradient"):
        for rank, value in enumerate(pair.on_ranks):
            out[_group(evidence, pair.name), rank] += value[held(value)].square().sum()
    return out
