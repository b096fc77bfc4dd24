"""A pool that runs rows: a layout's steps on ranks that stay from row to row."""

from collections.abc import Sequence
from functools import cache

import torch
from numpy.typing import NDArray

from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.mesh import Mesh, build_mesh
from megalina.rank_pool import TIME_LIMIT_S, RankPool
from megalina.verify.on_ranks import Held, Key, record_rank, together
from megalina.verify.recording import Layout, Recording

PRELOAD = ("megalina.verify.pool", "torch._dynamo")  # an optimizer's first step imports the second


class Pool(RankPool):
    """Rows sorted by world size start the ranks of each size once."""

    def __init__(self, *, device: str = "cpu", time_limit_s: float = TIME_LIMIT_S):
        super().__init__(device=device, time_limit_s=time_limit_s, preload=PRELOAD)

    def record(self, config: PretrainConfig, layout: Layout, batches: Sequence[Batch], plant: str = "") -> Recording:
        """Run the steps in a layout.  RanksFailed where a rank raises, dies or takes too long."""
        self.start_row(config, layout, batches, plant)
        return self.finish_row(config, layout, batches)

    def start_row(self, config: PretrainConfig, layout: Layout, batches: Sequence[Batch], plant: str = "") -> None:
        """As `record`, without waiting for the ranks."""
        self.start(layout.world, _recorded, self._device, self._time_limit_s, config, layout, list(batches), plant)

    def finish_row(self, config: PretrainConfig, layout: Layout, batches: Sequence[Batch]) -> Recording:
        """The recording of the row that was started with these."""
        ranks = [{key: Held(torch.from_numpy(value), note) for key, (value, note) in held.items()} for held in self.finish()]
        return together(config, layout, batches, ranks)


def _recorded(
    device: str, time_limit_s: float, config: PretrainConfig, layout: Layout, batches: Sequence[Batch], plant: str
) -> dict[Key, tuple[NDArray, str]]:
    """On a rank: what it holds, as arrays, which pickle faster than tensors."""
    mesh = _mesh(layout.tp, layout.ep, time_limit_s)
    here = torch.device("cuda", mesh.world.rank) if device == "cuda" else torch.device("cpu")
    held = record_rank(config, layout, batches, mesh, device=here, plant=plant)
    return {key: (h.value.numpy(), h.note) for key, h in held.items()}


@cache
def _mesh(tp: int, ep: int, timeout_s: float) -> Mesh:
    """Of this process's world.  Communicators take longer than a row, so they stay."""
    return build_mesh(tp=tp, ep=ep, timeout_s=timeout_s)
