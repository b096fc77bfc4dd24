"""Objects of all ranks: small Python values that everybody gets, outside of programs and rarely."""

from typing import TypeVar

import torch.distributed as dist

from megalina.mesh import Mesh

T = TypeVar("T")


def everybodys(mesh: Mesh, value: T) -> list[T]:
    """Each rank's `value`, in the order of ranks.  All ranks must call it."""
    if mesh.world.group is None:
        return [value]
    values: list[T | None] = [None] * mesh.world.size
    dist.all_gather_object(values, value, group=mesh.world.group)
    return values  # type: ignore[return-value]
