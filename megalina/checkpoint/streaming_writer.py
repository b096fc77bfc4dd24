"""A streamed checkpoint: written by one process, one tensor at a time in memory, into any number of tensor files."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megalina.checkpoint.files import sync_folder, write_rest
from megalina.checkpoint.hugging_face.carried import carry_from
from megalina.checkpoint.stored import Stored
from megalina.checkpoint.tensor_files import Fetch, write_streamed
from megalina.comm.slice import Box, Part, span

Listing = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name: shape of the whole tensor, type


Beside = Callable[[Path], object]  # writes what else is to be in a checkpoint's folder, last, while that is hidden


def nothing(folder: Path) -> None:
    """No file more."""


def write_checkpoint(
    path: Path, values: Mapping[str, Any], listing: Listing, fetch: Fetch, *, files: int = 1, beside: Beside = nothing
) -> None:
    """Write the checkpoint folder `path`, which must not be there; `fetch` gives the data of a box of a tensor.

    The tensors lie one after the other in `files` tensor files of the same size, whole but for those at the cuts.
    ValueError for fewer files than 1, or more than the tensors have rows; OSError where it can't be written: nothing stays."""
    rows = sum(shape[0] if shape else 1 for shape, _ in listing.values())
    if not 1 <= files <= max(rows, 1):
        raise ValueError(
            f"{files} tensor files: a checkpoint has at least 1, and at most as many as its tensors have rows, {rows}"
        )
    _write(path, values, _shares(listing, files), fetch, beside)


def write_rows(
    path: Path,
    values: Mapping[str, Any],
    listing: Listing,
    fetch: Fetch,
    *,
    box_bytes: int,
    file_bytes: int,
    beside: Beside,
) -> None:
    """As `write_checkpoint`, in boxes of whole rows: of as many as `box_bytes` hold, one at least, and as many tensor files as
    boxes fill with `file_bytes` each.  `fetch` is asked in the order of the listing."""
    shares: list[dict[str, Part]] = [{}]
    held = 0
    for name, box in row_boxes(listing, box_bytes):
        if held and held + box.data.nbytes > file_bytes:
            shares.append({})
            held = 0
        held += box.data.nbytes
        shares[-1].setdefault(name, Part(*listing[name], [])).boxes.append(box)
    _write(path, values, shares, fetch, beside)


def row_boxes(listing: Listing, box_bytes: int) -> Iterator[tuple[str, Box]]:
    """Every tensor in boxes of whole rows along its first dim; their data are shapes alone."""
    for name, (shape, dtype) in listing.items():
        rows, inner = (shape[0], shape[1:]) if shape else (1, ())
        step = max(1, box_bytes // max(1, _numel(inner) * dtype.itemsize))
        for start in range(0, rows, step):
            sizes = (min(step, rows - start), *inner) if shape else ()
            offsets = (start, *[0] * len(inner)) if shape else ()
            yield name, Box(offsets, torch.empty(sizes, dtype=dtype, device="meta"))


def _write(
    path: Path,
    values: Mapping[str, Any],
    shares: Sequence[Mapping[str, Part]],
    fetch: Fetch,
    beside: Beside,
) -> None:
    with published(path) as partial:
        partial.mkdir(parents=True)
        tensors, sums = write_streamed(partial, shares, fetch)
        beside(partial)
        write_rest(partial, json.dumps(values), tensors, sums)


def rewrite(source: Path, target: Path, *, files: int) -> None:
    """Write the checkpoint `source` again as `target`, with as many tensor files as `files` ranks would write."""
    stored = Stored(source)
    write_checkpoint(target, stored.values, stored.listing, from_stored(stored), files=files, beside=carry_from(source))


def from_stored(stored: Stored, prefix: str = "") -> Fetch:
    """The data of boxes as a checkpoint has it, where its tensors' names begin with `prefix`."""

    def fetch(name: str, box: Box) -> torch.Tensor:
        return stored.box(prefix + name, box.offsets, tuple(box.data.shape), box.data.dtype)

    return fetch


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write a file or folder under; it gets its name when all of it is there.

    ValueError if there is something of that name already."""
    if path.exists():
        raise ValueError(f"{path} is there already: remove it, or choose another name")
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        partial.rename(path)
        sync_folder(path.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _shares(listing: Listing, files: int) -> list[dict[str, Part]]:
    """Which boxes go to which file: tensor after tensor in the order of the names, cut where a file has its share."""
    total = sum(_numel(shape) * dtype.itemsize for shape, dtype in listing.values())
    cuts = [total * i // files for i in range(files + 1)]
    shares: list[dict[str, Part]] = [{} for _ in range(files)]
    position = 0  # in bytes
    for name in sorted(listing):
        shape, dtype = listing[name]
        count = _numel(shape)
        ends = [min(count, max(0, -((position - cut) // dtype.itemsize))) for cut in cuts]  # elements before each cut
        for share, start, stop in zip(shares, ends, ends[1:]):
            boxes = [Box(o, torch.empty(sizes, dtype=dtype, device="meta")) for o, sizes in span(shape, start, stop)]
            if boxes:
                share[name] = Part(shape, dtype, boxes)
        position += count * dtype.itemsize
    return shares


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
