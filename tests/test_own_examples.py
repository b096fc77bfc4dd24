"""A block, a router, a loss, an optimizer of one's own, each in one file: what running it proves; mistakes in it are found."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.parameter import Parameter
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.reference import load
from megalina.train.optim import Group
from megalina.verify.proof import NotProven, prove

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
LINES = {"own_layer": 75, "own_router": 50, "own_optimizer": 50}


def _checked(printed: str) -> dict[str, Any]:
    """What the last line of a file that was run says."""
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert len(found["layouts"]["rows"]) == 5 and found["layouts"]["largest_error"] < 1e-11
    assert found["checkpoint"]["largest_error"] < 1e-11
    return found


@pytest.mark.parametrize("name", LINES)
def test_one_short_file(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= LINES[name]


@pytest.mark.full
@pytest.mark.parametrize("name", LINES)
def test_each_runs_as_a_program(name: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    _checked(ran.stdout)


@pytest.mark.full
def test_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_layer.py"), run_name="__main__")
    found = _checked(capsys.readouterr().out)
    assert found["flops"]["gate F:gate"][0] == found["flops"]["gate F:gate"][1] > 0
    assert found["added"]["state_bytes"] > 0


@pytest.mark.full
def test_a_router_and_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_router.py"), run_name="__main__")
    found = _checked(capsys.readouterr().out)
    assert "entropy_loss" in found["checkpoint"]["reported"]
    declared, counted = found["kept_bytes"]["moe F:route"]
    assert declared == pytest.approx(counted, rel=0.1)


@pytest.mark.full
def test_an_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps one number of each parameter, AdamW two."""
    runpy.run_path(str(EXAMPLES / "own_optimizer.py"), run_name="__main__")
    found = _checked(capsys.readouterr().out)
    assert -found["added"]["state_bytes"] > 4 * found["parameters"]


@pytest.mark.full
def test_a_rule_that_mixes_elements_of_a_slice_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = load(f"{EXAMPLES}/own_optimizer.py:LionRule")
    true = rule.update

    def by_slice(self: Any, group: Group, lr: float, divisor: Tensor | None) -> None:
        for t in group.tensors:
            t.grad.sub_(t.grad.mean())  # of the slice that it has
        true(self, group, lr, divisor)

    monkeypatch.setattr(rule, "update", by_slice)
    with pytest.raises(NotProven):
        prove(compose(["model=tiny", f"optim.name={EXAMPLES}/own_optimizer.py:Lion"]))


@pytest.fixture
def gated() -> PretrainConfig:
    return compose(["model=tiny", f'model.layer=[attention,"{EXAMPLES}/own_layer.py:Gate",ffn]'])


@pytest.mark.full
def test_a_function_that_mixes_tokens_of_ranks_differs(gated: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = load(f"{EXAMPLES}/own_layer.py:GateFunctions")
    monkeypatch.setattr(functions, "gate", _centred)
    with pytest.raises(NotProven, match="tp 2"):
        prove(gated)


def _centred(functions: Any, x_TD: Tensor, batch: Batch) -> Tensor:
    """By the mean over the tokens here, of which there are fewer with sequence parallelism."""
    return x_TD + (x_TD - x_TD.mean(0)) @ functions.weight("gate.weight") @ functions.weight("gate.out")


def test_a_parameter_declared_twice_is_named(gated: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = load(f"{EXAMPLES}/own_layer.py:Gate")
    true = gate.parameters

    def twice(block: Any) -> list[Parameter]:
        return [*true(block), true(block)[-1]]

    monkeypatch.setattr(gate, "parameters", twice)
    with pytest.raises(AssertionError, match="gate.out is declared twice"):
        prove(gated)
