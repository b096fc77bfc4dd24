"""The way out: a checkpoint of any layout becomes a Hugging Face folder, with one tensor in memory at a time."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalina.checkpoint.files import MODEL, sync_folder
from megalina.checkpoint.hugging_face import carried
from megalina.checkpoint.hugging_face.expert_sums import ExpertSums
from megalina.checkpoint.hugging_face.linked import Linked, check_keys, settings_of
from megalina.checkpoint.hugging_face.progress import Progress, check_room
from megalina.checkpoint.hugging_face.source import CONFIG, INDEX
from megalina.checkpoint.hugging_face.views import theirs_from
from megalina.checkpoint.safetensors_file import DTYPE_NAMES, write_file
from megalina.checkpoint.stored import Stored
from megalina.checkpoint.streaming_writer import published
from megalina.families.family import Family, Settings
from megalina.families.table import family_for, family_named, family_of

REPORT = "export_report.json"
SHARD_BYTES = 5_000_000_000
HEADER_BYTES = 200  # of a tensor, in a shard and in the index, at the most


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export has done; the report in the folder has it as JSON."""

    family: str
    keys: int
    shards: int
    num_bytes: int
    experts: dict[str, str]  # as an import has them
    files: list[str]  # that went along
    notes: list[str]


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    *,
    family: str = "",
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Exported:
    """Write the Hugging Face folder `target`: sharded safetensors, their index, config.json.

    `family`: its name; "": the one that the checkpoint was imported from, else that of `like`, else the first that has the model.
    `like`: a Hugging Face folder whose tokenizer, and fields of config.json that change no logit, go along; None: what the
    checkpoint carries.
    ValueError before anything is written where no family has this model, a tensor has no place in it, or the disk has no room.
    Nothing stays then, and a kill leaves nothing that looks like a model."""
    stored = Stored(checkpoint)
    settings = settings_of(stored.values["config"], stored.values["vocab_size"])
    came = stored.values.get("hugging_face") or {}
    along = (checkpoint / carried.FOLDER) if like is None else like / carried.FOLDER if (like / carried.FOLDER).is_dir() else like
    chosen = _family(family or came.get("family", "") or _named_by(along, settings), settings, checkpoint)
    linked = Linked(chosen, settings)
    names = {name.removeprefix(MODEL): shape for name, (shape, _) in stored.listing.items() if name.startswith(MODEL)}
    check_keys(names, {name: links[0].ours.shape for name, links in linked.ours.items()}, str(checkpoint))
    listing = {key: (linked.theirs[key][0].theirs.shape, _dtype_of(stored, linked, key)) for key in linked.keys_by_tensor()}
    num_bytes = sum(_bytes(entry) for entry in listing.values())
    config, notes = _config(chosen, settings, along, listing)
    if settings.router.has_capacity:
        notes.append("the model was trained with a capacity; Hugging Face's experts take all tokens that choose them")
    check_room(target, num_bytes + HEADER_BYTES * len(listing) + sum(path.stat().st_size for path in carried.carried(along)))
    shards = _shards(listing, shard_bytes)
    line = Progress(f"export {target.name}", num_bytes) if progress else None
    sums = ExpertSums()
    fetch = _fetch(stored, linked, listing, sums, line)
    with published(target) as hidden:
        hidden.mkdir(parents=True)
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(hidden / file, {key: listing[key] for key in keys}, {"format": "pt"}, fetch)
            weight_map |= dict.fromkeys(keys, file)
        files = carried.copy_all(along, hidden)
        if carried.tokenizer_of(hidden) is None:
            notes.append("no tokenizer goes along: give a folder that has it with --like")
        done = Exported(chosen.name, len(listing), len(shards), num_bytes, dict(sums.found()), files, notes)
        _write(hidden / CONFIG, config)
        _write(hidden / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))})
        _write(hidden / REPORT, asdict(done))
        sync_folder(hidden)
    if line is not None:
        line.end()
    return done


def _family(name: str, settings: Settings, checkpoint: Path) -> Family:
    try:
        family = family_named(name) if name else family_for(settings)
        family.written(settings)
        return family
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def _named_by(along: Path, settings: Settings) -> str:
    """The family of the config.json in `along` that has this model; "" where there is none."""
    try:
        found = family_of(json.loads((along / CONFIG).read_bytes()))
        found.written(settings)
        return found.name
    except (OSError, ValueError, AttributeError):  # no such file, no JSON, no object; another model
        return ""


def _config(
    family: Family, settings: Settings, along: Path, listing: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> tuple[dict[str, Any], list[str]]:
    """config.json, with fields of the one in `along` that change no logit; and what is worth saying of it."""
    written = family.written(settings)
    count: dict[torch.dtype, int] = {}
    for entry in listing.values():
        count[entry[1]] = count.get(entry[1], 0) + _bytes(entry)
    dtype = str(max(count, key=lambda kind: count[kind])).removeprefix("torch.")
    written |= {"dtype": dtype, "torch_dtype": dtype}  # of transformers 5, of 4
    if not (along / CONFIG).is_file():
        return written, []
    try:
        carried_fields = json.loads((along / CONFIG).read_bytes())
        if carried_fields.get("model_type") in family.model_types:  # one of several names of the family, and its class
            written |= {name: carried_fields[name] for name in ("model_type", "architectures") if name in carried_fields}
        whole = {**carried_fields, **written}
        if family.read(whole).math() == settings.math():
            return whole, []
    except ValueError:  # of another family, say
        pass
    return written, [f"{along / CONFIG} is of another model: none of its fields are taken"]


def _dtype_of(stored: Stored, linked: Linked, key: str) -> torch.dtype:
    names = [link.ours.name for link in linked.theirs[key]]
    found = {stored.listing[MODEL + name][1]: name for name in names}
    if len(found) > 1:
        kinds = " and ".join(f"{name} is {dtype}" for dtype, name in found.items())
        raise ValueError(f"{stored.path}: {kinds}: in Hugging Face's format they are one tensor ({key}), of one type")
    dtype = next(iter(found))
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{stored.path}: safetensors files can't hold {names[0]}, which is {dtype}")
    return dtype


def _bytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    return torch.Size(entry[0]).numel() * entry[1].itemsize


def _shards(listing: dict[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int) -> list[list[str]]:
    """Keys of each file, in the order of the listing; types with large elements first within one, so that all are aligned."""
    shards: list[list[str]] = [[]]
    held = 0
    for key, entry in listing.items():
        if held and held + _bytes(entry) > shard_bytes:
            shards.append([])
            held = 0
        held += _bytes(entry)
        shards[-1].append(key)
    return [sorted(keys, key=lambda key: -listing[key][1].itemsize) for keys in shards]


def _fetch(
    stored: Stored,
    linked: Linked,
    listing: dict[str, tuple[tuple[int, ...], torch.dtype]],
    sums: ExpertSums,
    line: Progress | None,
) -> Callable[[str], Tensor]:
    """Tensors of theirs, asked for so that those of one of our tensors come together."""
    held: dict[str, Tensor] = {}
    summed: set[str] = set()

    def ours(name: str) -> Tensor:
        if name not in held:
            held[name] = stored.tensor(MODEL + name)
            if name not in summed:
                summed.add(name)
                sums.add(name, 0, held[name])
        return held[name]

    def fetch(key: str) -> Tensor:
        links = linked.theirs[key]
        for name in set(held) - {link.ours.name for link in links}:
            del held[name]
        found = theirs_from(links, listing[key][1], ours)
        if line is not None:
            line.add(found.nbytes)
        return found

    return fetch


def _write(file: Path, value: Any) -> None:
    with file.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=2)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
