"""The check of a GPU, as far as it runs on a CPU: its numbers are right, wrong ones are named, its page says what happened."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.gpu_check import numbers
from megalina.gpu_check.check import check, page, run
from megalina.gpu_check.found import FAILED, OK, SKIPPED, Found, held, table
from megalina.gpu_check.parts import PARTS, Part
from tools import gpu_check, gpu_kit


@pytest.mark.parametrize("name", ["experts", "optimizers", "models", pytest.param("collectives", marks=pytest.mark.full)])
def test_what_needs_no_gpu_is_right_on_a_cpu(name: str, tmp_path: Path) -> None:
    (part,) = [part for part in PARTS if part.name == name]
    assert part.look is not None
    found = part.look("cpu", tmp_path)
    assert (found.outcome, found.why) == (OK, "")
    assert found.lines


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true = numbers.expert_mlp

    def wrong(x: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        out = true(x, *others, **more)
        return out * (1.0 if x.dtype == torch.float64 else 1.001)

    monkeypatch.setattr(numbers, "expert_mlp", wrong)
    found = numbers.experts("cpu", tmp_path)
    assert found.outcome == FAILED
    assert "float32/gelu 0: off by 1.0e-03" in found.why and "float64" not in found.why


def test_errors_are_relative_and_nan_is_wrong() -> None:
    wanted = torch.tensor([1.0, -200.0])
    assert held("a", wanted + 0.02, wanted, 1e-3) == ("a", pytest.approx(1e-4, rel=1e-3), True)
    rows = [held("kind/a", wanted, wanted, 1e-6), held("kind/b", wanted * float("nan"), wanted, 1e-6)]
    assert (table(rows).outcome, table(rows[:1]).outcome) == (FAILED, OK)
    assert table(rows).why == "kind/b: off by nan"


def printing(name: str, text: str, **settings: Any) -> Part:
    return Part(name, "prints", 10, command=lambda device, folder: [sys.executable, "-c", text], **settings)


def test_the_page_has_all_parts_and_the_log_of_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        printing("good", "print('all is well')"),
        printing("bad", "raise SystemExit('no such kernel')"),
        printing("unread", "print(1)", read=lambda said, folder: Found(numbers={"x": json.loads("{")})),
        printing("gpu", "print(1)", gpu_only=True),
    ]
    assert check(parts, "cpu", tmp_path / "out", 60) == 1
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert {n: p["outcome"] for n, p in found["parts"].items()} == {"good": OK, "bad": FAILED, "unread": FAILED, "gpu": SKIPPED}
    assert found["machine"]["torch"] == torch.__version__
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "1 ok, 2 FAILED, 1 not run." in text and "all is well" in text and "no such kernel" in text
    assert "what it left can't be read: JSONDecodeError" in text and "it needs a GPU" in text
    assert "bad: prints ... FAILED: exit code 1" in capsys.readouterr().out


def test_a_part_that_takes_too_long_is_ended_and_what_comes_after_the_time_is_not_begun(tmp_path: Path) -> None:
    begin = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('begun', flush=True); time.sleep(60)"
    slow = printing("slow", begin)
    found = run(slow, "cpu", tmp_path, 1.0)
    assert (found.outcome, found.why) == (FAILED, "not done within 1 s")
    assert found.lines[-1] == "begun" and found.seconds < 5
    assert check([printing("late", "print(1)")], "cpu", tmp_path, 1.0) == 0
    assert "not run: the 1 s are over: --only late" in (tmp_path / "gpu_check.md").read_text()


def test_a_page_of_nothing_is_a_page() -> None:
    assert page({"Python": "3.12"}, []).startswith("# GPU check\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "experts,nothing"], "--only nothing: choose among doctor, experts"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(words)
    assert said in capsys.readouterr().err


def test_the_kit_has_what_is_needed_for_each_python_but_not_torch(tmp_path: Path) -> None:
    wheel, *downloads = gpu_kit.commands(tmp_path, ["3.11", "3.13"])
    assert gpu_kit.SOURCE_ALONE in wheel
    assert [words[words.index("--python-version") + 1] for words in downloads] == ["3.11", "3.13"]
    assert all("torch" not in word for words in downloads for word in words)
    assert f"{gpu_kit.SOURCE_ALONE}\n" in (gpu_kit.LOCK.read_text())


@pytest.mark.full
def test_all_that_can_run_on_a_cpu_does(tmp_path: Path) -> None:
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path / "out"), "--seconds", "900"]) == 0
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]
    assert {name for name, one in found.items() if one["outcome"] == SKIPPED} == {p.name for p in PARTS if p.gpu_only}
