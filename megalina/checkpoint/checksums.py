"""The checksums of a checkpoint: SHA256SUMS, which `sha256sum -c SHA256SUMS` reads, and what they say of its files.

    9f86d081...  .metadata
    60303ae2...  __0_0.distcp
    fd61a03a...  values.json
    # sizes in bytes, in this order: 1234 5678 90
    # checks of the lines above: 0c1d2e3f ...; of this line: 4a5b6c7d

The comments tell damage to SHA256SUMS itself, by its line, from damage to a file, and a file cut short from one changed.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VALUES, METADATA, SUMS = "values.json", ".metadata", "SHA256SUMS"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_SUM_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_SIZES, _CHECKS, _OWN = "# sizes in bytes, in this order: ", "# checks of the lines above: ", "; of this line: "


@dataclass(frozen=True, slots=True)
class Sum:
    """What a file should be."""

    sha256: str  # 64 hexadecimal digits
    num_bytes: int


def sum_of(path: Path) -> Sum:
    """Reads the whole file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Sum(digest, file.tell())


def write_sums(path: Path, sums: Mapping[str, Sum]) -> None:
    """Write SHA256SUMS into the checkpoint folder `path`, synced; `sums` has an entry for each of its files."""
    lines = [f"{sums[name].sha256}  {name}" for name in sorted(sums)]
    lines.append(_SIZES + " ".join(str(sums[name].num_bytes) for name in sorted(sums)))
    last = _CHECKS + " ".join(map(_check, lines)) + _OWN
    text = "\n".join([*lines, last + _check(last)]) + "\n"
    with (path / SUMS).open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_sums(path: Path) -> dict[str, Sum]:
    """What SHA256SUMS in the checkpoint folder `path` says of each file.

    ValueError, with the line, where it is damaged, names a file outside its folder, or leaves out one that must be there."""
    return _parse(path, (path / SUMS).read_bytes().decode("latin-1"))


def read_checked(path: Path, name: str) -> bytes:
    """The file `name` of the checkpoint folder `path`; ValueError where it isn't what SHA256SUMS says."""
    want = read_sums(path)[name]
    data = (path / name).read_bytes()
    if reason := _difference(Sum(hashlib.sha256(data).hexdigest(), len(data)), want):
        raise ValueError(f"{path / name} is damaged: {reason}")
    return data


def damaged(path: Path, part: tuple[int, int] = (0, 1), *, tensors: bool = True) -> list[str]:
    """The files of the checkpoint folder `path` that are missing or not what SHA256SUMS says, each as "NAME: REASON".

    `part` (index, count): of the tensor files' contents only the share `index` of `count` is read, so that `count`
    ranks read each once; the rest is checked by all.  Without `tensors` none is read, only their sizes are compared."""
    if not path.is_dir():
        return ["there is no such folder"]
    found = [f"{name}: there is no such file" for name in (VALUES, METADATA, SUMS) if not (path / name).is_file()]
    if not (path / SUMS).is_file():
        return found
    try:
        sums = read_sums(path)
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix(str(path / SUMS)).removeprefix(" is damaged:").strip()
        return [*found, f"{SUMS}: {reason}"]
    mine = share(sums, part) if tensors else []
    for name, want in sums.items():
        if (path / name).is_file():
            reason = _problem(path / name, want, content=name in (VALUES, METADATA) or name in mine)
            if reason:
                found.append(f"{name}: {reason}")
        elif name not in (VALUES, METADATA):
            found.append(f"{name}: there is no such file")
    return found


def check_files(path: Path, names: list[str]) -> None:
    """Reads the files `names` of the checkpoint folder `path`.

    ValueError that names those that are missing or not what SHA256SUMS says."""
    sums, found = read_sums(path), []
    for name in names:
        if name not in sums:
            found.append(f"{path / name} is not in {SUMS}")
        elif reason := _problem(path / name, sums[name], content=True):
            found.append(f"{path / name} is damaged: {reason}")
    if found:
        raise ValueError("; ".join(found))


def share(sums: Mapping[str, Sum], part: tuple[int, int]) -> list[str]:
    """The files of share `index` of `count`, of about the same number of bytes each; together they are all."""
    index, count = part
    load, mine = [0] * count, []
    for name in sorted(sums, key=lambda n: (-sums[n].num_bytes, n)):
        least = min(range(count), key=lambda i: load[i])
        load[least] += sums[name].num_bytes + 1  # empty files are shared out too
        if least == index:
            mine.append(name)
    return mine


def check_inside(path: Path, name: str, source: str) -> None:
    """ValueError if `name`, as `source` has it, is not of a file that lies in the checkpoint folder `path` itself."""
    if not _PLAIN_NAME.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"{source} names the file {name!r}, which is not in the checkpoint's own folder")
    target = os.path.realpath(path / name)
    if os.path.dirname(target) != os.path.realpath(path):
        raise ValueError(f"{source} names the file {name!r}, which is a link out of the checkpoint's folder, to {target}")


def _parse(path: Path, text: str) -> dict[str, Sum]:
    file = path / SUMS
    lines = text.split("\n")
    if lines.pop():  # what follows the last newline
        raise ValueError(f"{file} is damaged: line {len(lines) + 1} has no end")
    last, above = (lines[-1], lines[:-1]) if lines else ("", [])
    body, own, digits = last.rpartition(_OWN)
    if not own or not body.startswith(_CHECKS) or _check(body + own) != digits:
        raise ValueError(f"{file} is damaged: line {max(1, len(lines))} is not the last line as it was written")
    checks = body.removeprefix(_CHECKS).split(" ")
    for i, line in enumerate(above):
        if i >= len(checks) or _check(line) != checks[i]:
            raise ValueError(f"{file} is damaged: line {i + 1} is not as it was written")
    if len(above) != len(checks):
        raise ValueError(f"{file} is damaged: it has {len(lines)} lines, not {len(checks) + 1}: line {len(lines)} comes too soon")
    return _sums(path, above)


def _sums(path: Path, lines: list[str]) -> dict[str, Sum]:
    file, sums = path / SUMS, {}
    sizes = lines[-1].removeprefix(_SIZES).split(" ")
    if not lines[-1].startswith(_SIZES) or len(sizes) != len(lines) - 1 or not all(re.fullmatch("[0-9]{1,18}", s) for s in sizes):
        raise ValueError(f"{file} is damaged: line {len(lines)} has no size for each of the {len(lines) - 1} files")
    for number, (line, size) in enumerate(zip(lines, sizes), 1):
        match = _SUM_LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise ValueError(f"{file} is damaged: line {number} is not a checksum and the name of one more file")
        check_inside(path, match[2], f"{file} line {number}")
        sums[match[2]] = Sum(match[1], int(size))
    missing = [name for name in (VALUES, METADATA) if name not in sums]
    if missing:
        raise ValueError(f"{file} is damaged: it has no line for {missing[0]}")
    return sums


def _check(line: str) -> str:
    return hashlib.sha256(line.encode("latin-1")).hexdigest()[:8]


def _problem(path: Path, want: Sum, *, content: bool) -> str:
    try:
        num_bytes = path.stat().st_size
        found = sum_of(path) if content and num_bytes == want.num_bytes else Sum(want.sha256, num_bytes)
    except OSError as error:
        return f"it can't be read: {error.strerror}"
    return _difference(found, want)


def _difference(found: Sum, want: Sum) -> str:
    if found.num_bytes != want.num_bytes:
        return f"it has {found.num_bytes} bytes, not {want.num_bytes}"
    return "" if found.sha256 == want.sha256 else f"its checksum is not the one in {SUMS}"
