"""Emulated devices at inference: their time follows tokens and rows, and it is said."""

from collections.abc import Sequence

import pytest

from megalina.config import ClusterConfig, ModelConfig, RouterConfig
from megalina.evaluate.emulation import REAL, device_of, emulated_parts, emulation_note, full_batch, is_emulated, read_cluster
from megalina.step.program import Instruction, Kind

MODEL = ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=4, num_experts=4, d_ff=16)
ROUTER = RouterConfig(top_k=2)
TIMES = ClusterConfig(attention_ms=10.0, experts_ms=20.0)


def instruction(name: str, chunk: tuple[int, int] = (0, 1)) -> Instruction:
    return Instruction("F", Kind.COMPUTE, name, 0, "0", (), (), chunk=chunk)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.attention_ms=10"], "cluster.attention_ms (10) and cluster.experts_ms (0) go together: give both"),
        (
            ["cluster.device_gflops=1", "cluster.attention_ms=1", "cluster.experts_ms=1"],
            "exclude each other: give rates or times",
        ),
        (["cluster.kernel_floor_ms=1"], "cluster.kernel_floor_ms alone emulates no device"),
        (["cluster.atention_ms=1"], "(did you mean attention_ms?); links are emulated by tools/emulate_cluster.py"),
        (["cluster.experts_ms=ten"], "cluster.experts_ms must be a number from 0 on, not 'ten'"),
        (["cluster.experts_ms=-1"], "must be a number from 0 on, not '-1'"),
        (["cluster.experts_ms=nan"], "must be a number from 0 on, not 'nan'"),
        (["cluster.experts_ms="], "must be a number from 0 on, not ''"),
    ],
)
def test_what_asks_for_no_device_is_refused_in_one_line(overrides: Sequence[str], said: str) -> None:
    with pytest.raises(ValueError, match="cluster") as error:
        read_cluster(overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_device_is_asked_for_by_times_or_by_its_rate() -> None:
    assert read_cluster(["cluster.attention_ms=10", "cluster.experts_ms=2e1"]) == TIMES
    assert is_emulated(TIMES) and is_emulated(read_cluster(["cluster.device_gflops=50"])) and not is_emulated(read_cluster([]))
    assert full_batch(ClusterConfig(), MODEL, ROUTER, sequences=2, length=8) is None


def test_attention_takes_its_tokens_time_and_experts_their_rows() -> None:
    full = full_batch(TIMES, MODEL, ROUTER, sequences=2, length=8)
    assert full is not None and full.row_us == pytest.approx(20e3 / (16 * 2))
    device = device_of(full)
    assert device is not None and device.seconds(instruction("attention")) == 0  # nothing is served yet
    device.begin(16)
    device.give(32)
    floor = 0.02
    assert device.seconds(instruction("attention")) == pytest.approx(10e-3 * (1 + floor))
    assert device.seconds(instruction("experts")) == pytest.approx(20e-3 * (1 + floor))
    assert device.seconds(instruction("score")) == 0  # real
    device.begin(4)
    device.give(48)
    assert device.seconds(instruction("attention")) == pytest.approx(10e-3 * (0.25 + floor))
    assert device.seconds(instruction("experts")) == pytest.approx(20e-3 * (1.5 + floor))
    device.give(8)  # of one of two chunks: the rows are its own already
    assert device.seconds(instruction("experts", (0, 2))) == pytest.approx(20e-3 * (0.25 + floor))
    device.begin(None)
    device.give(8)
    assert device.seconds(instruction("experts")) == 0


def test_a_floor_counts_once_an_instruction_and_rates_follow_the_model() -> None:
    with_floor = ClusterConfig(attention_ms=10.0, experts_ms=20.0, kernel_floor_ms=3.0)
    full = full_batch(with_floor, MODEL, ROUTER, sequences=2, length=8)
    assert full is not None
    device = device_of(full)
    assert device is not None
    device.begin(16)
    assert device.seconds(instruction("attention")) == pytest.approx(13e-3)
    assert device.seconds(instruction("experts")) == pytest.approx(3e-3)
    by_rate = full_batch(ClusterConfig(device_gflops=0.001), MODEL, ROUTER, sequences=2, length=8)
    assert by_rate is not None
    assert by_rate.seconds["experts"] == pytest.approx(2 * 16 * 2 * 3 * 32 * 16 / 1e6)  # swiglu: three matrices


def test_the_note_names_what_was_emulated_and_what_was_not() -> None:
    full = full_batch(TIMES, MODEL, ROUTER, sequences=2, length=8)
    assert emulation_note(emulated_parts(None, {})) == REAL
    links = emulation_note(emulated_parts(None, {"MEGALINA_LINK_MBIT": "200"}))
    assert links.startswith("emulated: links between nodes (200 Mbit/s each way); measured as they are here: devices")
    both = emulation_note(emulated_parts(full, {"MEGALINA_LINK_MBIT": "500", "MEGALINA_SLOWDOWN": "200"}))
    assert both.startswith("emulated: devices (attention 10 ms, experts 20 ms a layer for a whole batch")
    assert "links between nodes (500 Mbit/s each way), all times 200x dilated; measured as they are here: routing" in both
