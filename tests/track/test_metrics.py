import json
import logging
import math

import pytest
import torch

from megalina.track.metrics import MAX_LAYERS_AS_KEYS, MetricsFile, json_record, read_metrics, scalars


def write_steps(path, steps, *, resumed_step=0, loss=0.0):
    file = MetricsFile(path, resumed_step=resumed_step)
    for step in steps:
        file.write({"step": step, "loss": loss + step / 3})
    file.close()


def test_what_is_written_is_read_back_unrounded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 6))
    assert read_metrics(path) == [{"step": step, "loss": step / 3} for step in range(1, 6)]


def test_a_line_can_be_read_before_the_file_is_closed(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    file.write({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    file.close()


def test_a_run_that_continues_forgets_later_steps_and_keeps_earlier_ones_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 11))
    before = path.read_bytes().splitlines()[:6]
    write_steps(path, range(7, 9), resumed_step=6, loss=100.0)
    assert path.read_bytes().splitlines()[:6] == before
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 9))
    assert read_metrics(path)[-1]["loss"] > 100


def test_a_new_run_in_an_old_folder_starts_with_an_empty_file(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", range(1, 11))
    write_steps(tmp_path / "metrics.jsonl", [1], resumed_step=0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_at_whatever_byte_a_kill_cut_the_file_the_whole_lines_are_read_and_the_run_continues(tmp_path):
    whole = tmp_path / "whole.jsonl"
    write_steps(whole, range(1, 4))
    text = whole.read_bytes()
    for length in range(len(text)):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(text[:length])
        complete = [
            json.loads(line) for line in whole.read_text().splitlines() if whole.read_text().index(line) + len(line) <= length
        ]
        assert read_metrics(cut) == complete, length
        write_steps(cut, [9], resumed_step=3)
        assert read_metrics(cut) == [*complete, {"step": 9, "loss": 3.0}], length


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        read_metrics(path)


def test_a_bad_line_does_not_stop_a_run_from_continuing_and_is_told(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n')
    with caplog.at_level(logging.WARNING):
        write_steps(path, [3], resumed_step=2)
    assert "lines [2]" in caplog.text
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_file_that_was_being_rewritten_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 6))
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megalina.whole_file.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, resumed_step=2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null_and_the_step_is_marked_skipped(bad):
    record = json_record({"step": 3, "loss": bad, "load_entropy": [1.0, bad]})
    assert record == {"step": 3, "loss": None, "load_entropy": [1.0, None], "skipped": True}
    json.dumps(record, allow_nan=False)


def test_a_bad_validation_loss_does_not_mark_the_step_as_skipped():
    assert json_record({"step": 1, "loss": 2.0, "val_loss": math.nan}) == {"step": 1, "loss": 2.0, "val_loss": None}


def test_tensors_become_plain_numbers_and_lists():
    record = json_record({"step": 1, "loss": torch.tensor(0.5, dtype=torch.float64), "dead_experts": torch.tensor([1, 0])})
    assert record == {"step": 1, "loss": 0.5, "dead_experts": [1, 0]}


def test_per_layer_lists_become_a_key_a_layer_with_the_models_numbers():
    flat = scalars({"step": 4, "loss": 2.0, "load_entropy": [1.0, None, 3.0]}, lambda count: [1, 3, 5][:count])
    assert flat == {
        "loss": 2.0,
        "layer_01/load_entropy": 1.0,
        "layer_05/load_entropy": 3.0,
        "layers/load_entropy_mean": 2.0,
        "layers/load_entropy_max": 3.0,
    }


def test_a_very_deep_model_gets_no_key_a_layer():
    deep = {"step": 1, "load_entropy": [1.0] * (MAX_LAYERS_AS_KEYS + 1)}
    assert set(scalars(deep, lambda count: list(range(count)))) == {"layers/load_entropy_mean", "layers/load_entropy_max"}
