"""What a step hides: shares of a made-up step by hand; strategies differ by them as their papers say."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.search_lists import main
from megalina.step.strategy import training_step
from megalina.timeline.hidden import Hidden, hidden
from megalina.timeline.recorder import COMPUTE, SEND, Event
from tools.draw_strategies import ladder_job


def event(kind: str, phase: str, start_s: float, end_s: float, op: str = "") -> Event:
    return Event(kind, "", phase, "", 0, "", op, "ep" if op == "tokens" else "dp", 8, start_s, start_s, end_s)


def test_shares_are_those_of_a_step_by_hand() -> None:
    events = [
        event(COMPUTE, "F", 0, 2),
        event(SEND, "F", 1, 5, "tokens"),  # one second of four under compute
        event(SEND, "F", 0, 1, "params"),
        event(COMPUTE, "B", 5, 6),
        event(SEND, "B", 6, 10, "tokens"),
        event(COMPUTE, "W", 8, 12),  # two seconds of four under tokens, which are two of tokens' four
        event(SEND, "B", 9, 10, "grads"),
        event(SEND, "B", 11, 13, "grads"),
    ]
    assert hidden(events) == Hidden(1 / 4, 2 / 4, 2 / 4, 1 / 4, 2 / 4, 1 / 4)
    assert hidden(events[:1]) == Hidden(0, 0, 0, 0, 0, 0)
    assert hidden(events).distance(hidden(events)) == 0 < hidden(events).distance(hidden(events[:1])) < 1


def shares_of(strategy: str, *more: str) -> Hidden:
    job = ladder_job(f"strategy={strategy}", *more, "model.num_layers=4")
    return hidden(job.step(training_step(strategy, job.setting)).events(0))


def test_strategies_hide_what_their_papers_say() -> None:
    eager, serial, flow, lancet = (shares_of(name) for name in ("eager", "serial", "flow", "lancet"))
    ahead = shares_of("lina_zero", "parallel.zero=1")
    assert (eager.tokens_forward, eager.tokens_backward, serial.gradients_in_tail) == (0, 0, 1)
    assert serial.gradients_beside_tokens == 0 < eager.gradients_beside_tokens
    assert flow.tokens_forward > 0.5 < flow.tokens_backward
    assert lancet.tokens_forward == 0 and lancet.weights_under_tokens > 0.5 and flow.weights_under_tokens == 0
    assert ahead.gradients_in_forward > 0 == flow.gradients_in_forward


@pytest.mark.full
def test_a_search_is_compared_with_every_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    assert main(["--random", "1", "--evaluations", "300", "--json", str(tmp_path / "found.json")]) in (0, 1)  # few walks
    table = capsys.readouterr().out
    assert "| 500 Mbit/s, heavy | " in table and "resembles" in table and "tokens under compute" in table
    assert (tmp_path / "found.json").read_text().count('"weights_under_tokens"') == 4
