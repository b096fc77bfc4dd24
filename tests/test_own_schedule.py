"""The example of docs/strategies.md does what it says: fewer milliseconds in virtual time, the same losses on ranks."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from megalina.compose import compose
from megalina.parallel.plan_file import check_order
from megalina.parallel.plan_file import setting_of as setting_of_run
from megalina.reference import load
from megalina.step.program import Kind
from megalina.step.strategy import training_step
from megalina.validate import check_config
from tests.perfmodel.sim.schedules import SHAPES, setting_of

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "own_schedule.py"
LINES = 50


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_schedule", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_the_document_ends_with_it() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= LINES
    how_to = (ROOT / "docs" / "strategies.md").read_text().split("\n## Write your own schedule\n")[1]
    assert "(examples/own_schedule.py)" in how_to


@pytest.mark.full
def test_run_as_a_program_it_saves_time_and_changes_no_loss() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLE]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    step_ms = {name: int(ms) for name, ms in re.findall(r"^(\w+): (\d+) ms a step in virtual time$", ran.stdout, re.M)}
    losses = {
        (rank, name): [float(loss) for loss in found.split(", ")]
        for rank, name, found in re.findall(r"rank (\d), (\w+): losses \[([^\]]*)\]", ran.stdout)
    }
    assert step_ms.keys() == {"eager", "weights_under_tokens"} and len(losses) == 4, ran.stdout
    assert step_ms["weights_under_tokens"] < 0.95 * step_ms["eager"]
    for rank in "01":
        eager, own = losses[rank, "eager"], losses[rank, "weights_under_tokens"]
        assert eager[0] > eager[-1]  # it trains
        assert own == pytest.approx(eager, rel=1e-12, abs=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_every_model_weights_get_their_gradients_while_tokens_are_on_the_wire(example: ModuleType, shape: str) -> None:
    """The checker is called inside; ValueError would end the test."""
    for seed in range(5):
        setting = setting_of("eager", SHAPES[shape], Random(seed))
        program = example.weights_under_tokens(setting)
        late = [(before, s) for before, s in zip(program, program[1:]) if s.phase == "W"]
        assert len(late) == sum(SHAPES[shape].moe) * setting.micro_batches
        for before, s in late:
            assert (before.kind, before.tag) == (Kind.START, f"B:dispatch>.{s.layer}.{s.part}")


def test_a_file_with_a_schedule_is_a_strategy(tmp_path: Path) -> None:
    name = f"{EXAMPLE}:weights_under_tokens"
    config = compose(["model=tiny", f"strategy.name={name}", "strategy.partition_bytes=65536", "parallel.ep=2"])
    check_config(config, 2)
    check_order(config, 2, vocab_size=512)
    setting = setting_of_run(config, 2, 512)
    assert training_step(name, setting) == load(name)(setting)
    assert any(s.phase == "W" for s in training_step(name, setting))
    with pytest.raises(ValueError, match="makes a list that goes over all layers, and with parallel.pp=2"):
        check_config(compose(["model=tiny", f"strategy.name={name}", "parallel.pp=2"]), 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other(setting): ...", "has no mine"),
        ("mine = 3", "is int, no function from a Setting to a list of instructions"),
        (
            "from megalina.step.strategy import eager\ndef mine(setting): return eager(setting)[:-1]",
            "gives no list that can be run",
        ),
    ],
)
def test_a_schedule_that_cannot_be_run_is_refused_before_any_process_starts(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        config = compose(["model=tiny", f"strategy.name={file}:mine"])
        check_config(config, 1)
        check_order(config, 1, vocab_size=512)
    with pytest.raises(ValueError, match="there is no such file"):
        check_config(compose(["model=tiny", f"strategy.name={tmp_path}/nothing.py:mine"]), 1)
