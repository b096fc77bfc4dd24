"""What timing costs: the numbers worked out by hand."""

import sys

import pytest

from benchmarks.timeline_overhead import main, results


def test_the_ratio_is_of_pairs_and_what_is_spent_a_share_of_the_step() -> None:
    measured = {
        "off": [1.0, 2.0, 4.0],
        "on": [1.1, 2.0, 4.8],
        "after": [0.01, 0.03, 0.02],
        "step_cpu": [0.8, 0.5, 0.4],
        "after_cpu": [0.002, 0.004, 0.003],
        "recording_s": 0.001,
        "events": 100.0,
    }
    found = results(measured)
    assert (found["step_off_s"], found["step_on_s"], found["events_a_step"]) == (2, 2, 100)
    assert found["ratio"] == pytest.approx(1.1)  # of 1.1, 1.0 and 1.2
    assert found["ratio_quartiles"] == pytest.approx([1.0, 1.2])
    assert found["spent"] == pytest.approx((0.02 + 0.001) / 2)
    assert found["cpu_spent"] == pytest.approx((0.003 + 0.001) / 0.5)


def test_no_pairs_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["timeline_overhead.py", "--pairs", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--pairs 0 must be at least 1" in capsys.readouterr().err
