"""The checkpoints of a run: one folder a step, each complete or not there, loadable in any layout.

RUN/checkpoints/step_00000020/ is written under a hidden name and renamed when all of it is on disk.  A kill at any
moment leaves the older ones as they are; what it left half-written is removed at the next start.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megalina.checkpoint.files import (
    Part,
    is_complete,
    read_description,
    read_into,
    sync_folder,
    write_tensors,
    write_values,
)
from megalina.checkpoint.slice import Box, Slice, boxes, whole_shape
from megalina.mesh import Mesh

_TIMEOUT = timedelta(minutes=30)  # ranks may write for a long time, to a slow disk
_PARTIAL = ".partial"  # being written or being removed: never of use
_REPLACED = ".replaced"  # an older checkpoint of a step that is saved again: of use until the new one has its name


class Checkpoints:
    """All ranks construct and call it alike; the folder is one that all of them see.

    `keep_last` newest ones are kept, and those of steps that are multiples of `keep_every` (0: none) for ever.  Older
    ones go when a newer one is complete, so the one that a run was resumed from outlives everything but its successor.
    With `asynchronous`, `save` returns once the tensors are copied; at most one save is under way.
    """

    def __init__(self, folder: Path, mesh: Mesh, *, keep_last: int, keep_every: int, asynchronous: bool) -> None:
        if keep_last < 1 or keep_every < 0:
            raise ValueError(f"checkpoint.keep_last ({keep_last}) must be at least 1, keep_every ({keep_every}) at least 0")
        self._folder = folder
        self._mesh = mesh
        self._keep_last = keep_last
        self._keep_every = keep_every
        # A group of its own: a save in the background would mix its collectives with the training's.
        group = dist.new_group(list(mesh.world.ranks), backend="gloo", timeout=_TIMEOUT) if mesh.world.size > 1 else None
        self._group = group
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._on_first_rank(self._recover)

    def save(self, step: int, tensors: Mapping[str, Slice | Sequence[Slice]], values: dict) -> None:
        """Save `tensors`, of each the slices that this rank holds, which over all ranks are the whole, and `values`,
        anything that JSON can hold.

        RuntimeError where a rank can't write (from the next `save` or `wait`, if asynchronous)."""
        self.wait()
        values_json = json.dumps(values)
        copy = self._thread is not None
        parts = {name: self._part(part, copy=copy) for name, part in tensors.items()}
        if self._thread is None:
            self._write(step, parts, values_json)
        else:
            self._pending = self._thread.submit(self._write, step, parts, values_json)

    def wait(self) -> None:
        """Until the asynchronous save, if one is under way, is complete; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step; the same on all ranks."""
        self.wait()
        found: list[Path | None] = [None]
        if self._mesh.world.rank == 0:
            found[0] = max(self._complete(), default=None)
        if self._group is not None:
            dist.broadcast_object_list(found, src=self._mesh.world.ranks[0], group=self._group)
        return found[0]

    def load(self, path: Path, tensors: Mapping[str, Slice | Sequence[Slice]], *, prefix: str = "") -> dict:
        """Fill `tensors` in place, whatever the layout and types they were saved in; returns the values.

        ValueError, before anything is changed, where the checkpoint's tensors (those whose names start with `prefix`)
        are not these ones in name and shape.
        """
        self.wait()
        description = read_description(path)
        saved = {name: tuple(t["shape"]) for name, t in description["tensors"].items() if name.startswith(prefix)}
        check_same(path, saved, {name: whole_shape(_list(part)[0], self._mesh) for name, part in tensors.items()})
        read_into(path, {name: self._part(part, copy=False) for name, part in tensors.items()})
        values: dict = description["values"]
        return values

    def _part(self, part: Slice | Sequence[Slice], *, copy: bool) -> Part:
        slices = _list(part)
        cut = [box for one in slices for box in boxes(one, self._mesh)]
        if copy:
            cut = [Box(box.offsets, box.data.detach().to("cpu", copy=True)) for box in cut]
        return Part(whole_shape(slices[0], self._mesh), slices[0].local.dtype, cut)

    def _write(self, step: int, parts: Mapping[str, Part], values_json: str) -> None:
        final = self._folder / f"step_{step:08d}"
        partial = self._hidden(final, _PARTIAL)

        def prepare() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        self._on_first_rank(prepare)
        listing = write_tensors(partial, parts, self._group)

        def make_current() -> None:
            write_values(partial, values_json, listing)
            replaced = self._hidden(final, _REPLACED)
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            sync_folder(self._folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune(final)

        self._on_first_rank(make_current)

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; all ranks go on once it is done, or raise what it met."""
        problem: list[str | None] = [None]
        if self._mesh.world.rank == 0:
            try:
                action()
            except OSError as error:
                problem[0] = str(error)
        if self._group is not None:
            dist.broadcast_object_list(problem, src=self._mesh.world.ranks[0], group=self._group)
        if problem[0] is not None:
            raise RuntimeError(f"can't write checkpoints in {self._folder}: {problem[0]}")

    def _complete(self) -> list[Path]:
        return sorted(p for p in self._folder.glob("step_*") if p.name[5:].isdigit() and is_complete(p))

    def _recover(self) -> None:
        for path in self._folder.glob(f".step_*{_REPLACED}"):
            final = self._folder / path.name[1 : -len(_REPLACED)]
            if final.exists():
                shutil.rmtree(path)
            else:  # killed between the two renames
                path.rename(final)
        for path in self._folder.glob(f".step_*{_PARTIAL}"):
            shutil.rmtree(path)

    def _prune(self, current: Path) -> None:
        for path in self._complete()[: -self._keep_last]:
            step = int(path.name[5:])
            if path != current and not (self._keep_every and step % self._keep_every == 0):
                hidden = self._hidden(path, _PARTIAL)
                path.rename(hidden)  # at once: one that is half removed must not look complete
                shutil.rmtree(hidden)

    def _hidden(self, path: Path, suffix: str) -> Path:
        return path.with_name(f".{path.name}{suffix}")


def _list(part: Slice | Sequence[Slice]) -> Sequence[Slice]:
    return [part] if isinstance(part, Slice) else part


def read_values(path: Path) -> dict:
    """The values of a checkpoint; needs no process group.  ValueError where it isn't one."""
    values: dict = read_description(path)["values"]
    return values


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, all or those of `names`, on the CPU; needs no process group."""
    listing = read_description(path)["tensors"]
    wanted = list(listing) if names is None else list(names)
    missing = [name for name in wanted if name not in listing]
    if missing:
        raise ValueError(f"checkpoint {path} has no tensor {missing[0]} ({len(missing)} of {len(wanted)} are missing)")
    tensors = {name: torch.empty(listing[name]["shape"], dtype=getattr(torch, listing[name]["dtype"])) for name in wanted}
    parts = {name: Part(tuple(t.shape), t.dtype, [Box((0,) * t.dim(), t)]) for name, t in tensors.items()}
    read_into(path, parts)
    return tensors


def check_same(path: Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError that names the first tensors that differ in name or shape."""
    different = []
    for name in [*wanted, *(n for n in saved if n not in wanted)]:
        there, here = saved.get(name), wanted.get(name)
        if there != here:
            there_text = "absent" if there is None else str(list(there))
            here_text = "absent" if here is None else str(list(here))
            different.append(f"{name}: {there_text} in the checkpoint, {here_text} here")
    if different:
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        names = "; ".join(different[:3])
        raise ValueError(f"checkpoint {path} is of another model or optimizer: {names}{more}; use its settings")
