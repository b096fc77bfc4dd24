"""The layout: how the ranks of a job are cut along named axes, and along which a gradient is summed.  Arithmetic alone.

world = edp x ep x cp x tp, tp innermost (the fastest links).  Packing k cuts ep to ep / k and makes edp k times as large.
With pipelines the world is pp such stages, pp outermost (the slowest links); all other axes stay inside of a stage.
`megalina/mesh.py` makes process groups of this.
"""

from collections.abc import Callable, Mapping, Sequence

EMBEDDING = "embedding"  # the axis of its gradients, where several stages hold it


def axis_sizes(world: int, *, tp: int, ep: int, cp: int = 1, packing: int = 1) -> dict[str, int]:
    """Ranks along each axis; `ep` is without packing.  With pipelines of one stage, which is a world in itself.

    ValueError where tp x cp x ep does not divide the world, or packing ep."""
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


def rows_of_stages(shape: Mapping[str, int], stages: int) -> dict[str, list[list[int]]]:
    """As `rows`, of a world of several stages, each of this shape: "world" is of all, "stage" of one."""
    table, size = rows(shape), len(rows(shape)["world"][0])
    shifted = {axis: [[size * p + rank for rank in row] for p in range(stages) for row in of] for axis, of in table.items()}
    return {**shifted, "world": [list(range(size * stages))], "stage": shifted["world"]}


def rows_across(shape: Mapping[str, int], stages: Sequence[int], axis: str = "") -> list[list[int]]:
    """Rows that some stages, each of this shape, have together: of each its row along `axis`; "": a rank of each, which have the
    same place in them."""
    table = rows(shape)
    of_one, size = table[axis] if axis else [[rank] for rank in table["world"][0]], len(table["world"][0])
    return [[size * p + rank for p in stages for rank in row] for row in of_one]


def ranks_of(shape: Mapping[str, int]) -> Callable[[str, int], tuple[int, ...]]:
    """(axis, rank) -> the ranks of its row, of the axes of `rows`."""
    table = rows(shape)
    row_of: dict[str, dict[int, tuple[int, ...]]] = {}  # of the axes that are asked for: a hundred thousand ranks take their time

    def row(axis: str, rank: int) -> tuple[int, ...]:
        if axis not in row_of:
            row_of[axis] = {rank: row for row in map(tuple, table[axis]) for rank in row}
        return row_of[axis][rank]

    return row


def by_node(row: Sequence[int], ranks_per_node: int) -> list[list[int]]:
    """The ranks of a row on each of its nodes, in the order of nodes.  [] where a sum by node is none: fewer than two nodes,
    nodes with one rank of the row each, or with unequal numbers of them."""
    nodes: dict[int, list[int]] = {}
    for rank in sorted(row):
        nodes.setdefault(rank // ranks_per_node, []).append(rank)
    counts = {len(ranks) for ranks in nodes.values()}
    return list(nodes.values()) if len(nodes) > 1 and len(counts) == 1 and counts != {1} else []


def columns_by_node(row: Sequence[int], ranks_per_node: int) -> list[list[int]]:
    """The ranks at one place of each of its nodes, place after place; the row itself where `by_node` has none."""
    nodes = by_node(row, ranks_per_node)
    return [list(column) for column in zip(*nodes, strict=True)] if nodes else [list(row)]


def axis_of_group(group: str, *, pipeline: bool = False, shared_embedding: bool = False) -> str:
    """The axis along which a parameter group's gradients are summed: all ranks that hold copies of it.

    `pipeline`: the world has several stages; `shared_embedding`: several of them hold the embedding."""
    whole = "stage" if pipeline else "world"
    axes = {"experts": "copies", "copied": whole, "ends": whole, "positions": whole}
    return (axes | ({"embedding": EMBEDDING} if shared_embedding else {})).get(group.split(".")[0], "dp")
