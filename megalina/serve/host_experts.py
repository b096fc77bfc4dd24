"""Host experts: every expert of a model, once a node, in memory that the node's ranks share.

One flat file in shared memory holds them all, expert after expert, layer after layer.  It has no name any more once all ranks
have mapped it, so nothing is left behind however they end.

For CUDA each rank page-locks it: only then does a copy to the device not hold up the host.  That is tested on a made-up CUDA
runtime; on a GPU it has not been run.

On CUDA experts come on a stream of their own, behind what is computed.  The host only asks for copies, which from page-locked
memory it never waits for.  Two things must be waited for on the device: a copy may not overwrite what an earlier computation
still reads, and a computation may not read what has not come.  The order is tested on made-up streams; on a GPU it has not been
run."""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalina.mesh import Mesh, all_gather_object

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The tensors of one expert, side by side in memory."""

    names: tuple[str, ...]  # as in megalina.model.moe.Experts
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` [numel] as the expert's tensors."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


class HostExperts:
    """`expert(layer, e)` is a flat tensor [shape.numel]; layers count from 0 among MoE layers."""

    def __init__(self, shape: ExpertShape, memory_LEn: Tensor):
        self.shape, self._memory_LEn = shape, memory_LEn

    @property
    def num_layers(self) -> int:
        return self._memory_LEn.shape[0]

    @property
    def num_experts(self) -> int:
        return self._memory_LEn.shape[1]

    @property
    def storage_ptr(self) -> int:
        return self._memory_LEn.untyped_storage().data_ptr()

    def expert(self, layer: int, expert: int) -> Tensor:
        return self._memory_LEn[layer, expert]

    def page_lock(self) -> None:
        """As long as this object lives.  OSError where CUDA refuses."""
        runtime, pointer, num_bytes = torch.cuda.cudart(), self._memory_LEn.data_ptr(), self._memory_LEn.nbytes
        if code := int(runtime.cudaHostRegister(pointer, num_bytes, 0)):
            raise OSError(
                f"CUDA can't page-lock the {num_bytes / 1e9:.2f} GB of all experts (error {code}): raise the limit of locked "
                "memory, ulimit -l"
            )
        weakref.finalize(self, runtime.cudaHostUnregister, pointer)


def share_experts(
    shape: ExpertShape,
    num_layers: int,
    num_experts: int,
    read_layer: Callable[[int], Mapping[str, Tensor]],
    mesh: Mesh,
    *,
    page_locked: bool = False,
) -> HostExperts:
    """All ranks call it together.  The first rank of each node reads, layer by layer: `read_layer(i)` gives tensors [E, ...] by
    the names in `shape`.  `page_locked`: for slots on CUDA.  OSError where the node's shared memory is too small, or can't be
    page-locked, with the numbers, on every rank."""
    size = num_layers * num_experts * shape.numel
    nodes = all_gather_object(mesh, _node())
    leader = nodes.index(nodes[mesh.world.rank])
    path, error = "", ""
    if leader == mesh.world.rank:
        try:
            path = _reserve(size * shape.dtype.itemsize)
            memory_LEn = _map(path, size, shape.dtype).view(num_layers, num_experts, shape.numel)
            for layer in range(num_layers):
                tensors = read_layer(layer)
                for expert in range(num_experts):
                    for name, own in shape.views(memory_LEn[layer, expert]).items():
                        own.copy_(tensors[name][expert].view(own.shape))
        except (OSError, ValueError, KeyError) as problem:
            error = f"{type(problem).__name__}: {problem}"
    told = all_gather_object(mesh, (path, error))
    try:
        if wrong := [text for _, text in told if text]:
            raise OSError(wrong[0])
        if leader != mesh.world.rank:
            memory_LEn = _map(told[leader][0], size, shape.dtype).view(num_layers, num_experts, shape.numel)
        host = HostExperts(shape, memory_LEn)
        if page_locked:
            try:
                host.page_lock()
            except OSError as problem:
                error = str(problem)
        if wrong := [text for text in all_gather_object(mesh, error) if text]:  # all have mapped it
            raise OSError(wrong[0])
    finally:
        if path:
            os.unlink(path)
    return host


def experts_of(layers: Sequence[Mapping[str, Tensor]]) -> tuple[ExpertShape, int]:
    """The shape of one expert and the number of experts, from each MoE layer's tensors [E, ...]."""
    first = {name: t for name, t in layers[0].items() if t is not None}
    shapes = tuple(t.shape[1:] for t in first.values())
    some = next(iter(first.values()))
    return ExpertShape(tuple(first), shapes, some.dtype), some.shape[0]


def _node() -> str:
    """Equal for ranks that share memory: the same boot of the same kernel, the same file system in memory, and the same network
    namespace, as nodes that are emulated differ in nothing else."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    place = os.stat(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else os.stat(tempfile.gettempdir())
    network = Path("/proc/self/ns/net")
    return (
        f"{boot.read_text().strip() if boot.exists() else os.uname().nodename} {place.st_dev} "
        f"{os.stat(network).st_ino if network.exists() else 0}"
    )


def _reserve(num_bytes: int) -> str:
    """A file of this size whose memory is really there."""
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    handle, path = tempfile.mkstemp(prefix="megalina_experts_", dir=folder)
    try:
        os.posix_fallocate(handle, 0, max(1, num_bytes))
    except OSError as problem:
        os.unlink(path)
        state = os.statvfs(folder)
        raise OSError(
            f"all experts take {num_bytes / 1e9:.2f} GB, {folder} has {state.f_bavail * state.f_frsize / 1e9:.2f} GB left: "
            "make it larger, or use more nodes' memory for a smaller model"
        ) from problem
    finally:
        os.close(handle)
    return path


def _map(path: str, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=dtype)


class ExpertStream:
    """Of one device, on which its slots lie."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """Where the computation of this thread is: all that it has been asked for until now."""
        return torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def after(self, mark: torch.cuda.Event) -> Iterator[None]:
        """Copies in this block begin once the computation has got to the mark."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield

    def asked(self) -> torch.cuda.Event:
        """All copies that were asked for until now."""
        return self._stream.record_event()

    def hold(self, copies: torch.cuda.Event) -> None:
        """What this thread computes from now on comes after these copies; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(copies)

    def synchronize(self) -> None:
        """The host waits for all copies: only then may their memory go."""
        self._stream.synchronize()
