"""A damaged YAML file is named."""

from pathlib import Path

import pytest

from megalina.track.metrics import read_yaml


@pytest.mark.parametrize("text", [b"a: [1, 2", b"\xff\xfe\x00", b"a: b: c"])
def test_a_damaged_file_is_a_value_error_with_its_name(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        read_yaml(path)


def test_a_whole_file_gives_its_values(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 3}\n")
    assert read_yaml(path) == {"train": {"steps": 3}}
