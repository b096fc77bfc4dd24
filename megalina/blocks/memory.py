"""How many bytes a function keeps for backward, and how many more there are while it runs.

It follows `megalina/model` tensor by tensor: `tests/perfmodel/sim/test_memory.py` holds both against each other.  Pieces of which
blocks are made; numbers of tokens and rows are whole."""

from dataclasses import dataclass

from megalina.blocks.activation import activation_of
from megalina.blocks.sizes import INT_BYTES, Rank


@dataclass(frozen=True, slots=True)
class Deferred:
    """What waits for the instruction that adds the gradients of weights, where a function's mirror left them out."""

    kept: int = 0  # bytes, besides values of the list
    reads: bool = False  # the values that the function read wait, too
    gradients: bool = False  # so do the gradients of those that it wrote
    rise: int = 0  # the most there is while the gradients are added, above what there was before


@dataclass(frozen=True, slots=True)
class Inside:
    """Of one function."""

    kept: int = 0  # for backward, besides the values that the instruction reads
    forward: int = 0  # the most there is above what there was before, results and `kept` among it
    backward: int = 0  # the same of the mirror, results among it; what was kept counts as before until it is freed


def weight_gradient(rank: Rank, numbers: int, made: int) -> int:
    """A weight's gradient on its way to the bucket where no product adds it there by itself."""
    return numbers * (made + rank.main if rank.mixed else made)


def outer(rank: Rank, rows: int, columns: int) -> int:
    """The same of a matrix product, which adds in place where types are the same."""
    return weight_gradient(rank, rows * columns, rank.element) if rank.mixed else 0


def norm(rank: Rank, rows: int) -> Inside:
    x, wide = rows * rank.width * rank.element, rows * rank.width * rank.main
    if rank.config.model.norm == "layernorm":
        return Inside(2 * rows * rank.main, x, x)
    return Inside(rows * rank.main, x + 2 * wide * rank.mixed, x + 3 * wide if rank.mixed else 2 * x)


def dropout(rank: Rank, rows: int) -> tuple[int, int]:
    """The mask, which is kept; what there is besides at the most: random bits twice, and the result."""
    if not rank.config.model.dropout:
        return 0, 0
    return rows * rank.width * rank.element, rows * rank.width * (2 * INT_BYTES + rank.element)


def residual(rank: Rank, rows: int, *, bias: bool | None = None) -> Inside:
    """Forward: without what is added.  `bias`: one is added first; None: as in MLPs."""
    x = rows * rank.width * rank.element
    kept, working = dropout(rank, rows)
    biased = rank.config.model.bias if bias is None else bias
    return Inside(kept, x * (1 + biased) + kept + working, (2 + bool(kept)) * x)


def mlp_products(rank: Rank, rows: int, read: int) -> int:
    """What gradients of an MLP's weights need: a wide copy of one, or of the rows that a bias' gradient is the sum of."""
    return max(outer(rank, rank.width, read), rows * read * rank.main if rank.mixed and rank.config.model.bias else 0)


def mlp(rank: Rank, tokens: int, hidden: int, *, whole: bool, bias: bool = False) -> Inside:
    """`whole`: with norm and residual; `bias`: the output's is added by the function."""
    kind = activation_of(rank.config.model)
    inputs = kind.inputs
    x, read = tokens * rank.width * rank.element, tokens * inputs * hidden * rank.element
    before, after = (norm(rank, tokens), residual(rank, tokens)) if whole else (Inside(), Inside())
    kept = before.kept + x * whole + read
    scratch = tokens * hidden * rank.element
    forward = max(before.forward + before.kept, kept + x + max(scratch * (1 + kind.clamps), after.forward, x * bias))
    backward = x + 2 * scratch + read + tokens * hidden * kind.clamps + mlp_products(rank, tokens, inputs * hidden)
    return Inside(kept + after.kept, forward, max(backward, x + before.backward - kept if whole else 0))


def deferred_mlp(rank: Rank, tokens: int, hidden: int, *, whole: bool) -> Deferred:
    """Of `mlp`: what the first matrix gave and its gradient, with a norm inside what that gave, and the output's gradient."""
    inputs = activation_of(rank.config.model).inputs
    x, read = tokens * rank.width * rank.element, tokens * inputs * hidden * rank.element
    rise = tokens * hidden * rank.element + outer(rank, rank.width, inputs * hidden)
    return Deferred(x * whole + 2 * read, reads=not whole, gradients=True, rise=rise)
