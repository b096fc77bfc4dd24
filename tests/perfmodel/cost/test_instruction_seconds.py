"""What instructions cost on a device, by hand and by what must hold; and the files of clusters, which say what devices are."""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megalina.blocks.model import shape_of
from megalina.blocks.optimizers import matrix_flops
from megalina.blocks.work import Product, Work
from megalina.config import ClusterConfig, HardwareConfig, OptimConfig, PretrainConfig
from megalina.parallel.emulated_device import emulated_device
from megalina.perfmodel.cost.instruction_bytes import bucket_specs
from megalina.perfmodel.cost.instruction_seconds import (
    SMALLEST_SHARE,
    Device,
    device_of,
    emulated_seconds,
    instruction_seconds,
    share_at,
)
from megalina.perfmodel.cost.instruction_work import InstructionWork, forward_flops
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Op
from megalina.step.strategy import Setting, training_step
from megalina.train.throughput import published_peak_flops
from megalina.validate import check_hardware

ROOT = Path(__file__).resolve().parents[3]
FILES = {path.stem: path for path in sorted((ROOT / "conf" / "cluster").glob("*.yaml"))}
SIMULATED = [name for name, path in FILES.items() if "hardware:" in path.read_text()]
FIGURE = r"([\d.]+|true|false|\[[\d., ]*\])"
# 100 FLOP/s for large products, 50 in float32, 20 in attention, 10 bytes/s; a product of 4 rows reaches half
PLAIN = Device(100.0, 50.0, 20.0, 4.0, 10.0, 0.0, 0.0)


def cluster_of(name: str) -> ClusterConfig:
    figures = yaml.safe_load(FILES[name].read_text())
    hardware = HardwareConfig(**figures.pop("hardware", {}))
    return ClusterConfig(**figures, hardware=hardware)


def seconds_of(
    cluster: ClusterConfig, *, dtype: str = "bfloat16", load: float = 1.0, **model: int
) -> Callable[[Instruction], float]:
    """OLMoE-like layers, 2 sequences of 1024 tokens, experts on 8 ranks."""
    config = PretrainConfig(cluster=cluster)
    config.train.micro_batch_size, config.train.seq_len, config.train.dtype = 2, 1024, dtype
    config.parallel.ep, config.router.top_k = 8, 8
    sizes = {"d_model": 2048, "num_heads": 16, "num_kv_heads": 16, "num_experts": 64, "d_ff": 1024, **model}
    for name, value in sizes.items():
        setattr(config.model, name, value)
    return instruction_seconds(config, InstructionWork(config, world=8, vocab_rows=50304, buckets={}), load=load)


def instruction(name: str, phase: str = "F", **more: object) -> Instruction:
    return Instruction(phase, Kind.COMPUTE, name, 0, **more)  # type: ignore[arg-type]


# the roofline, by hand


def test_a_product_takes_its_flops_at_the_rate_of_its_shape_or_its_bytes() -> None:
    product = Product(rows=4, columns=12, inner=50, count=1, num_bytes=100.0)
    assert PLAIN.efficiency(product) == 1 / 2 * 12 / 16
    assert PLAIN.product_s(product) == pytest.approx(2 * 4 * 12 * 50 / (100 * 0.375)) == 128
    assert PLAIN.product_s(replace(product, num_bytes=2000.0)) == 200
    assert PLAIN.product_s(replace(product, count=3)) == pytest.approx(3 * 128)
    assert PLAIN.product_s(replace(product, wide=True)) == pytest.approx(2 * 128)
    assert PLAIN.product_s(replace(product, attention=True)) == 4800 / 20


def test_kernels_add_up_and_each_costs_a_launch() -> None:
    product = Product(4, 12, 50, 1, 100.0)
    work = Work((product, replace(product, num_bytes=2000.0)), moved_bytes=50.0, moving_kernels=3)
    assert PLAIN.seconds(work) == 128 + 200 + 5
    assert replace(PLAIN, kernel_s=2.0).seconds(work) == 333 + 5 * 2
    assert replace(PLAIN, host_instruction_s=400.0).seconds(work) == 400
    assert replace(PLAIN, host_instruction_s=400.0).seconds(Work()) == 0
    assert PLAIN.seconds(Work((replace(product, rows=0.0, num_bytes=0.0),))) == 0


def test_the_same_flops_in_experts_of_fewer_rows_take_longer() -> None:
    took_s = [PLAIN.seconds(Work((Product(64 / n, 64, 64, n, 0.0),))) for n in (1, 4, 16)]
    assert took_s == [pytest.approx(2 * 64**3 / 100 * (64 / n + 4) * n / 64 * 68 / 64) for n in (1, 4, 16)]
    assert took_s == sorted(set(took_s))


# measured shares in place of the half size

CURVE = ((4.0, 0.2), (16.0, 0.5), (256.0, 0.8))


def test_a_measured_share_follows_from_the_smallest_side_between_two_sizes() -> None:
    measured = replace(PLAIN, product_curve=CURVE)
    for size, share in CURVE:
        assert {
            measured.efficiency(Product(*sides, 1, 0.0)) for sides in ((size, 512, 900), (512, size, 900), (512, 900, size))
        } == {share}
    assert share_at(CURVE, 8) == pytest.approx((0.2 * 0.5) ** 0.5)  # half-way in logarithms
    assert share_at(CURVE, 64) == pytest.approx((0.5 * 0.8) ** 0.5)
    assert share_at(CURVE, 1000) == 0.8
    assert share_at(CURVE, 1) == 0.05  # as long as the smallest that was measured
    assert share_at(CURVE, 0) == 1
    few, many = (measured.product_s(Product(rows, 512, 512, 1, 0.0)) for rows in (1, 4))
    assert few == pytest.approx(many)


@given(
    st.lists(st.tuples(st.floats(1.01, 16.0), st.floats(0.0, 1.0)), min_size=1, max_size=8),
    st.floats(0.1, 5000.0),
    st.floats(1.0, 4.0),
)
def test_on_a_curve_that_passes_the_check_more_rows_never_take_less_time(
    steps: list[tuple[float, float]], rows: float, more: float
) -> None:
    size, share, curve = 1.0, 0.01, []
    for factor, growth in steps:
        size, share = size * factor, min(1.0, share * factor**growth)
        curve.append((size, share))
    checked = changed("h100_400g", "product_sizes", [size for size, _ in curve])
    checked.hardware.product_shares = [share for _, share in curve]
    check_hardware(checked)
    measured = replace(PLAIN, product_curve=tuple(curve))
    less_s, more_s = (measured.product_s(Product(n, 1e9, 1e9, 1, 0.0)) for n in (rows, rows * more))
    assert less_s <= more_s * (1 + 1e-9)


def test_where_the_host_is_the_device_its_time_comes_on_top_and_what_travels_takes_it_too() -> None:
    host = replace(PLAIN, host_instruction_s=400.0, host_is_device=True)
    work = Work((Product(4, 12, 50, 1, 100.0),), moved_bytes=50.0, moving_kernels=3)
    assert host.seconds(work) == 128 + 5 + 400
    assert host.seconds(Work()) == 400
    cluster = changed("h100_400g", "host_is_device", True)
    seconds = seconds_of(cluster)
    assert seconds(Instruction("F", Kind.WAIT, "dispatch", 0, op=Op.TOKENS, axis="ep")) == 20e-6
    plain = seconds_of(cluster_of("h100_400g"))
    assert seconds(instruction("attention")) == pytest.approx(plain(instruction("attention")) + 20e-6)
    assert seconds(instruction("experts")) > plain(instruction("experts")) + 20e-6  # there each expert has kernels of its own


def test_a_device_has_the_figures_of_its_file() -> None:
    cluster = cluster_of("a100_80g_ib")
    device = device_of(cluster, "bfloat16")
    assert device.flops_per_s == pytest.approx(0.85 * 312e12) and device.wide_flops_per_s == pytest.approx(0.85 * 19.5e12)
    assert device.attention_flops_per_s == pytest.approx(0.5 * 312e12)
    assert device.bytes_per_s == pytest.approx(0.85 * 2039e9)
    assert (device.kernel_s, device.host_instruction_s, device.half_size) == (4e-6, 20e-6, 64)
    assert device_of(cluster, "float32").flops_per_s == device.wide_flops_per_s
    with pytest.raises(ValueError, match=r"^conf/cluster/a100_80g_ib.yaml gives peaks for float32 or bfloat16, not for float64"):
        device_of(cluster, "float64")


# instructions


@pytest.mark.parametrize("name", [name for name in SIMULATED if name != "emulated"])
def test_instructions_take_plausible_times(name: str) -> None:
    """An attention and experts of some GFLOP: no slower than at 10% of the peak, no faster than at the peak."""
    cluster, work_s = cluster_of(name), seconds_of(cluster_of(name))
    config_flops = {"attention": 2 * 2048 * (4 * 2048**2 + 1024 * 2048), "experts": 2 * 2048 * 8 * 3 * 2048 * 1024}
    for which, flops in config_flops.items():
        ideal_s = flops / (cluster.hardware.bfloat16_tflops * 1e12)
        assert ideal_s < work_s(instruction(which)) < 10 * ideal_s
        assert 1.8 < work_s(instruction(which, "B")) / work_s(instruction(which)) < 3.5


@pytest.mark.parametrize(
    "field",
    ["bfloat16_tflops", "float32_tflops", "memory_gbyte_s", "product_efficiency", "attention_efficiency", "memory_efficiency"],
)
def test_more_of_anything_makes_no_instruction_slower(field: str) -> None:
    names = ("attention", "route", "experts", "mix", "loss")
    cluster = cluster_of("h100_400g")
    took_s: list[list[float]] = []
    for factor in (0.5, 0.8, 1):
        hardware = replace(cluster.hardware, **{field: getattr(cluster.hardware, field) * factor})
        seconds = seconds_of(replace(cluster, hardware=hardware))
        took_s.append([seconds(instruction(name, phase)) for name in names for phase in "FB"])
    slow, middle, fast = took_s
    assert all(a >= b >= c for a, b, c in zip(slow, middle, fast, strict=True))
    assert sum(slow) > sum(middle) > sum(fast)


def test_a_half_takes_more_than_half_and_no_more_than_all() -> None:
    seconds = seconds_of(cluster_of("h100_400g"))
    for name in ("attention", "experts", "route", "mix", "loss"):
        for phase in "FB":
            whole = seconds(instruction(name, phase))
            assert whole / 2 < seconds(instruction(name, phase, share=0.5)) < whole
    assert seconds(instruction("experts", share=0.5)) == seconds(instruction("experts", chunk=(0, 2)))
    assert seconds(instruction("experts", chunk=(0, 64))) > seconds(instruction("experts")) / 32  # weights and launches stay


def test_fine_grained_experts_are_slower_for_the_same_flops() -> None:
    coarse = seconds_of(cluster_of("h100_400g"), num_experts=64, d_ff=1024)
    fine = seconds_of(cluster_of("h100_400g"), num_experts=2048, d_ff=1024)  # 64 rows each, not 2048
    assert fine(instruction("experts")) > 2 * coarse(instruction("experts"))
    assert fine(instruction("attention")) == coarse(instruction("attention"))
    assert seconds_of(cluster_of("h100_400g"), load=2.0)(instruction("experts")) > 1.5 * coarse(instruction("experts"))


def test_a_small_instruction_waits_for_the_host_and_what_travels_costs_the_device_nothing() -> None:
    seconds = seconds_of(cluster_of("h100_400g"))
    assert seconds(instruction("verdict", "U")) == 20e-6
    assert seconds(Instruction("F", Kind.START, "dispatch", 0, op=Op.TOKENS, axis="ep")) == 0


@pytest.mark.parametrize(
    "given",
    [{"attention_ms": 10.0, "experts_ms": 14.0}, {"device_gflops": 50.0}, {"device_gflops": 50.0, "kernel_floor_ms": 1.0}],
)
def test_an_emulated_device_costs_here_what_it_costs_there(given: dict[str, float]) -> None:
    cluster = replace(cluster_of("emulated"), **{"attention_ms": 0.0, "experts_ms": 0.0, **given})
    config = PretrainConfig(cluster=cluster, optim=OptimConfig(name="muon"))
    config.model.vocab_size = 512
    shape = shape_of(config.model, config.router, tp=1, sequence=True)
    buckets = bucket_specs(config, 4, vocab_size=512)
    setting = Setting(shape, buckets, Plan(chunks=(2, 1), late_layers=1), micro_batches=2, recompute_mode="full")
    seconds = instruction_seconds(config, InstructionWork(config, world=4, vocab_rows=512, buckets=buckets))
    device = emulated_device(config, buckets)
    assert device is not None
    program = training_step("lina", setting)
    assert sum(map(seconds, program)) > 0
    assert all(seconds(s) > 0 for s in program if s.name.startswith("newton_schulz "))
    assert [seconds(s) for s in program] == [device.seconds(s) if s.kind is Kind.COMPUTE else 0.0 for s in program]


@pytest.mark.parametrize("zero", [0, 1])
def test_directions_take_their_flops_on_an_emulated_device(zero: int) -> None:
    """At the rate of attention and experts together, where these have times; with ZeRO-1 of the matrices that a rank has."""
    config = PretrainConfig(cluster=cluster_of("emulated"), optim=OptimConfig(name="muon"))
    config.parallel.zero, config.parallel.ep, config.model.vocab_size = zero, 2, 512
    buckets = bucket_specs(config, 4, vocab_size=512)
    flops, cluster = forward_flops(config), config.cluster
    rate = (flops["attention"] + flops["experts"]) / (cluster.attention_ms + cluster.experts_ms) * 1e3
    seconds = emulated_seconds(config, buckets)
    assert seconds is not None
    for name in ("dense.0", "experts.0"):
        of_ranks = [
            sum(m.count * matrix_flops(m.rows, m.columns, config.optim) for m in buckets[name].own_matrices(rank))
            for rank in range(len(buckets[name].shares) or 1)
        ]
        assert seconds(instruction(f"newton_schulz {name}", "U")) == pytest.approx((1 + SMALLEST_SHARE) * max(of_ranks) / rate)
    assert seconds(instruction("update dense.0", "U")) == seconds(instruction("newton_schulz embedding", "U")) == 0


# files


@pytest.mark.parametrize("name", SIMULATED)
def test_a_file_with_hardware_is_whole_and_says_where_its_figures_are_from(name: str) -> None:
    check_hardware(cluster_of(name))
    for line in FILES[name].read_text().splitlines():
        assert line.startswith(("#", "name:", "hardware:")) or re.search(rf"^ *\w+: {FIGURE} # \w", line), line


@pytest.mark.parametrize("name", [name for name in SIMULATED if name != "emulated"])
def test_the_peak_for_mfu_is_one_of_the_peaks(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster.peak_tflops in (cluster.hardware.float32_tflops, cluster.hardware.bfloat16_tflops)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("lina_testbed", "NVIDIA A100-SXM4-40GB"),
        ("a100_80g_ib", "NVIDIA A100-SXM4-80GB"),
        ("h100_400g", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200"),
        ("rtx4090_pcie", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_peaks_are_those_of_the_table_that_mfu_uses(name: str, device: str) -> None:
    hardware = cluster_of(name).hardware
    assert hardware.bfloat16_tflops * 1e12 == published_peak_flops(device, torch.bfloat16)
    float32 = published_peak_flops(device, torch.float32, tf32=name == "lina_testbed")
    assert hardware.float32_tflops * 1e12 == float32


def changed(name: str, field: str, value: object) -> ClusterConfig:
    cluster = cluster_of(name)
    setattr(cluster.hardware if hasattr(cluster.hardware, field) else cluster, field, value)
    return cluster


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("memory_gib", 0.0, "hardware.memory_gib is 0, which stands for unknown, and a simulation needs it: give it"),
        ("nodes", 0, "nodes is 0, which stands for unknown"),
        ("link_gbit", -1.0, "link_gbit is -1, which must be from 0 to "),
        ("kernel_us", -3.0, "hardware.kernel_us is -3, which must be from 0 to "),
        ("memory_efficiency", 1.2, "hardware.memory_efficiency is 1.2, which must be from 0 to 1: correct it"),
        ("bfloat16_tflops", float("nan"), "hardware.bfloat16_tflops is nan, which must be from "),
        ("oversubscription", 0.5, "hardware.oversubscription is 0.5, which must be at least 1"),
        ("domain_ranks", 6, r"hardware.domain_ranks \(6\) must be some whole nodes of ranks_per_node \(8\), or divide one"),
        ("domain_ranks", 1024, r"hardware.domain_ranks \(1024\) must be .* divide the 128 ranks"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_field(field: str, value: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"^conf/cluster/h100_400g.yaml: {said}") as found:
        check_hardware(changed("h100_400g", field, value))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("sizes", "shares", "said"),
    [
        ([1.0, 2.0], [0.5], "hardware.product_sizes has 2 numbers and hardware.product_shares 1: give a share for each size"),
        ([], [0.5], "hardware.product_sizes has 0 numbers and hardware.product_shares 1"),
        ([4.0, 2.0], [0.1, 0.2], r"hardware.product_sizes \(4, 2\) must rise from above 0: put them in order"),
        ([2.0, 2.0], [0.1, 0.1], r"hardware.product_sizes \(2, 2\) must rise"),
        ([0.0, 2.0], [0.1, 0.2], r"hardware.product_sizes \(0, 2\) must rise"),
        ([float("nan")], [0.1], r"hardware.product_sizes \(nan\) must rise"),
        ([1.0, float("inf")], [0.1, 0.2], r"hardware.product_sizes \(1, inf\) must rise"),
        ([1.0, 2.0], [0.0, 0.2], r"hardware.product_shares \(0, 0.2\) must be above 0 and at most 1: correct them"),
        ([1.0, 2.0], [0.9, 1.1], r"hardware.product_shares \(0.9, 1.1\) must be above 0 and at most 1"),
        ([1.0, 2.0], [float("nan"), 1.0], r"hardware.product_shares \(nan, 1\) must be above 0"),
        (
            [4.0, 8.0],
            [0.1, 0.3],
            "hardware.product_shares rise from 0.1 to 0.3 between sizes 4 and 8, more than the sizes do, so",
        ),
    ],
)
def test_inconsistent_shares_of_products_are_one_line(sizes: list[float], shares: list[float], said: str) -> None:
    cluster = changed("h100_400g", "product_sizes", sizes)
    cluster.hardware.product_shares = shares
    with pytest.raises(ValueError, match=f"^conf/cluster/h100_400g.yaml: {said}") as found:
        check_hardware(cluster)
    assert "\n" not in str(found.value)


def test_no_figure_that_is_needed_may_be_missing() -> None:
    """Nor any other: a time of 0 is a figure, a rate of 0 is none."""
    free = {"kernel_us", "host_stage_us", "domain_latency_us", "product_half_size"}
    figures = {name for name, value in asdict(HardwareConfig()).items() if type(value) in (int, float)}
    missed = set()
    for field in figures:
        try:
            check_hardware(changed("h100_400g", field, 0))
        except ValueError:
            missed.add(field)
    assert missed == figures - free


def test_files_without_hardware_can_not_be_simulated_and_an_emulated_device_needs_links_alone() -> None:
    with pytest.raises(ValueError, match=r"^conf/cluster/local.yaml: nodes is 0"):
        check_hardware(cluster_of("local"))
    check_hardware(changed("emulated", "memory_gib", 0.0))
    with pytest.raises(ValueError, match="collective_efficiency is 0"):
        check_hardware(changed("emulated", "collective_efficiency", 0.0))
