"""The layout: how the ranks of a job are cut along named axes, and along which a gradient is summed.  Arithmetic alone.

world = edp x ep x cp x tp, tp innermost (the fastest links).  Packing k cuts ep to ep / k and makes edp k times as large.
`megalina/mesh.py` makes process groups of this.
"""

from collections.abc import Callable, Mapping


def axis_sizes(world: int, *, tp: int, ep: int, cp: int = 1, packing: int = 1) -> dict[str, int]:
    """Ranks along each axis; `ep` is without packing.  ValueError where tp x cp x ep does not divide the world, or packing ep."""
    if world % (tp * cp * ep):
        product = f"tp ({tp}) x {f'cp ({cp}) x ' if cp > 1 else ''}ep ({ep}) = {tp * cp * ep}"
        raise ValueError(f"{product} must divide the world size ({world})")
    if ep % packing:
        raise ValueError(f"packing ({packing}) must divide ep ({ep})")
    ep //= packing
    edp, both = world // (tp * cp * ep), cp * tp
    sizes = {"world": world, "tp": tp, "cp": cp, "cp_tp": both, "ep": ep, "counts": ep, "edp": edp}
    return {**sizes, "dp": edp * ep * cp, "copies": edp * both}


def readers(axes: Mapping[str, int]) -> int:
    """Ways in which a step's sequences are shared out; the ranks of cp and tp have the same ones."""
    return axes["edp"] * axes["ep"]


def rows(shape: Mapping[str, int]) -> dict[str, list[list[int]]]:
    """The rows of global ranks along each axis, for `shape` {"edp": .., "ep": .., "cp": .., "tp": ..}, as of `axis_sizes`; cp may
    be left out, where it is 1."""
    edp, ep, cp, tp = range(shape["edp"]), range(shape["ep"]), range(shape.get("cp", 1)), range(shape["tp"])

    def rank(x: int, e: int, c: int, t: int) -> int:
        return ((x * len(ep) + e) * len(cp) + c) * len(tp) + t

    along_ep = [[rank(x, e, c, t) for e in ep] for x in edp for c in cp for t in tp]
    return {
        "world": [[rank(x, e, c, t) for x in edp for e in ep for c in cp for t in tp]],
        "tp": [[rank(x, e, c, t) for t in tp] for x in edp for e in ep for c in cp],
        "cp": [[rank(x, e, c, t) for c in cp] for x in edp for e in ep for t in tp],
        "cp_tp": [[rank(x, e, c, t) for c in cp for t in tp] for x in edp for e in ep],
        "ep": along_ep,
        "counts": along_ep,
        "edp": [[rank(x, e, c, t) for x in edp] for e in ep for c in cp for t in tp],
        "dp": [[rank(x, e, c, t) for x in edp for e in ep for c in cp] for t in tp],
        "copies": [[rank(x, e, c, t) for x in edp for c in cp for t in tp] for e in ep],
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
