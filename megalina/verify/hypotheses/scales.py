"""Hypotheses about gradients that are the right ones times a number."""

from collections.abc import Iterator

from megalina.verify.evidence import Cause, Evidence, Pair, agrees, counted


def experts_scaled(evidence: Evidence) -> Iterator[Cause]:
    """The experts' gradients alone, by the size of a group of ranks."""
    wrong = evidence.wrong("gradient")
    if not wrong or not all(evidence.is_expert(p.name) for p in wrong) or (factor := common_factor(wrong)) is None:
        return
    yield from _scaled(evidence, factor, f"gradients of the experts ({counted(wrong)})", "edp", "experts_scaled_by_edp")


def all_scaled(evidence: Evidence) -> Iterator[Cause]:
    """All gradients, by the number of data-parallel ranks."""
    wrong = evidence.wrong("gradient")
    if any(p.equal and not p.is_nothing for p in evidence.all("gradient")) or (factor := common_factor(wrong)) is None:
        return
    yield from _scaled(
        evidence, factor, f"all gradients ({len(wrong)} tensors)", "dp", "divided_by_dp_twice" if factor < 1 else ""
    )


def group_scaled(evidence: Evidence) -> Iterator[Cause]:
    """Some other set of gradients, by any number: worth saying."""
    wrong = evidence.wrong("gradient")
    if wrong and (factor := common_factor(wrong)) is not None:
        kinds = {"experts": evidence.is_expert, "cut by tp": evidence.is_cut, "copied over tp": evidence.is_copied}
        what = " and ".join(kind for kind, belongs in kinds.items() if any(belongs(p.name) for p in wrong))
        yield from _scaled(evidence, factor, f"gradients ({what}: {counted(wrong)})", "", "")


def common_factor(pairs: list[Pair]) -> float | None:
    """By which all of these gradients are too large, on every rank; None where there is no such number."""
    factor = None
    for pair in pairs:
        if factor is None:
            i = pair.want.value.abs().argmax()
            factor = (pair.got.value.flatten()[i] / pair.want.value.flatten()[i]).item()
        if not all(agrees(pair.want.value * factor, value, pair.floor) for value in (pair.got.value, *pair.on_ranks)):
            return None
    return factor


def _scaled(evidence: Evidence, factor: float, what: str, size: str, name: str) -> Iterator[Cause]:
    """The cause `name` if the factor is the size of the axis `size`, and that other groups are as large."""
    sizes = [n for n, s in evidence.sizes().items() if min(abs(factor / s - 1), abs(factor * s - 1)) < 1e-8]
    if name and size in sizes:
        yield Cause(name, f"{what} are {_times(factor, size)}")
        if others := [n for n in sizes if n != size]:
            yield Cause("unknown", f"{what} are {_times(factor, ' = '.join(others))}: in this layout it is the same number")
    else:
        yield Cause("unknown", f"{what} are {_times(factor, ' = '.join(sizes))}")


def _times(factor: float, size: str) -> str:
    size = f" = {size}" if size else ""
    if abs(factor) >= 1:
        return f"{factor:.6g}{size} times too large"
    return f"{1 / factor:.6g}{size} times too small" if factor else "zero"
