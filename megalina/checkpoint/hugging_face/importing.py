"""The way in: a Hugging Face folder becomes a checkpoint that any layout loads, with one tensor in memory at a time."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalina.checkpoint.files import MODEL
from megalina.checkpoint.hugging_face import carried
from megalina.checkpoint.hugging_face.expert_sums import ExpertSums
from megalina.checkpoint.hugging_face.linked import Linked, check_keys, numel, overrides
from megalina.checkpoint.hugging_face.progress import Progress, check_room
from megalina.checkpoint.hugging_face.source import CONFIG, Source
from megalina.checkpoint.hugging_face.views import ours_from
from megalina.checkpoint.streaming_writer import row_boxes, write_rows
from megalina.comm.slice import Box
from megalina.config import PretrainConfig, TrainConfig
from megalina.families.links import Link
from megalina.families.table import family_of
from megalina.validate import check_config

BOX_BYTES = 64 << 20  # of one box of a tensor: layouts read what they need of it
FILE_BYTES = 4 << 30
BOX_OVERHEAD = 4096  # bytes that a box takes on disk beside its numbers
DTYPES = {torch.bfloat16: "bfloat16", torch.float64: "float64"}  # train.dtype; any other: float32


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import has done; the report in the checkpoint folder has it as JSON."""

    family: str
    parameters: int
    keys: int  # tensors of the Hugging Face model, every one of them consumed
    ignored: list[str]  # keys that hold nothing learned
    tensors: int  # of ours
    num_bytes: int
    experts: dict[str, str]  # "layers.0.experts.3" -> SHA-256, see `ExpertSums`
    files: list[str]  # that go along: tokenizer and the like
    notes: list[str]
    overrides: list[str]  # that make the model, for training with train.init_from


def import_folder(
    folder: Path, target: Path, *, box_bytes: int = BOX_BYTES, file_bytes: int = FILE_BYTES, progress: bool = True
) -> Imported:
    """Write the checkpoint folder `target` from the Hugging Face folder `folder`: the same numbers in the same types.

    ValueError before anything is written where the model is of no family that there is, a field or tensor is unknown, missing or
    of another shape, the tokenizer has ids beyond the vocabulary, or the disk has no room; OSError where it can't be written.
    Nothing stays then, and a kill leaves nothing that looks like a checkpoint."""
    source = Source(folder)
    try:
        family = family_of(source.config)
        settings = family.present(family.read(source.config), source.listing)
        train = TrainConfig(dtype=_train_dtype(source), seq_len=min(TrainConfig().seq_len, settings.model.max_positions))
        config = PretrainConfig(model=settings.model, router=settings.router, train=train)
        check_config(config, 1)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    linked = Linked(family, settings)
    ignored = left_out(source, linked)
    check_keys({k: shape for k, (shape, _) in source.listing.items() if k not in ignored}, linked.key_shapes(), str(folder))
    notes = _check_tokenizer(folder, settings.model.vocab_size)
    names = sorted(linked.ours)
    listing = {MODEL + name: (linked.ours[name][0].ours.shape, _dtype_of(source, linked, name)) for name in names}
    num_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in listing.values())
    boxes = sum(1 for _ in row_boxes(listing, box_bytes))
    along = sum(path.stat().st_size for path in carried.carried(folder))
    check_room(target, num_bytes + boxes * BOX_OVERHEAD + along)
    sums, line = ExpertSums(), Progress(f"import {folder.name}", num_bytes) if progress else None
    read: Counter[str] = Counter()  # how often each key was
    fetch = _fetch(source, linked, listing, read, sums, line)

    def beside(hidden: Path) -> None:
        check_read(linked, read)
        copied = carried.copy_all(folder, hidden / carried.FOLDER)
        (hidden / carried.FOLDER).mkdir(exist_ok=True)
        (hidden / carried.FOLDER / CONFIG).write_bytes((folder / CONFIG).read_bytes())
        done.append(
            Imported(
                family=family.name,
                parameters=numel({name: shape for name, (shape, _) in listing.items()}),
                keys=len(read),
                ignored=ignored,
                tensors=len(listing),
                num_bytes=num_bytes,
                experts=dict(sums.found()),
                files=[CONFIG, *copied],
                notes=notes,
                overrides=overrides(settings),
            )
        )
        (hidden / carried.REPORT).write_text(json.dumps(asdict(done[0]), indent=1) + "\n")

    done: list[Imported] = []
    tokenizer = carried.tokenizer_of(folder)
    values: dict[str, Any] = {
        "step": 0,
        "vocab_size": settings.model.vocab_size,
        "tokenizer_path": "" if tokenizer is None else f"{carried.FOLDER}/{tokenizer.name}",
        "config": asdict(config),
        "hugging_face": {"family": family.name, "config": source.config},
    }
    write_rows(target, values, listing, fetch, box_bytes=box_bytes, file_bytes=file_bytes, beside=beside)
    if line is not None:
        line.end()
    return done[0]


def check_read(linked: Linked, read: Mapping[str, int]) -> None:
    """AssertionError unless each key was read once for each of its links: else numbers of ours are whatever was in memory."""
    wanted = {key: len(links) for key, links in linked.theirs.items()}
    wrong = [f"{key} ({read.get(key, 0)} of {count} times)" for key, count in wanted.items() if read.get(key, 0) != count]
    assert not wrong, f"{linked.family.name}: not read as linked: {', '.join(wrong[:3])}, {len(wrong)} of {len(wanted)} tensors"


def left_out(source: Source, linked: Linked) -> list[str]:
    """Keys that are not taken, since nothing in them is learned, or they are copies.  ValueError for copies that are none."""
    copies = linked.family.copies(linked.settings)
    found = [key for key in source.listing if key not in linked.theirs and (key in copies or linked.family.is_ignored(key))]
    for key in found:
        other = copies.get(key, key)
        if other != key and other in source.listing and not same_bytes(source.tensor(key), source.tensor(other)):
            raise ValueError(
                f"{source.folder}: {key} is not {other}, as {CONFIG} says (tie_word_embeddings): one of the two would be lost"
            )
    return found


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Also where they are no numbers, which equal nothing."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _fetch(
    source: Source,
    linked: Linked,
    listing: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Counter[str],
    sums: ExpertSums,
    line: Progress | None,
) -> Callable[[str, Box], Tensor]:
    """The data of boxes of whole rows, asked for tensor by tensor."""

    def theirs(key: str) -> Tensor:
        read[key] += 1
        return source.tensor(key)

    links: dict[str, Mapping[int, Sequence[Link]] | None] = {}  # of the last tensor, by row
    held: dict[str, Tensor] = {}  # the last one that can't be made row by row

    def fetch(full: str, box: Box) -> Tensor:
        name, dtype = full.removeprefix(MODEL), listing[full][1]
        if name not in links:
            links.clear()
            held.clear()
            links[name] = linked.by_row(name) if box.offsets else None
        by_row, first = links[name], box.offsets[0] if box.offsets else 0
        if by_row is not None:
            rows = range(first, first + box.data.shape[0])
            found = ours_from([link for row in rows for link in by_row[row]], dtype, theirs, rows)
        else:
            if name not in held:
                held[name] = ours_from(linked.ours[name], dtype, theirs)
            found = held[name]
            if found.shape != box.data.shape:
                found = found[first : first + box.data.shape[0]].clone()
        sums.add(name, first, found)
        if line is not None:
            line.add(found.nbytes)
        return found

    return fetch


def _dtype_of(source: Source, linked: Linked, name: str) -> torch.dtype:
    keys = [link.theirs.name for link in linked.ours[name]]
    found = {source.listing[key][1]: key for key in keys}
    if len(found) > 1:
        kinds = " and ".join(f"{key} is {dtype}" for dtype, key in found.items())
        raise ValueError(f"{source.folder}: {kinds}: they are one tensor here ({name}), of one type; write them in one")
    return next(iter(found))


def _train_dtype(source: Source) -> str:
    """Of most numbers."""
    count: dict[torch.dtype, int] = {}
    for shape, dtype in source.listing.values():
        count[dtype] = count.get(dtype, 0) + torch.Size(shape).numel()
    return DTYPES.get(max(count, key=lambda dtype: count[dtype], default=torch.float32), "float32")


def _check_tokenizer(folder: Path, vocab_size: int) -> list[str]:
    """What is worth saying of it.  ValueError where it can write ids that the model doesn't have."""
    tokenizer = carried.tokenizer_of(folder)
    if tokenizer is None:
        return [f"{folder} has no tokenizer.json or tokenizer.model: give one with --tokenizer to write text"]
    ids = carried.num_ids(tokenizer)
    if ids > vocab_size:
        raise ValueError(
            f"{tokenizer} has {ids} ids, and the model {vocab_size} rows (vocab_size in {CONFIG}): take the model's own tokenizer"
        )
    return [] if ids == vocab_size else [f"the tokenizer has {ids} ids, the model {vocab_size}: the rest is padding of the model"]
