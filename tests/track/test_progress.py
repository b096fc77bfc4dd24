import io

import pytest

from megalina.track.progress import LINE_EVERY_S, Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(kind, *, stream, steps=100, start=0, step_s=1.0):
    clock = Clock()
    with Progress(steps, start, kind, stream=stream, clock=clock) as progress:
        for step in range(start + 1, steps + 1):
            clock.now += step_s
            progress.update({"step": step, "loss": 5.0 - step / 100, "val_loss": None, "grad_norm": 0.5, "tokens_per_s": 9000.0})
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["plain", "auto"])
def test_without_a_terminal_there_is_a_line_at_the_first_and_last_step_and_every_ten_seconds(kind):
    lines = run(kind, stream=io.StringIO()).splitlines()
    expected = [*range(1, 101, round(LINE_EVERY_S)), 100]
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == expected


def test_a_line_tells_loss_pace_and_time_to_go():
    first = run("plain", stream=io.StringIO(), step_s=2.0).splitlines()[0]
    assert first == "step   1/100  loss 4.9900  norm 0.50  9,000 tokens/s  3 min 18 s left"


def test_a_run_that_continues_reckons_with_its_own_pace_only():
    line = run("plain", stream=io.StringIO(), start=90, step_s=2.0).splitlines()[0]
    assert line.endswith("18 s left")  # 9 steps of 2 s; the 90 before this process took no time of it


def test_the_newest_validation_loss_stays_on_the_line():
    progress = Progress(10, 0, "none")
    progress.update({"step": 1, "val_loss": 4.25})
    assert "val 4.2500" in progress.numbers({"step": 2, "loss": None, "grad_norm": float("nan")})
    assert "loss -" in progress.numbers({"step": 2, "loss": None, "grad_norm": float("nan")})


def test_the_newest_scores_on_tasks_stay_on_the_line():
    progress = Progress(100, 0, "none")
    scores = {"eval/a/centred_accuracy": 0.25, "eval/a/bits_per_byte": 1.0, "eval/b/centred_accuracy": -0.05}
    line = progress.numbers({"step": 1, "loss": 3.0, "grad_norm": 1.0})
    assert "tasks" not in line
    progress.update({"step": 1, **scores, "eval/b/bits_per_byte": 2.0, "eval/seconds": 9.0})
    progress.update({"step": 2})
    assert "tasks 0.10 (1.50 bits/byte)" in progress.numbers({"step": 3, "loss": 3.0, "grad_norm": 1.0})


def test_what_the_device_waited_for_is_told_where_it_is_measured():
    progress = Progress(10, 0, "none")
    record = {"step": 1, "a2a_exposed_s": 0.1861, "grads_exposed_s": 0.0453, "a2a_slowdown": 1.83}
    assert "waits 186 ms for all-to-alls (slowed 1.8x), 45 ms for gradients  " in progress.numbers(record)
    alone = progress.numbers(record | {"a2a_slowdown": None})  # one rank: nothing to compare with
    assert "waits 186 ms for all-to-alls, 45 ms for gradients" in alone
    assert "45 ms for gradients, 7 ms for other stages" in progress.numbers(record | {"pp_exposed_s": 0.007})
    assert "waits" not in progress.numbers({"step": 1, "a2a_slowdown": 1.83})


def test_on_a_terminal_there_is_a_bar_with_the_numbers(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    shown = run("auto", stream=Terminal())
    assert "100/100" in shown and "loss 4.0000" in shown and "9,000 tokens/s" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor comes back


def test_none_shows_nothing():
    assert run("none", stream=Terminal()) == ""


def test_nothing_goes_to_stdout(capsys):
    for kind in ("plain", "auto", "none"):
        with Progress(1, 0, kind) as progress:
            progress.update({"step": 1, "loss": 1.0})
    assert capsys.readouterr().out == ""


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'fancy'"):
        Progress(1, 0, "fancy")


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
