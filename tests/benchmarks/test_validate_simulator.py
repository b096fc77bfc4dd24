"""The validation: its split is fixed, it finds constants that made a measurement, its errors are right, bad files are named."""

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalina.parallel.plan_file import setting_of
from megalina.step.candidates import EAGER, FLOW, LANCET, LINA, PIECE_BYTES
from megalina.step.order import order_of
from megalina.step.plan import Plan
from megalina.step.program import Op
from megalina.step.strategy import training_step

ROOT = Path(__file__).resolve().parents[2]
OWN = ("cases", "explained", "fit", "report")


@pytest.fixture(scope="module")
def bench() -> Any:
    found = {name: importlib.import_module(f"benchmarks.validation.{name}") for name in OWN}
    return SimpleNamespace(main=importlib.import_module("benchmarks.validate_simulator"), **found)


def measured(step_s: float, plan: Plan = EAGER, a2a_s: float = 0.0, grads_s: float = 0.0) -> dict[str, Any]:
    return {"median_step_s": step_s, "a2a_exposed_s": a2a_s, "grads_exposed_s": grads_s, "plan_values": plan.as_json()}


def ordered(bench: Any, plan: Plan) -> Plan:
    """The plan with the order of another one of its numbers: all gradients at the end."""
    config = bench.main.job_of_case(bench.cases.CASES[2], {"flow": ("strategy=flow",)}).configs["flow"]
    setting = setting_of(config, 4, 320).under(plan)
    program = training_step("flow", setting)
    last = max(i for i, s in enumerate(program) if s.phase == "B")
    late = [s for s in program[: last + 1] if s.op is Op.GRADS]
    return replace(plan, order=order_of((*(s for s in program[: last + 1] if s not in late), *late, *program[last + 1 :])))


def test_who_is_held_out_is_fixed_and_enough(bench: Any) -> None:
    names = [f"{case.setting.name} {s}" for case in bench.cases.CASES for s in (*bench.cases.VARIANTS, "eager whole")]
    assert len(set(names)) == len(names) >= 24
    held_out = [bench.cases.is_held_out(name) for name in names]
    assert 0.4 * len(names) < sum(held_out) < 0.8 * len(names)
    assert bench.cases.is_held_out("4x1 light 500 lina") and not bench.cases.is_held_out("4x1 light 500 flow")


def test_errors_are_those_of_a_table_by_hand(bench: Any) -> None:
    case = bench.cases.CASES[0]
    steps_s = {"a": (1.0, 1.1), "b": (2.0, 2.0), "c": (2.02, 1.9), "d": (4.0, 1.0)}  # measured, simulated
    rows = [bench.cases.Row(case, name, measured(m, grads_s=0.5), EAGER) for name, (m, _) in steps_s.items()]
    found = {r.name: bench.fit.Simulated(steps_s[r.strategy][1], {"a2a": 1.0, "grads": 0.4}) for r in rows}
    e = bench.fit.errors(rows, found)
    assert e["median_error"] == pytest.approx((0.1 + 0.12 / 2.02) / 2) and e["p90_error"] == pytest.approx(0.75)
    assert e["pairs"] == 5 and e["pair_order"] == pytest.approx(2 / 5)  # b and c are too close to count; d is wrong thrice
    assert e["exposed_error"] == {"a2a": None, "grads": pytest.approx(0.2)}


@pytest.mark.full
def test_the_fit_finds_what_made_the_measurement(bench: Any) -> None:
    """Steps that the simulator itself made, with other constants than those that the fit begins with."""
    case = bench.cases.CASES[0]
    truth = replace(bench.fit.BEGIN, link_efficiency=0.8, all_to_all_s=4e-3, sum_weight=3.0, stage_s=3e-4)
    plans = {"eager whole": EAGER, "serial": Plan("serial"), "flow": FLOW}
    rows = [bench.cases.Row(case, name, measured(1.0), plan) for name, plan in plans.items()]
    configs = bench.main.configs_of(rows)
    made = []
    for row in rows:
        own = bench.fit.simulated(row, configs[row.name], truth)
        made.append(replace(row, measured=measured(own.step_s, a2a_s=own.exposed_s["a2a"], grads_s=own.exposed_s["grads"])))
    host = bench.fit.fit(made, configs)
    e = bench.fit.errors(made, {r.name: bench.fit.simulated(r, configs[r.name], host) for r in made})
    assert e["p90_error"] < 0.01 and e["pair_order"] == 1.0
    begun = bench.fit.errors(made, {r.name: bench.fit.simulated(r, configs[r.name], bench.fit.BEGIN) for r in made})
    assert begun["p90_error"] > 0.03
    assert host.sum_weight == pytest.approx(3.0, rel=0.25)


def test_the_plain_baseline_is_no_variant_of_eager(bench: Any) -> None:
    case = next(case for case in bench.cases.OF_LADDER if case.setting.name == "4x2 light")
    rows = [bench.cases.Row(case, name, measured(1.0), EAGER) for name in ("eager whole", "eager_plain")]
    configs = bench.main.configs_of(rows)
    assert [configs[row.name].parallel.reduce for row in rows] == ["auto", "flat"]


@pytest.mark.full
def test_a_measured_file_is_read_reported_and_drawn(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eager, placed = replace(EAGER, piece_bytes=PIECE_BYTES), replace(LANCET, times_us=(("B:experts", 9000.0),), measured_at=5)
    plans = {"eager 512 KiB": eager, "eager": eager, "serial": Plan("serial"), "flow": FLOW, "lancet": placed}
    plans |= {"auto": replace(LINA, packing=2), "search": ordered(bench, FLOW)}
    strategies = {name: measured(0.9 + 0.01 * i, plan, 0.3, 0.05) for i, (name, plan) in enumerate(plans.items())}
    late = {"name": "4x1 short 500", "valid": False, "strategies": strategies}
    result = {"settings": [{"name": "4x1 light 250", "valid": True, "strategies": strategies}, late]}
    (tmp_path / "in.json").write_text(json.dumps(result))
    picture, out = tmp_path / "out.png", tmp_path / "out.json"
    assert bench.main.main(["--measured", str(tmp_path / "in.json"), "--json", str(out), "--plot", str(picture)]) == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert set(found["simulated"]) == {f"4x1 light 250 {name}" for name in plans if name != "eager"}
    step_s = {name.removeprefix("4x1 light 250 "): own["step_s"] for name, own in found["simulated"].items()}
    assert step_s["search"] > step_s["flow"]  # of the very list, whose order is a bad one
    assert {"median_error", "p90_error", "pair_order", "ratio_error"} <= set(found["heldout"])
    assert found["host"].keys() == asdict(bench.fit.BEGIN).keys()
    assert picture.stat().st_size > 10_000 and "| 4x1 light 250 flow |" in printed and "held" in printed
    assert "the 3 flows of an all-to-all get" in printed and "links that let tokens pass" in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "has no settings"),
        ('{"settings": []}', "0 configurations to fit"),
        ('{"settings": [{"name": "4x1 light", "valid": true, "strategies": {"flow": {}}}]}', "4x1 light flow has no plan_values"),
        ('{"settings": [{"name": "9x9", "valid": true, "strategies": {}}]}', "setting 9x9 isn't one of"),
    ],
)
def test_bad_files_are_named(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    (tmp_path / "in.json").write_text(text)
    assert bench.main.main(["--measured", str(tmp_path / "in.json")]) == 2
    assert words in capsys.readouterr().err
