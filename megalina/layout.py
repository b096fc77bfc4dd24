"""The layout: how the ranks of a job are cut along named axes, and along which a gradient is summed.  Arithmetic alone.

world = edp x ep x tp, tp innermost (the fastest links).  Packing k cuts ep to ep / k and makes edp k times as large.
`megalina/mesh.py` makes process groups of this.
"""

from collections.abc import Callable, Mapping


def axis_sizes(world: int, *, tp: int, ep: int, packing: int = 1) -> dict[str, int]:
    """Ranks along each axis; `ep` is without packing.  ValueError where tp x ep does not divide the world, or packing ep."""
    if world % (tp * ep):
        raise ValueError(f"tp ({tp}) x ep ({ep}) = {tp * ep} must divide the world size ({world})")
    if ep % packing:
        raise ValueError(f"packing ({packing}) must divide ep ({ep})")
    ep //= packing
    edp = world // (tp * ep)
    return {"world": world, "tp": tp, "ep": ep, "counts": ep, "edp": edp, "dp": edp * ep, "copies": edp * tp}


def rows(shape: Mapping[str, int]) -> dict[str, list[list[int]]]:
    """The rows of global ranks along each axis, for `shape` {"edp": .., "ep": .., "tp": ..}, as of `axis_sizes`."""
    edp, ep, tp = range(shape["edp"]), range(shape["ep"]), range(shape["tp"])

    def rank(x: int, e: int, t: int) -> int:
        return (x * len(ep) + e) * len(tp) + t

    return {
        "world": [[rank(x, e, t) for x in edp for e in ep for t in tp]],
        "tp": [[rank(x, e, t) for t in tp] for x in edp for e in ep],
        "ep": [[rank(x, e, t) for e in ep] for x in edp for t in tp],
        "counts": [[rank(x, e, t) for e in ep] for x in edp for t in tp],
        "edp": [[rank(x, e, t) for x in edp] for e in ep for t in tp],
        "dp": [[rank(x, e, t) for x in edp for e in ep] for t in tp],
        "copies": [[rank(x, e, t) for x in edp for t in tp] for e in ep],
    }


def ranks_of(shape: Mapping[str, int]) -> Callable[[str, int], tuple[int, ...]]:
    """(axis, rank) -> the ranks of its row, of the axes of `rows`."""
    table = rows(shape)
    row_of: dict[str, dict[int, tuple[int, ...]]] = {}  # of the axes that are asked for: a hundred thousand ranks take their time

    def row(axis: str, rank: int) -> tuple[int, ...]:
        if axis not in row_of:
            row_of[axis] = {rank: row for row in map(tuple, table[axis]) for rank in row}
        return row_of[axis][rank]

    return row


def axis_of_group(group: str) -> str:
    """The axis along which a parameter group's gradients are summed: all ranks that hold copies of it."""
    return {"experts": "copies", "copied": "world", "ends": "world"}.get(group.split(".")[0], "dp")
