"""Two checkouts in turns: what is compared, and how the table reads."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import host_time
from benchmarks.host_time import GROUPS, ROOT, Found, per_instruction, table


def of_list(instructions: int, us: float) -> dict[str, Any]:
    """`us` per instruction in each group, as much between instructions."""
    seconds = us * instructions / 1e6
    return {"instructions": instructions, "cpu_s": dict.fromkeys(GROUPS, seconds), "thread_s": seconds * (len(GROUPS) + 1)}


def test_groups_and_what_lies_between_add_up_to_the_whole() -> None:
    found = per_instruction(of_list(50, 10.0))
    assert found == pytest.approx(dict.fromkeys((*GROUPS, "between"), 10.0) | {"all": 60.0})


def test_the_ratio_is_of_pairs_and_lists_that_compute_are_left_out() -> None:
    rounds = [
        ({"eager, tiny": of_list(50, 10.0), "eager": of_list(50, 99.0)}, {"eager, tiny": of_list(50, now)})
        for now in (5.0, 8.0, 9.0)
    ]
    assert table(rounds).splitlines()[2:] == [
        "| eager | 50 | 10 > 8 | 10 > 8 | 10 > 8 | 10 > 8 | 10 > 8 | 10 > 8 | 60 > 48 | 0.80 (0.50 to 0.90) |"
    ]


def test_checkouts_take_turns_and_the_earlier_one_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bool] = []

    def measured(where: Path, *, ranks: int, steps: int) -> Found:
        assert (where / "tools" / "measure_cluster.py").is_file() and (ranks, steps) == (2, 7)
        seen.append(where == ROOT)
        return {"eager, tiny": of_list(10, 4.0 if where == ROOT else 8.0)}

    monkeypatch.setattr(host_time, "measured", measured)
    assert host_time.main(["--before", "HEAD", "--rounds", "2", "--steps", "7"]) == 0
    assert seen == [False, True, True, False]
    assert "| eager | 10 |" in capsys.readouterr().out
    assert host_time.main(["--before", "no-such-commit"]) == 2 and "no commit no-such-commit" in capsys.readouterr().err
