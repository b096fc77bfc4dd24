import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megalina.track.metrics import MetricsFile, read_metrics
from megalina.track.tracker import Background, RunTracker
from tests.track.fake_run import config_of, records_of, start, write_run
from tests.track.wandb_history import read_history
from tools.rebuild_wandb import main as rebuild_wandb

ROOT = Path(__file__).parents[2]


class Fake:
    """A backend that remembers, and can be told to fail or to hang."""

    def __init__(self, *, fail_at=None, hang=None):
        self.fail_at, self.hang, self.calls = fail_at, hang, []

    def log(self, step, scalars):
        if self.hang is not None:
            self.hang.wait()
        if step == self.fail_at:
            raise ConnectionError("the server\nwent away")
        self.calls.append(("log", step))

    def images(self, step, pictures):
        self.calls.append(("images", step, {name: picture.shape for name, picture in pictures.items()}))

    def expert_load(self, history, layer_numbers, picture):
        self.calls.append(("expert_load", history.steps, layer_numbers, picture.dtype))

    def finish(self, *, failed):
        self.calls.append(("finish", failed))


def tracker_with(tmp_path, *backends, queue_size=4096, timeout_s=5.0, image_interval=0, total_steps=100):
    def opener(backend):
        return (lambda: backend) if isinstance(backend, Fake) else backend

    return RunTracker(
        MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0),
        [Background("Fake", opener(backend), queue_size=queue_size) for backend in backends],
        model={"num_layers": 2},
        total_steps=total_steps,
        image_interval=image_interval,
        finish_timeout_s=timeout_s,
    )


def steps_in(tmp_path):
    return [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]


def losses(records):
    return [(record["step"], record["loss"]) for record in records]


def test_every_backend_gets_every_step_in_order_and_is_finished(tmp_path):
    first, second = Fake(), Fake()
    tracker = tracker_with(tmp_path, first, second)
    for step in range(1, 51):
        tracker.log({"step": step, "loss": 1.0})
    tracker.finish(failed=True)
    assert first.calls == second.calls == [*(("log", step) for step in range(1, 51)), ("finish", True)]
    assert steps_in(tmp_path) == list(range(1, 51))


def test_a_backend_that_fails_is_dropped_with_one_line_and_the_others_go_on(tmp_path, caplog):
    bad, good = Fake(fail_at=3), Fake()
    tracker = tracker_with(tmp_path, bad, good)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 11):
            tracker.log({"step": step, "loss": 1.0})
        tracker.finish(failed=False)
    assert [record.getMessage() for record in caplog.records] == [
        "Fake is not tracking this run any more (ConnectionError: the server went away); the files of the run have all"
    ]
    assert bad.calls == [("log", 1), ("log", 2)] and len(good.calls) == 11 and len(steps_in(tmp_path)) == 10


def test_a_backend_that_can_not_be_opened_is_dropped(tmp_path, caplog):
    def broken():
        raise ImportError("no such module")

    tracker = tracker_with(tmp_path, broken)
    with caplog.at_level(logging.WARNING):
        tracker.log({"step": 1, "loss": 1.0})
        tracker.finish(failed=False)
    assert len(caplog.records) == 1 and "no such module" in caplog.text and steps_in(tmp_path) == [1]


def test_a_backend_that_hangs_delays_no_step_and_the_end_only_so_long(tmp_path, caplog):
    hang = threading.Event()
    tracker = tracker_with(tmp_path, Fake(hang=hang), timeout_s=0.3)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 101):
            tracker.log({"step": step, "loss": 1.0})
        logged_s = time.monotonic() - began
        tracker.finish(failed=False)
    finished_s = time.monotonic() - began
    hang.set()
    assert logged_s < 0.25 and 0.3 <= finished_s < 2
    assert "did not finish in 0.3 s" in caplog.text and len(steps_in(tmp_path)) == 100


def test_a_backend_that_falls_too_far_behind_is_dropped(tmp_path, caplog):
    hang = threading.Event()
    tracker = tracker_with(tmp_path, Fake(hang=hang), queue_size=10)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 101):
            tracker.log({"step": step, "loss": 1.0})
        tracker.finish(failed=False)
    hang.set()
    assert time.monotonic() - began < 1
    assert len(caplog.records) == 1 and "10 records behind" in caplog.text and len(steps_in(tmp_path)) == 100


def test_a_full_disk_does_not_fail_the_run(tmp_path, caplog, monkeypatch):
    good = Fake()
    tracker = tracker_with(tmp_path, good)

    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsFile, "write", full)
    with caplog.at_level(logging.WARNING):
        tracker.log({"step": 1, "loss": 1.0})
        tracker.log({"step": 2, "loss": 1.0})
        tracker.finish(failed=False)
    assert len(caplog.records) == 1 and "No space left" in caplog.text and len(good.calls) == 3


def test_expert_load_is_thinned_in_the_file_and_drawn_at_the_interval_and_at_the_end(tmp_path):
    backend = Fake()
    tracker = tracker_with(tmp_path, backend, image_interval=400, total_steps=1000)
    for step in range(1, 1001):
        tracker.log({"step": step, "loss": 1.0, "expert_load": [[1 / 3, 2 / 3], [0.5, 0.5]]})
    tracker.finish(failed=False)
    stored = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if "expert_load" in record]
    assert stored == list(range(5, 1001, 5))
    drawn = [call for call in backend.calls if call[0] == "expert_load"]
    assert [call[1][-1] for call in drawn] == [400, 800, 1000]
    assert drawn[-1][1] == stored and drawn[-1][2] == [0, 1] and drawn[-1][3] == np.uint8


def test_figures_are_handed_on_as_pixels(tmp_path):
    from matplotlib.figure import Figure

    backend = Fake()
    tracker = tracker_with(tmp_path, backend)
    tracker.images(7, {"a": Figure(figsize=(3, 2), dpi=50), "b": Figure(figsize=(1, 1), dpi=50)})
    tracker.finish(failed=False)
    assert backend.calls[0] == ("images", 7, {"a": (100, 150, 3), "b": (50, 50, 3)})


@pytest.mark.full
def test_an_offline_wandb_run_gives_the_loss_history_of_the_metrics_file_back(tmp_path, capfd):
    run_dir = write_run(tmp_path / "run", wandb="offline", image_interval=30)
    assert capfd.readouterr().out == ""  # stdout belongs to the summary
    records, history = read_metrics(run_dir / "metrics.jsonl"), read_history(run_dir / "wandb")
    assert len(records) == 60 and losses(history) == losses(records)
    assert history[4]["layer_03/load_entropy"] == records[4]["load_entropy"][3]
    for shown in (history[29], history[59]):
        assert shown["expert_load._type"] == "image-file" and shown["expert_load_table._type"] == "table-file"


@pytest.mark.full
def test_a_run_that_continues_is_one_wandb_run_whose_newest_steps_count(tmp_path):
    config = config_of(tmp_path / "run", steps=30, wandb="offline")
    first, second = records_of(config, seed=1), records_of(config, seed=2)
    tracker = start(config)
    for record in first[:20]:
        tracker.log(record)
    tracker.finish(failed=False)
    tracker = start(config, resumed_step=12)
    for record in second[12:16]:
        tracker.log(record)
    tracker.finish(failed=False)
    run_dir = tmp_path / "run"
    assert len({path.name for path in run_dir.glob("wandb/offline-run-*/run-*.wandb")}) == 1
    assert losses(read_metrics(run_dir / "metrics.jsonl")) == losses(first[:12] + second[12:16])
    assert losses(read_history(run_dir / "wandb")) == losses(first[:12] + second[12:16])


PROGRAM = """
import signal, sys, time
from pathlib import Path
from tests.track.fake_run import config_of, records_of, start

stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))  # as the trainer does: finish the step, then leave
config = config_of(Path(sys.argv[1]), steps=1000, wandb="offline")
tracker = start(config)
for record in records_of(config):
    tracker.log(record)
    if record["step"] == 50:
        print("going", flush=True)
    time.sleep(0.002)
    if stop:
        break
tracker.finish(failed=False)
"""


def interrupted_run(run_dir, how, *, group=False):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"going\n"
    if group:  # as a terminal or a launcher does: what W&B has started gets the signal too
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    code = process.wait(timeout=60)
    process.stdout.close()
    return code


@pytest.mark.full
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_after_sigterm_the_wandb_run_holds_every_step(tmp_path, group):
    assert interrupted_run(tmp_path / "run", signal.SIGTERM, group=group) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 50 <= len(records) < 1000
    assert losses(read_history(tmp_path / "run" / "wandb")) == losses(records)


@pytest.mark.full
def test_after_kill_9_the_wandb_run_can_be_rebuilt_from_the_metrics_file(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert interrupted_run(run_dir, signal.SIGKILL) == -signal.SIGKILL
    records = read_metrics(run_dir / "metrics.jsonl")
    assert len(records) >= 50
    assert rebuild_wandb([str(run_dir)]) == 0
    folders = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 1 and f"wandb sync {folders[0]}" in capsys.readouterr().out
    assert losses(read_history(run_dir / "wandb")) == losses(records)
    assert (run_dir / "wandb_id").read_text().strip() in folders[0].name  # the same run


def test_rebuilding_what_is_no_run_is_an_error_of_one_line(tmp_path, capsys):
    assert rebuild_wandb([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="no W&B run"):
        read_history(tmp_path)


def test_tensorboard_gets_the_scalars_and_the_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = write_run(tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 61))
    shown = [event.value for event in events.Scalars("layer_03/load_entropy")]
    assert shown == [np.float32(record["load_entropy"][3]) for record in records]
    assert [event.step for event in events.Images("expert_load")] == [60]
