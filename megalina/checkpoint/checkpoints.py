"""The checkpoints of a run: one folder a step, each complete or not there, loadable in any layout.

RUN/checkpoints/step_00000020/ is written under a hidden name and renamed when all of it is on disk.  A kill at any
moment leaves the older ones as they are; what it left half-written is removed at the next start.  A disk that is full
fails the save and nothing else.  One that is damaged is passed over, by all ranks alike, and named.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megalina.checkpoint.checksums import Sum, damaged
from megalina.checkpoint.files import SaveFailed, is_complete, newest_first, sync_folder, write_rest
from megalina.comm.slice import Box, Part, Slice, boxes, whole_shape
from megalina.groups import new_group
from megalina.mesh import Mesh

T = TypeVar("T")
Write = Callable[[Path], tuple[dict[str, Any], dict[str, Sum]]]  # tensors into a folder: what values.json says of them, and sums

logger = logging.getLogger("megalina")
_TIMEOUT = timedelta(minutes=30)  # ranks may write for a long time, to a slow disk
_PARTIAL = ".partial"  # being written or being removed: never of use
_DAMAGED = ".damaged"  # set aside: never of use, never removed
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
        group = new_group(mesh.world.ranks, timeout=_TIMEOUT, gloo=True) if mesh.world.size > 1 else None
        self._group = group
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._good: Path | None = None  # found to be so, and not loaded yet
        self._passed_over: set[Path] = set()  # damaged ones, which neither count nor evict others
        problem = self._on_first_rank(self._recover)
        if problem is not None:
            raise RuntimeError(f"can't clear up {folder}: {problem}")

    def use(self, mesh: Mesh) -> None:
        """From now on slices are of this mesh, which has the same ranks."""
        self._mesh = mesh

    def save(
        self,
        step: int,
        tensors: Mapping[str, Slice | Sequence[Slice]],
        values: dict,
        *,
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        """Save `tensors`, of each the slices that this rank holds, which over all ranks are the whole, and `values`,
        anything that JSON can hold.  `beside`, of rank 0, writes what else is to be in the folder; it is given the folder while
        that is hidden, and what it writes is no part of the checkpoint.

        SaveFailed, on all ranks, where one can't write: what was written is removed, older checkpoints stay.  An
        asynchronous save raises it from the next `save`, which is under way nevertheless, or from `wait`."""
        # A second at the first save, which every start is spared; here, since a thread should not import beside a running step.
        from megalina.checkpoint.tensor_files import write_tensors

        values_json = json.dumps(values)
        copy = self._thread is not None
        failed: SaveFailed | None = None
        try:
            self.wait()
        except SaveFailed as error:  # the one before: no reason not to try again
            failed = error
        parts = {name: self._part(part, copy=copy) for name, part in tensors.items()}
        write = functools.partial(write_tensors, parts=parts, group=self._group)
        if self._thread is None:
            self._write(step, write, values_json, beside)
        else:
            self._pending = self._thread.submit(self._write, step, write, values_json, beside)
        if failed is not None:
            raise failed

    def wait(self) -> None:
        """Until the asynchronous save, if one is under way, is complete; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step; the same on all ranks."""
        self.wait()
        return self._from_first_rank(max(self._complete(), default=None) if self._mesh.world.rank == 0 else None)

    def first_good(self, candidates: Sequence[Path]) -> Path | None:
        """The first of `candidates` (rank 0's count) in which no file is missing or damaged; None where there are none.

        Each rank reads a share of the files, and all decide alike.  What is passed over is named in a warning and, if it
        is in this folder, set aside as NAME.damaged.  ValueError where all are damaged: it names them."""
        self.wait()
        passed: dict[Path, list[str]] = {}
        for path in self._from_first_rank(list(candidates)):
            found = self._damage(path)
            if not found:
                if self._mesh.world.rank == 0:
                    self._set_aside(passed, path)
                self._good = path
                return path
            passed[path] = found
        if passed:
            raise ValueError(all_damaged(passed))
        return None

    def load(self, path: Path, tensors: Mapping[str, Slice | Sequence[Slice]], *, prefix: str = "") -> dict:
        """Fill `tensors` in place, whatever the layout and types they were saved in; returns the values.

        ValueError, before anything is changed, where a file is damaged (found by all ranks together, unless `first_good`
        has just done so), and where the checkpoint's tensors (those whose names start with `prefix`) are not these ones
        in name and shape.
        """
        from megalina.checkpoint.stored import Stored  # a second, which a run that starts anew need not wait for

        if self._good != path:
            self.first_good([path])
        self._good = None
        stored = Stored(path, checked=True)
        saved = {name: shape for name, (shape, _) in stored.listing.items() if name.startswith(prefix)}
        check_same(path, saved, self._everywhere({n: whole_shape(_list(part)[0], self._mesh) for n, part in tensors.items()}))
        stored.read_into({name: self._part(part, copy=False) for name, part in tensors.items()})
        return stored.values

    def _part(self, part: Slice | Sequence[Slice], *, copy: bool) -> Part:
        slices = _list(part)
        cut = [box for one in slices for box in boxes(one, self._mesh)]
        if copy:
            cut = [Box(box.offsets, box.data.detach().to("cpu", copy=True)) for box in cut]
        return Part(whole_shape(slices[0], self._mesh), slices[0].local.dtype, cut)

    def _write(self, step: int, write: Write, values_json: str, beside: Callable[[Path], None] | None) -> None:
        final = self._folder / f"step_{step:08d}"
        hidden, replaced = self._hidden(final, _PARTIAL), self._hidden(final, _REPLACED)
        try:
            self._save_on_first_rank(final, lambda: self._prepare(hidden))
            listing, own = write(hidden)
            sums = self._gathered(own)

            def make_current() -> None:
                if beside is not None:
                    beside(hidden)
                write_rest(hidden, values_json, listing, sums)
                if final.exists():
                    shutil.rmtree(replaced, ignore_errors=True)
                    final.rename(replaced)
                hidden.rename(final)
                sync_folder(self._folder)

            self._save_on_first_rank(final, make_current)
        except SaveFailed as error:  # on all ranks: none of them is writing any more
            if self._mesh.world.rank == 0:
                self._tidy(lambda: self._undo(final))
            raise SaveFailed(final, error.rank, error.reason) from error
        if self._mesh.world.rank == 0:
            self._tidy(lambda: self._make_room(final))

    def _prepare(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _undo(self, final: Path) -> None:
        """Remove what a save that failed has left: it may be what fills the disk."""
        partial, replaced = self._hidden(final, _PARTIAL), self._hidden(final, _REPLACED)
        if replaced.exists():  # the older one of the same step takes its place again
            if final.exists():
                final.rename(partial)
            replaced.rename(final)
        shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, current: Path) -> None:
        """Remove what the newest checkpoint makes superfluous."""
        self._passed_over.discard(current)
        shutil.rmtree(self._hidden(current, _REPLACED), ignore_errors=True)
        for path in self._complete()[: -self._keep_last]:
            step = int(path.name[5:])
            if path != current and not (self._keep_every and step % self._keep_every == 0):
                hidden = self._hidden(path, _PARTIAL)
                path.rename(hidden)  # at once: one that is half removed must not look complete
                shutil.rmtree(hidden)

    def _tidy(self, action: Callable[[], None]) -> None:
        """Rank 0 runs `action`; what can't be removed is no reason to fail a save."""
        try:
            action()
        except OSError as error:
            logger.warning("checkpoints in %s: something old could not be removed: %s", self._folder, error)

    def _save_on_first_rank(self, final: Path, action: Callable[[], None]) -> None:
        problem = self._on_first_rank(action)
        if problem is not None:
            raise SaveFailed(final, 0, problem)

    def _on_first_rank(self, action: Callable[[], None]) -> str | None:
        """Run `action` on rank 0; all ranks go on once it is done, and hear alike what the disk said against it.

        RuntimeError, on all ranks, where something else went wrong."""
        problem: str | None = None
        is_disk = True
        if self._mesh.world.rank == 0:
            try:
                action()
            except Exception as error:  # noqa: BLE001  the others wait to hear of it
                problem, is_disk = str(error) or type(error).__name__, isinstance(error, OSError)
        problem, is_disk = self._from_first_rank((problem, is_disk))
        if not is_disk:
            raise RuntimeError(f"rank 0, with checkpoints in {self._folder}: {problem}")
        return problem

    def _from_first_rank(self, value: T) -> T:
        found = [value]
        if self._group is not None:
            dist.broadcast_object_list(found, src=self._mesh.world.ranks[0], group=self._group)
        return found[0]

    def _everywhere(self, own: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The tensors of all ranks: each has some of all of them, but in a pipeline."""
        if self._group is None or self._mesh.pp == 1:
            return own
        everyone = [own] * self._mesh.world.size
        dist.all_gather_object(everyone, own, group=self._group)
        return {name: shape for theirs in everyone for name, shape in theirs.items()}

    def _gathered(self, own: Mapping[str, Sum]) -> dict[str, Sum]:
        """The sums of all ranks' files."""
        if self._group is None:
            return dict(own)
        everyone: list[Mapping[str, Sum]] = [{}] * self._mesh.world.size
        dist.all_gather_object(everyone, own, group=self._group)
        return {name: sum_ for sums in everyone for name, sum_ in sums.items()}

    def _damage(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint, found by all ranks together."""
        world = self._mesh.world
        try:
            own = damaged(path, (world.rank, world.size))
        except OSError as error:  # reported to the other ranks, whatever it is
            own = [f"it can't be read: {error}"]
        everyone = [own] * world.size
        if self._group is not None:
            dist.all_gather_object(everyone, own, group=self._group)
        return list(dict.fromkeys(reason for found in everyone for reason in found))

    def _set_aside(self, passed: Mapping[Path, list[str]], good: Path) -> None:
        for path, found in passed.items():
            logger.warning("checkpoint %s is damaged and passed over for %s: %s", path, good.name, "; ".join(found))
            if path.parent == self._folder:
                self._passed_over.add(path)
                aside = path.with_name(path.name + _DAMAGED)
                while aside.exists():
                    aside = aside.with_name(aside.name + "_")
                try:
                    path.rename(aside)
                except OSError as error:
                    logger.warning("it could not be renamed to %s: %s", aside.name, error)

    def _complete(self) -> list[Path]:
        return [p for p in reversed(newest_first(self._folder)) if is_complete(p) and p not in self._passed_over]

    def _recover(self) -> None:
        for path in self._folder.glob(f".step_*{_REPLACED}"):
            final = self._folder / path.name[1 : -len(_REPLACED)]
            if final.exists():
                shutil.rmtree(path)
            else:  # killed between the two renames
                path.rename(final)
        for path in self._folder.glob(f".step_*{_PARTIAL}"):
            shutil.rmtree(path)

    def _hidden(self, path: Path, suffix: str) -> Path:
        return path.with_name(f".{path.name}{suffix}")


def _list(part: Slice | Sequence[Slice]) -> Sequence[Slice]:
    return [part] if isinstance(part, Slice) else part


def all_damaged(found: Mapping[Path, Sequence[str]]) -> str:
    """The message for checkpoints of which none is any good."""
    each = "; ".join(f"{path}: {', '.join(reasons)}" for path, reasons in found.items())
    if len(found) == 1:
        return f"checkpoint {each}; it is damaged or incomplete: choose another one"
    return f"all {len(found)} checkpoints are damaged or incomplete ({each}): name another one, or choose another run.dir"


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
