"""SHA256SUMS is what sha256sum reads, and no changed bit stays unseen, in it or in a file."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from megalina.checkpoint.checksums import SUMS, Sum, damaged, read_sums, share, sum_of, write_sums
from megalina.checkpoint.files import is_complete, read_values
from megalina.checkpoint.stored import read_metadata, read_tensors
from tests.checkpoint.planted import flip, saved, sign


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole"), 20)


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def test_sha256sum_itself_finds_all_well_and_a_flipped_bit(path: Path) -> None:
    command = ["sha256sum", "--check", "--strict", SUMS]
    good = subprocess.run(command, cwd=path, capture_output=True, text=True, check=True)
    assert good.stdout.splitlines() == [".metadata: OK", "__0_0.distcp: OK", "values.json: OK"] and not good.stderr
    flip(path / "__0_0.distcp", 1000)
    bad = subprocess.run(command, cwd=path, capture_output=True, text=True, check=False)
    assert bad.returncode == 1 and "__0_0.distcp: FAILED" in bad.stdout


def test_sums_taken_while_writing_are_those_of_the_files(path: Path) -> None:
    assert read_sums(path) == {p.name: sum_of(p) for p in path.iterdir() if p.name != SUMS}
    assert damaged(path) == []


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "values.json"])
def test_a_flipped_bit_is_found_in_any_file_and_nothing_is_read_from_it(path: Path, name: str) -> None:
    size = (path / name).stat().st_size
    for place in (0, size // 2, size - 1):
        flip(path / name, place, 0x20)
        assert damaged(path) == [f"{name}: its checksum is not the one in SHA256SUMS"]
        assert damaged(path, tensors=False) == ([] if name.endswith(".distcp") else damaged(path))
        with pytest.raises(ValueError, match=rf"step_00000020/{name} is damaged: its checksum"):
            read_tensors(path)
        flip(path / name, place, 0x20)
    read_tensors(path)


def test_every_flipped_bit_of_the_sums_is_found_with_its_line(path: Path) -> None:
    data = (path / SUMS).read_bytes()
    line = 1
    for place, byte in enumerate(data):
        for bit in (0x01, 0x08, 0x20, 0x80):
            flip(path / SUMS, place, bit)
            found = damaged(path, tensors=False)
            assert len(found) == 1 and found[0].startswith(f"{SUMS}: line {line} "), (place, bit, line, found)
            flip(path / SUMS, place, bit)
        line += byte == ord("\n")
    assert line == 6 and damaged(path) == []


@pytest.mark.parametrize("lines", range(5))
def test_sums_cut_at_any_line_are_damaged(path: Path, lines: int) -> None:
    kept = (path / SUMS).read_text().splitlines(keepends=True)[:lines]
    (path / SUMS).write_text("".join(kept))
    with pytest.raises(ValueError, match=f"SHA256SUMS is damaged: line {max(1, lines)} is not the last line"):
        read_values(path)


def test_a_line_left_out_is_damage(path: Path) -> None:
    lines = (path / SUMS).read_text().splitlines(keepends=True)
    (path / SUMS).write_text("".join(lines[:1] + lines[2:]))
    assert damaged(path) == ["SHA256SUMS: line 2 is not as it was written"]


def test_missing_and_cut_files_are_named_with_their_sizes(path: Path) -> None:
    data = path / "__0_0.distcp"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[:-5])
    assert damaged(path, tensors=False) == [f"__0_0.distcp: it has {size - 5} bytes, not {size}"]
    data.unlink()
    (path / "values.json").unlink()
    assert damaged(path) == ["values.json: there is no such file", "__0_0.distcp: there is no such file"]
    assert damaged(path / "nowhere") == ["there is no such folder"]


def test_a_checkpoint_without_sums_is_incomplete(path: Path) -> None:
    (path / SUMS).unlink()
    assert not is_complete(path)
    assert damaged(path) == ["SHA256SUMS: there is no such file"]
    with pytest.raises(ValueError, match="not a complete checkpoint: it has no SHA256SUMS"):
        read_values(path)


def test_a_file_that_cannot_be_read_is_damage_and_no_crash(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> Sum:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megalina.checkpoint.checksums.sum_of", fails)
    assert "__0_0.distcp: it can't be read: Input/output error" in damaged(path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_even_and_together_all_files_once(ranks: int) -> None:
    sums = {f"__{i}_0.distcp": Sum("0" * 64, 1000 + i) for i in range(24)} | {"empty": Sum("0" * 64, 0)}
    shares = [share(sums, (rank, ranks)) for rank in range(ranks)]
    assert Counter(name for names in shares for name in names) == Counter(list(sums))
    loads = [sum(sums[name].num_bytes for name in names) for names in shares]
    assert max(loads) - min(loads) <= 1024


def test_each_rank_reads_its_share_and_together_they_find_everything(tmp_path: Path) -> None:
    (tmp_path / "values.json").write_text("{}")
    (tmp_path / ".metadata").write_text("")
    for i in range(6):
        (tmp_path / f"__{i}_0.distcp").write_bytes(bytes([i]) * 100)
    sign(tmp_path)
    for i in range(6):
        flip(tmp_path / f"__{i}_0.distcp", 50)
    found = [damaged(tmp_path, (rank, 3)) for rank in range(3)]
    assert [len(own) for own in found] == [2, 2, 2]
    assert sorted(line for own in found for line in own) == sorted(damaged(tmp_path))


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/hostname", "..", "deeper/__0_0.distcp", "a\\b"])
def test_sums_and_metadata_that_name_a_file_outside_are_refused(path: Path, name: str) -> None:
    sums = read_sums(path)
    write_sums(path, sums | {name: sums["__0_0.distcp"]})
    with pytest.raises(ValueError, match=r"SHA256SUMS line \d names the file .*, which is not in the checkpoint's own folder"):
        read_sums(path)
    assert len(damaged(path)) == 1
    metadata = (path / ".metadata").read_bytes()
    short = b"__0_0.distcp"
    planted = metadata.replace(
        b"X" + len(short).to_bytes(4, "little") + short, b"X" + len(name).to_bytes(4, "little") + name.encode()
    )
    planted = planted.replace(b"\x8c" + bytes([len(short)]) + short, b"\x8c" + bytes([len(name)]) + name.encode())
    assert planted != metadata
    # A pickle of protocol 4 counts the bytes of its one frame.
    (path / ".metadata").write_bytes(planted[:3] + (len(planted) - 11).to_bytes(8, "little") + planted[11:])
    sign(path)
    for read in (read_metadata, read_tensors):
        with pytest.raises(ValueError, match=r"\.metadata names the file .*, which is not in the checkpoint's own folder"):
            read(path)


def test_a_link_out_of_the_folder_is_refused(path: Path) -> None:
    outside = path.parent / "outside"
    (path / "__0_0.distcp").rename(outside)
    (path / "__0_0.distcp").symlink_to(outside)
    for read in (read_sums, read_tensors):
        with pytest.raises(ValueError, match="'__0_0.distcp', which is a link out of the checkpoint's folder, to .*outside"):
            read(path)


def test_a_file_that_the_sums_leave_out_is_not_read(path: Path) -> None:
    sums = read_sums(path)
    del sums["__0_0.distcp"]
    write_sums(path, sums)
    with pytest.raises(ValueError, match="__0_0.distcp is not in SHA256SUMS"):
        read_tensors(path)
