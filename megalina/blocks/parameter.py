"""A parameter as its block declares it: the single source of its shape, its cut, its initial values and its weight decay."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True, slots=True)
class Parameter:
    """`Parameter("attention.q", (H * d, D), std=0.02, sharded={"tp": 0})`."""

    name: str  # within its layer, or within the model; dots lead into submodules
    shape: tuple[int, ...]  # on one device
    std: float | None  # of the initial normal distribution; 0: zeros, None: ones
    sharded: Mapping[str, int] = field(default_factory=dict)  # axis of the mesh -> the dimension of `shape` that it cuts evenly
    decay: bool = True  # weight decay applies; never to vectors
    dims: int = 0  # > 0: held with so many dimensions, the leading ones merged, as its matrix product wants it
    order: tuple[int, ...] = ()  # which expert is in each place along the dimension that ep cuts; (): expert i in place i
    rows: int = 0  # > 0: only this many rows along dimension 0 are real, the rest is padding (zeros)
    matrix: str = "hidden"  # what its last two dimensions are, if it has so many: hidden | router | words
    stacked: int = 1  # so many matrices in one, one under the other: gate and up
    # QK-clip: rows of each group of heads, and by which power of the group's factor they are scaled: q | k | both | none
    clip: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", self.decay and len(self.shape) > 1)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def local_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """What a rank holds of it, `sizes` being the ranks along each axis of the mesh."""
        shape = list(self.shape)
        for axis, dim in self.sharded.items():
            shape[dim] //= sizes.get(axis, 1)
        return tuple(shape)

    def group(self, layer: int, *, tp: bool, pipeline: bool = False) -> str:
        """The bucket that its gradient travels in, as `Shape` names groups: what is summed along one axis of the mesh, and
        ready at one time; in a pipeline on one rank, too, but for the embedding."""
        if self.name in ("embedding", "head"):
            return self.name
        if layer < 0 and pipeline:
            return "positions" if self.name == "positions" else "ends"
        if layer < 0:
            return "ends" if tp else "embedding"
        if "ep" in self.sharded:
            return f"experts.{layer}"
        return f"dense.{layer}" if "tp" in self.sharded or not tp else f"copied.{layer}"
