"""The cluster's file: what it says is what was measured, and simulations read it."""

import json
import re

import pytest
import yaml

from megalina.config import ClusterConfig, HardwareConfig, PretrainConfig
from megalina.measure.cluster_file import cluster_file, cluster_of, plain
from megalina.measure.figures import figures_of
from megalina.measure.report import as_json, report
from megalina.perfmodel.cost.instruction_seconds import device_of
from megalina.perfmodel.forecast.forecast import forecast
from megalina.validate import check_hardware
from tests.measure import made

LAYOUTS = [(1, 1), (1, 2), (4, 1), (2, 4)]


def written(nodes: int, ranks_per_node: int) -> str:
    machine = made.machine(nodes, ranks_per_node)
    return cluster_file("made", machine, figures_of(machine), day="2026-11-26", command="tools/measure_cluster.py --ranks 2")


@pytest.mark.parametrize(("nodes", "ranks_per_node"), LAYOUTS)
def test_what_is_read_back_is_what_was_measured_and_can_be_simulated(nodes: int, ranks_per_node: int) -> None:
    text = written(nodes, ranks_per_node)
    figures = yaml.safe_load(text)
    read = ClusterConfig(**{**figures, "hardware": HardwareConfig(**figures["hardware"])})
    machine = made.machine(nodes, ranks_per_node)
    assert read == cluster_of("made", machine, figures_of(machine))
    check_hardware(read)
    config = PretrainConfig(cluster=read)
    config.model.vocab_size = 512
    config.train.global_batch_size = 2 * nodes * ranks_per_node
    assert 0 < forecast(config, nodes * ranks_per_node, vocab_size=512).step_s < 10
    for line in text.splitlines():
        assert line.startswith(("#", "name:", "hardware:")) or re.search(r"^ *\w+: \S.* # \w", line), line
        assert len(line) < 250
    head = text.split("name:")[0]
    for piece in ("2026-11-26", "a made processor, 4 cores", "torch 2.13.0", "--ranks 2", "measure yours anew"):
        assert piece in head


def test_a_device_of_the_file_has_the_measured_rates() -> None:
    machine = made.machine()
    device = device_of(cluster_of("made", machine, figures_of(machine)), "float32")
    assert device.flops_per_s == pytest.approx(made.FLOPS_PER_S["float32"], rel=1e-3)
    assert device.attention_flops_per_s == pytest.approx(made.ATTENTION_SHARE * made.FLOPS_PER_S["float32"], rel=1e-3)
    assert device.bytes_per_s == pytest.approx(made.PASS_BYTES_PER_S, rel=1e-3)
    assert (device.kernel_s, device.host_instruction_s) == (pytest.approx(made.KERNEL_S), pytest.approx(made.HOST_INSTRUCTION_S))
    assert device.host_is_device and len(device.product_curve) == 11


def test_what_was_not_measured_is_said() -> None:
    assert "link_gbit: 16.0 # not measured, there is one node: domain_gbyte_s stands here" in written(1, 2)
    assert "domain_gbyte_s: 20.0 # not measured, there is one rank a node: a copy's rate stands here" in written(4, 1)
    assert "link_gbit: 0.8 # measured: a node's" in written(2, 4)
    assert "latency_us: 200.0 # measured" in written(2, 4)
    assert "# Measured, and not a figure of the model: all-to-all under all-reduce takes 1.50 times" in written(1, 2)


def test_the_report_has_every_part_and_json_holds_it_all() -> None:
    machine = made.machine(2, 2)
    figures = figures_of(machine)
    cluster = cluster_of("made", machine, figures)
    text = report(machine, figures, cluster)
    parts = ("products, GFLOP/s", "memory: a copy 20.0 GB/s", "inside a node:", "over nodes:", "one line for all: 200 us")
    for piece in (*parts, "1.50 (median), 2.50 (p95) of 20", "held out: 4 experts", "two passes:"):
        assert piece in text
    found = json.loads(json.dumps(as_json(machine, figures, cluster), allow_nan=False))
    assert found["cluster"]["hardware"]["product_half_size"] == 16.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (3, "3"),
        (2.0, "2.0"),
        (0.00012, "0.00012"),
        (1e-5, "0.00001"),
        (123456.0, "123456.0"),
        ([1.0, 0.5], "[1.0, 0.5]"),
    ],
)
def test_figures_are_written_as_digits(value: object, text: str) -> None:
    assert plain(value) == text and yaml.safe_load(text) == value
