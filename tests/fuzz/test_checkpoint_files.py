"""Checkpoints whose files were made to harm: nothing in them is run, and a ValueError names the file.

Their checksums are right, as one who plants something would make them.
"""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megalina.checkpoint.checksums import METADATA, VALUES
from megalina.checkpoint.files import read_values
from megalina.checkpoint.metadata_pickle import read_pickle
from megalina.checkpoint.stored import read_metadata, read_tensors
from tests.checkpoint.planted import STATE, saved, sign
from tests.fuzz.bounded import outcomes, spoiled

EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
NESTED = b")" + b"\x85" * 300_000  # a tuple in a tuple in a tuple ...
BOMBS = {
    "tuple_as_key": b"\x80\x04}" + NESTED + b"Ns.",
    "tuple_in_a_set": b"\x80\x04(" + NESTED + b"\x91.",
    "tuple_as_layout": b"\x80\x04\x8c\x13torch.serialization\x8c\x0b_get_layout\x93" + NESTED + b"R.",
    "memo_of_4_G_places": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo_of_100_M_places": b"\x80\x02Nr\x00\x00\x00\x06.",
    "2_to_the_60_bytes": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc.",
    "8_G_bytes": b"\x80\x04\x8e" + (2**33).to_bytes(8, "little") + b"abc.",
    "bytearray": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc.",
    "text_of_4_GB": b"\x80\x04X\xff\xff\xff\xffabc.",
    "frame": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
    "long4": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "digits": b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
    "recursion": b"\x80\x04" + b"(" * 300_000 + b"t" * 300_000 + b".",
    "empty": b"",
    "not_utf8": b"\x80\x04\x8c\x02\xff\xfe.",
    "other_object": b"\x80\x04N.",
}


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole"), 20)


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


@pytest.fixture(scope="module")
def worn(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that one test spoils again and again."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("worn") / whole.name))


def named(path: Path, error: ValueError) -> bool:
    return str(path) in str(error) and "\n" not in str(error)


def test_the_metadata_that_torch_writes_is_read_as_pickle_reads_it(whole: Path) -> None:
    data = (whole / METADATA).read_bytes()
    ours, pickles = read_pickle(data), pickle.loads(data)
    assert isinstance(ours, Metadata)
    assert (ours.state_dict_metadata, ours.storage_data) == (pickles.state_dict_metadata, pickles.storage_data)
    for protocol in (4, 5):
        assert read_pickle(pickle.dumps(pickles, protocol)).storage_data == pickles.storage_data


@pytest.mark.parametrize(
    "call",
    [
        Calls(__import__("os").system, "touch HARM"),
        Calls(eval, "open('HARM', 'w')"),
        Calls(exec, "open('HARM', 'w')"),
        Calls(open, "HARM", "w"),
        Calls(__import__("subprocess").call, ["touch", "HARM"]),
        Calls(torch.save, 1, "HARM"),
        Calls(torch.load, "HARM"),
        Calls(torch.empty, 2**40),
        Calls(getattr, torch.Size, "__class__"),
        Calls(torch.hub.load, "a/b", "c"),
        Calls(Path.touch, Path("HARM")),
        Calls(MetadataIndex, "a", (1,), 0),
        Calls(torch.Size, ([[1]],)),
        Calls(bytearray, 2**40),
    ],
    ids=lambda call: getattr(call._call[0], "__name__", "call"),
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_planted_call_is_not_made(path: Path, monkeypatch: pytest.MonkeyPatch, call: Calls, protocol: int) -> None:
    monkeypatch.chdir(path.parent)
    (path / METADATA).write_bytes(pickle.dumps(call, protocol))
    sign(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path / METADATA))} is damaged: "):
        read_tensors(path)
    assert not list(path.parent.glob("**/HARM"))


def test_a_module_that_is_named_is_not_imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / "harmful.py").write_text("open('HARM', 'w').close()\nclass Metadata: pass\n")
    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(path.parent)
    for module in ("harmful", "torch.harmful", "harmful.torch"):
        name = module.encode()
        (path / METADATA).write_bytes(b"\x80\x04\x8c" + bytes([len(name)]) + name + b"\x8c\x08Metadata\x93)\x81.")
        sign(path)
        with pytest.raises(ValueError, match=rf"{module}\.Metadata has no place in the metadata of a checkpoint"):
            read_metadata(path)
    assert not list(path.parent.glob("**/HARM"))


@pytest.mark.parametrize("spoil", [b"chunkz", b"sizez", b"propertiez"])
def test_an_entry_that_lacks_a_part_is_named(path: Path, spoil: bytes) -> None:
    data, good = (path / METADATA).read_bytes(), spoil[:-1] + b"s"
    assert good in data
    (path / METADATA).write_bytes(data.replace(good, spoil))
    sign(path)
    with pytest.raises(ValueError, match=r"\.metadata is damaged: "):
        read_tensors(path)


def test_a_planted_state_changes_no_class(path: Path) -> None:
    changed = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93N}\x8c\x07planted\x8c\x01xs\x86b."
    (path / METADATA).write_bytes(changed)
    sign(path)
    with pytest.raises(ValueError, match="the state of type is set"):
        read_metadata(path)
    assert not hasattr(Metadata, "planted")


@pytest.mark.full
def test_bombs_end_neither_the_interpreter_nor_the_memory(tmp_path: Path, whole: Path) -> None:
    for name, data in BOMBS.items():
        there = Path(shutil.copytree(whole, tmp_path / name))
        (there / METADATA).write_bytes(data)
        sign(there)
    code = """
from pathlib import Path
from megalina.checkpoint.stored import read_metadata
limit(400)
for path in sorted(Path(sys.argv[1]).iterdir()):
    attempt(path.name, lambda: read_metadata(path))
"""
    found = outcomes(code, str(tmp_path))
    assert set(found) == set(BOMBS)
    for name, (kind, message) in found.items():
        assert kind == "ValueError" and f"/{name}/.metadata is damaged: " in message, (name, kind, message)


def same_or_named(path: Path, whole: Path, name: str, content: bytes) -> None:
    """`path` is a copy of `whole`, in which one file is now `content`."""
    shutil.copytree(whole, path, dirs_exist_ok=True)
    (path / name).write_bytes(content)
    sign(path)
    try:
        tensors = read_tensors(path)
        read_values(path)
    except ValueError as error:
        assert named(path, error), error
    else:
        assert all(tensor.shape == STATE[name].shape for name, tensor in tensors.items() if name in STATE)


@given(EDITS, st.integers(0, 60))
def test_spoiled_metadata_is_refused_or_readable(worn: Path, whole: Path, edits: list[tuple[int, int]], cut: int) -> None:
    same_or_named(worn, whole, METADATA, spoiled((whole / METADATA).read_bytes(), edits, cut))


@given(EDITS, st.integers(0, 60))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_spoiled_tensor_file_is_refused_or_readable(worn: Path, whole: Path, edits: list[tuple[int, int]], cut: int) -> None:
    same_or_named(worn, whole, "__0_0.distcp", spoiled((whole / "__0_0.distcp").read_bytes(), edits, cut))


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from([2**62, "", "float32", "Tensor", "../x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["values", "tensors", "shape", "dtype", "model/a"]), inner)
    ),
    max_leaves=8,
)


@given(st.one_of(st.binary(max_size=30), ODD.map(lambda value: json.dumps(value).encode()), ODD))
def test_a_description_may_be_anything(worn: Path, whole: Path, content: Any) -> None:
    if not isinstance(content, bytes):  # of one tensor alone
        description = json.loads((whole / VALUES).read_text())
        description["tensors"]["model/a"] = content
        content = json.dumps(description).encode()
    same_or_named(worn, whole, VALUES, content)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"values": {}, "tensors": ' + b'{"a":' * 50_000, b"9" * 5000])
def test_a_description_that_nests_too_deep_is_damaged(path: Path, content: bytes) -> None:
    (path / VALUES).write_bytes(content)
    sign(path)
    with pytest.raises(ValueError, match=r"values\.json is damaged"):
        read_values(path)


def test_a_tensor_of_2_to_the_62_elements_takes_no_memory(path: Path) -> None:
    description = json.loads((path / VALUES).read_text())
    metadata = pickle.loads((path / METADATA).read_bytes())
    description["tensors"]["model/a"]["shape"] = [2**31, 2**31, 1]
    metadata.state_dict_metadata["model/a"].size = torch.Size([2**31, 2**31, 1])
    (path / VALUES).write_text(json.dumps(description))
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    sign(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_tensors(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "sub/file", "..", ""])
def test_a_path_does_not_leave_the_folder(path: Path, name: str) -> None:
    (path.parent / "outside").write_bytes((path / "__0_0.distcp").read_bytes())
    metadata = pickle.loads((path / METADATA).read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    sign(path)
    with pytest.raises(ValueError, match=r"\.metadata names the file .* which is not in the checkpoint's own folder"):
        read_tensors(path)
