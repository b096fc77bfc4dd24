"""tools/reproduce_lina.py: bad input stops at once; the whole table, with JSON and picture."""

import json
import math
import re
from pathlib import Path

import pytest

from tools import reproduce_lina

ROOT = Path(__file__).resolve().parent.parent


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (["--json", str(tmp_path / "none" / "a.json")], "there is no folder"),
        (["--picture", str(tmp_path / "none" / "a.png")], "there is no folder"),
        (["--traces", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")], "a.npz"),
    ):
        assert reproduce_lina.main(arguments) == reproduce_lina.BAD_INPUT
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_a_file_that_is_no_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no trace")
    assert reproduce_lina.main(["--traces", str(bad), str(bad)]) == reproduce_lina.BAD_INPUT
    assert "bad.npz" in capsys.readouterr().err


def test_help_shows_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce_lina.main(["--help"])
    assert "python tools/reproduce_lina.py --json" in capsys.readouterr().out


@pytest.mark.full
def test_the_whole_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce_lina.main(["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]) == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    rows = {row["id"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) > 140 and all(id in text for id in rows)
    fitted = [r for r in found["rows"] if r["fitted"] and r["id"].startswith(("Tab1", "Fig2", "Fig3", "Fig8b"))]
    assert len(fitted) == 15
    assert found["mean_absolute_residual"]["fitted"] < 0.1 < found["mean_absolute_residual"]["held_out"]
    for row in found["rows"]:
        number = isinstance(row["paper"], int | float) and row["simulated"] is not None
        assert number == (row["residual"] is not None)
        if number:
            assert math.isclose(row["residual"], row["simulated"] / row["paper"] - 1)
    assert (tmp_path / "a.png").stat().st_size > 50_000
    made = (ROOT / "docs" / "reproduction.md").read_text().split("\n## Made routing or real")[0]
    blocks = [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", made, re.DOTALL | re.MULTILINE) if not kind]
    printed = {line.rstrip() for line in text.splitlines()}
    assert [line for block in blocks for line in block.splitlines() if line.rstrip() not in printed] == []
