"""Accuracy of strategies: what a row says of made-up curves, when the benchmark fails, and the benchmark itself, tiny."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.strategy_accuracy import (
    BAD_INPUT,
    EAGER,
    YARDSTICK,
    cases_of,
    float64_table,
    main,
    packing_path,
    problems,
    rows_of,
    table,
)
from tests.train.small_run import write_tokens

TINY = (
    *("model=tiny", "model.num_layers=1", "data=indexed", "data.split='80,20'"),
    *("train.seq_len=16", "train.micro_batch_size=2", "schedule.warmup_steps=2"),
)


def curve(*losses: float, weights: str = "a", skipped: int = 0) -> dict[str, Any]:
    return {"losses": list(losses), "weights": [weights], "skipped": skipped, "packings": [1] * len(losses)}


def test_a_row_is_of_all_seeds() -> None:
    found = [
        {EAGER: curve(4.0, 3.0), "flow": curve(4.0, 3.0)},
        {EAGER: curve(5.0, 2.0), "flow": curve(5.5, 1.9)},
    ]
    eager, flow = rows_of(found)
    assert (eager["largest_nats"], eager["bit_equal"], eager["seeds"]) == (0, 2, 2)
    assert flow["final_losses"] == [3.0, 1.9] and flow["bit_equal"] == 1
    assert flow["largest_nats"] == 0.5
    assert flow["largest_relative"] == pytest.approx(0.1)
    assert flow["late_nats"] == pytest.approx(-0.05)  # of the last halves: 0 and -0.1
    text = table([eager, flow])
    assert "| flow | 3.0000, 1.9000 | 0 | 5.0e-01 | -5.0e-02 | 1 of 2 seeds |" in text
    assert "eager's last losses are 1.0e+00 nats apart" in text


@pytest.mark.parametrize(("second", "third", "together"), [(0.0, 0.9e-3, 3), (0.0, 1.1e-3, 2), (-1.1e-3, 0.0, 1)])
def test_curves_have_parted_at_the_first_step_that_is_off(second: float, third: float, together: int) -> None:
    found = [{EAGER: curve(4.0, 3.0, 2.0), "flow": curve(4.0, 3.0 + second, 2.0 + third)}]
    assert [row["together"] for row in rows_of(found)] == [3, together]


def test_equal_losses_with_other_weights_are_not_bit_equal() -> None:
    (_, flow) = rows = rows_of([{EAGER: curve(4.0, 3.0), "flow": curve(4.0, 3.0, weights="b")}])
    assert flow["bit_equal"] == 0
    assert "| flow | 3.000000000000 | 0.0e+00 | no |" in float64_table(rows)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (curve(4.0, 3.0 + 2e-10), None),
        (curve(4.0, 3.0 + 4e-10), "flow: a loss differs from eager's by 1.3e-10 of it, at most 1e-10 is allowed"),
        (curve(4.0, math.nan), "flow: the loss is not finite"),
        (curve(4.0, 3.0, skipped=1), "flow: 1 of 2 steps were skipped"),
    ],
)
def test_what_is_wrong_is_named(other: dict[str, Any], said: str | None) -> None:
    assert problems([{EAGER: curve(4.0, 3.0), "flow": other}], limit=1e-10) == ([said] if said else [])


@pytest.mark.parametrize(("ep", "path"), [(1, ()), (2, (2, 1)), (3, ()), (4, (2, 4, 2, 1)), (6, (2, 1))])
def test_packing_goes_up_and_comes_back(ep: int, path: tuple[int, ...]) -> None:
    assert packing_path(ep) == path
    for steps in (8, 10, 100):
        cases = cases_of(["eager", "flow", "lina_zero", "serial", "auto"], ep=ep, steps=steps, micro_batch_size=4)
        packed = [case for case in cases if case.switches]
        assert [case.name.split(",")[0] for case in packed] == (["flow", "lina_zero"] if path else [])
        for case in packed:
            assert tuple(case.switches.values()) == path and all(0 < step < steps for step in case.switches)
    assert [case.name for case in cases[:2]] == [EAGER, YARDSTICK]
    assert {case.name for case in cases if "parallel.zero=1" in case.overrides} == {c.name for c in cases if "zero" in c.name}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--steps 2 --ranks 4", "--steps 2: 4 changes of the packing need at least 8 steps"),
        ("--strategies flwo", "strategy=flwo: there is no such file in conf/strategy (did you mean flow?)"),
        ("--ranks 3 --strategies flow", "parallel.ep (3) must divide model.num_experts (8)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    assert main(arguments.split()) == BAD_INPUT
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{said}\n") or (out == "" and said in err and err.count("\n") == 1)


@pytest.mark.full
def test_a_tiny_benchmark_from_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks: float32, where gradients sent later are the same bits, and packing goes up and comes back."""
    write_tokens(tmp_path / "tokens")
    data = [f"data.prefix={tmp_path / 'tokens'}", f"data.cache_dir={tmp_path / 'cache'}"]
    arguments = ["--steps", "5", "--seeds", "1", "--strategies", "serial,lina,auto", "--json", str(tmp_path / "found")]
    assert main([*arguments, *TINY, *data]) == 0
    out, err = capfd.readouterr()
    names = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:]
    assert names == [EAGER, YARDSTICK, "serial", "lina", "lina, packing 1-2-1", "auto"]
    found = json.loads((tmp_path / "found").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["serial"]["bit_equal"] == 1
    assert max(row["largest_nats"] for row in rows.values()) < 1e-4
    (seed,) = found["seeds"]
    assert seed["lina, packing 1-2-1"]["packings"] == [1, 1, 2, 1, 1]
    for of_case in seed.values():
        assert len(set(of_case["losses"])) == 5  # it learns
        assert len(of_case["weights"]) == 2 and of_case["weights"][0] != of_case["weights"][1]  # experts are cut
    assert "2 gloo ranks, 5 steps" in out and not err
