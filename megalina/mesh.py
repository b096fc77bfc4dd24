"""The mesh: the ranks of a job cut along named axes.

world = edp x ep x cp x tp, tp innermost (the fastest links).  The ranks of cp and tp have the same sequences: each rank of cp a
part of them, and each rank of tp a share of that.  Dense parameters are copied over dp = edp x ep x cp.  An expert sits on one ep
coordinate and is copied over edp x cp x tp, since every rank of cp and tp dispatches its own share of the tokens.
With pipelines the world is a row of stages, each cut so: what lies along them are axes of their own (`along_stages`).
Axes over the same ranks still have communicators of their own: two collectives on one communicator would have to
keep one order.  `group` None means nobody to talk to.

Packing k gives each rank k times the experts: ep is cut to ep / k, edp grows to edp x k, and all else is as before.  Ranks
of an ep group are neighbours, so a group that is small enough lies inside a node.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megalina.groups import new_group
from megalina.layout import EMBEDDING, axis_sizes, by_node, columns_by_node, rows, rows_across, rows_of_stages

T = TypeVar("T")


SUMMED = ("world", "dp", "copies", "stage", EMBEDDING)  # axes along which gradients are summed


@dataclass(frozen=True, slots=True)
class Axis:
    """This rank's row along one axis: `ranks` are global ranks, `rank` this one's place among them."""

    name: str
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    group: dist.ProcessGroup | None = None
    packing: int = 1  # what is called "ep" under another packing is another group
    nodes: "Nodes | None" = None  # gradients are summed, or tokens sent, by node along it

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def log_name(self) -> str:
        """The axis in a log of collectives: "ep", or "ep/2" under packing 2."""
        return self.name if self.packing == 1 else f"{self.name}/{self.packing}"


@dataclass(frozen=True, slots=True)
class Nodes:
    """A row by its nodes: rank `grid[a][d]` of the row (its place in it) has place d on node a.

    Each stage of an exchange by node has communicators of its own, on which it keeps one order whatever the others do: `inside`,
    then `across` when gradients are summed; `across_again`, then `inside_again` when what was summed is gathered.  Tokens:
    `across`, `counts`, `inside` to the experts; `inside_again`, `across_again` back."""

    grid: tuple[tuple[int, ...], ...]
    inside: Axis  # the ranks of this one's node
    across: Axis  # of each node the rank at this one's place
    across_again: Axis
    inside_again: Axis
    counts: Axis | None = None  # inside, of tokens alone


@dataclass(frozen=True, slots=True)
class Mesh:
    """All axes of one job, as this rank sees them."""

    world: Axis  # all ranks: norms, statistics, gradients of what is copied over tp too (with pipelines along "stage")
    tp: Axis
    cp: Axis  # parts of the same sequences: keys and values, or heads
    cp_tp: Axis  # what routers must know of whole sequences
    ep: Axis  # tokens
    counts: Axis  # the ranks of ep again: split sizes travel apart from tokens
    edp: Axis
    dp: Axis  # dense gradients
    copies: Axis  # edp x cp x tp, the ranks that hold the same experts: expert gradients
    pp: int = 1  # stages in which the world is cut
    pp_rank: int = 0  # this rank's
    # axes that pipelines alone have: "stage", all ranks of one; "pp0-1", this rank and the one at its place in another stage;
    # "embedding".  Those that this rank is on
    along_stages: Mapping[str, Axis] = field(default_factory=dict)

    @property
    def packing(self) -> int:
        """How many times as many experts as without packing a rank holds."""
        return self.ep.packing

    def axis(self, name: str) -> Axis:
        """The axis that a program calls so."""
        found: Axis = self.along_stages[name] if name in self.along_stages else getattr(self, name)
        return found

    @property
    def shape(self) -> dict[str, int]:
        """cp only where there is some; with pipelines of a stage."""
        of_cp = {"cp": self.cp.size} if self.cp.size > 1 else {}
        return {"edp": self.edp.size, "ep": self.ep.size, **of_cp, "tp": self.tp.size}

    @property
    def rows(self) -> dict[str, list[list[int]]]:
        """The ranks of each row along each axis, of the whole world; of the axes between stages none but "stage"."""
        return rows_of_stages(self.shape, self.pp) if self.pp > 1 else rows(self.shape)

    @property
    def pipeline(self) -> dict[str, int]:
        """The stages, if there are several."""
        return {"pp": self.pp} if self.pp > 1 else {}

    @property
    def unpacked(self) -> dict[str, int]:
        """The shape without packing."""
        return {**self.shape, "edp": self.edp.size // self.packing, "ep": self.ep.size * self.packing}

    @property
    def sums_by_node(self) -> bool:
        """Whether gradients are, along any axis."""
        return any(axis.nodes is not None for axis in (self.world, self.dp, self.copies, *self.along_stages.values()))

    @property
    def readers(self) -> int:
        """Ways in which a step's sequences are shared out."""
        return self.dp.size // self.cp.size

    @property
    def reader(self) -> int:
        """Which share of them this rank has, as all ranks of its cp and tp."""
        return self.dp.rank // self.cp.size


def build_mesh(*, tp: int = 1, ep: int = 1, cp: int = 1, timeout_s: float | None = None) -> Mesh:
    """Cut the world that `torch.distributed` was initialised with (or the single process, if it was not).

    `timeout_s`: a collective that takes longer is an error.  Groups don't inherit the world's; None is torch's default.
    ValueError where tp x cp x ep does not divide the world size.
    """
    return build_meshes(tp=tp, ep=ep, cp=cp, timeout_s=timeout_s)[1]


def build_meshes(
    *,
    tp: int = 1,
    ep: int = 1,
    cp: int = 1,
    packings: Sequence[int] = (1,),
    pp: int = 1,
    across: Mapping[str, tuple[int, ...]] | None = None,
    timeout_s: float | None = None,
    ranks_per_node: int = 0,
    token_ranks_per_node: int = 0,
) -> dict[int, Mesh]:
    """As `build_mesh`, a mesh for each packing.  They share the axes whose groups are the same.

    `pp`: stages of a pipeline, each of which tp and ep cut; `across`: axes between them, with the numbers of the stages that are
    on one; `ranks_per_node`: gradients are summed by node wherever an axis has several ranks on several nodes; 0: nowhere;
    `token_ranks_per_node`: tokens are sent once to each node where ep has, and "counts" are of its ranks at one place.
    ValueError, too, where a packing does not divide ep, and where the world can't be cut into so many stages."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % pp:
        raise ValueError(f"pp ({pp}) must divide the world size ({world})")
    shapes = {packing: axis_sizes(world // pp, tp=tp, ep=ep, cp=cp, packing=packing) for packing in packings}
    tables = {packing: rows_of_stages(shape, pp) if pp > 1 else rows(shape) for packing, shape in shapes.items()}
    me = dist.get_rank() if dist.is_initialized() else 0
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    shared: dict[str, Axis] = {}

    def axis(name: str, table: list[list[int]], packing: int) -> Axis:  # every rank makes every group, in the same order
        mine = Axis(name, packing=packing)
        for row in table:
            group = new_group(row, timeout=timeout) if len(row) > 1 else None
            per_node = ranks_per_node if name in SUMMED else token_ranks_per_node if name == "ep" else 0
            nodes = by_node(row, per_node) if per_node else []
            levels = of_nodes(name, row, nodes, packing) if nodes else None
            if me in row:
                mine = Axis(name, tuple(row), row.index(me), group, packing, levels)
        return mine

    def of_nodes(name: str, row: list[int], nodes: list[list[int]], packing: int) -> Nodes | None:
        columns = [list(column) for column in zip(*nodes, strict=True)]
        tokens = ("counts",) if name == "ep" else ()
        stages = {
            stage: axis(f"{name} {stage}", columns if stage.startswith("across") else nodes, packing)
            for stage in ("inside", "across", "across_again", "inside_again", *tokens)
        }
        return Nodes(tuple(tuple(map(row.index, node)) for node in nodes), **stages) if me in row else None

    meshes, along = {}, dict[str, Axis]()
    if pp > 1:
        along["stage"] = axis("stage", tables[packings[0]]["stage"], 1)
        for name, members in (across or {}).items():
            found_rows = rows_across(shapes[packings[0]], members, "dp" if name == EMBEDDING else "")
            mine = axis(name, found_rows, 1)
            along |= {name: mine} if any(me in row for row in found_rows) else {}
    own = {"pp": pp, "pp_rank": me // (world // pp), "along_stages": along} if pp > 1 else {}
    for packing, table in tables.items():
        found = {name: row for name, row in table.items() if name != "stage"}
        if token_ranks_per_node:
            found["counts"] = [column for row in found["counts"] for column in columns_by_node(row, token_ranks_per_node)]
        for name in ("world", "tp", "cp", "dp"):  # no packing changes them
            shared[name] = shared.get(name) or axis(name, found[name], 1)
        # lists that gather along it have cp
        shared["cp_tp"] = shared.get("cp_tp") or (axis("cp_tp", found["cp_tp"], 1) if cp > 1 else shared["tp"])
        axes = {name: shared.get(name) or axis(name, row, packing) for name, row in found.items()}
        meshes[packing] = Mesh(**axes, **own)  # type: ignore[arg-type]
    return meshes


def all_gather_object(mesh: Mesh, value: T) -> list[T]:
    """Each rank's `value`, in the order of ranks.  All ranks must call it."""
    if mesh.world.group is None:
        return [value]
    values: list[T | None] = [None] * mesh.world.size
    dist.all_gather_object(values, value, group=mesh.world.group)
    return values  # type: ignore[return-value]
