"""Peaks, against the names that drivers report."""

import pytest
import torch

from megalina.train.throughput import (
    measure_matmul_flops,
    mfu,
    peak_memory_bytes,
    published_peak_flops,
)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float64, 19.5),
        ("NVIDIA L40S", torch.float32, 91.6),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("Tesla V100-SXM2-32GB", torch.float32, 15.7),
    ],
)
def test_peaks_are_found_by_the_names_of_devices(name: str, dtype: torch.dtype, tflops: float) -> None:
    assert published_peak_flops(name, dtype) == tflops * 1e12


def test_peaks_are_not_guessed() -> None:
    assert published_peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16) is None
    assert published_peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16) is None
    assert published_peak_flops("Tesla V100-SXM2-32GB", torch.bfloat16) is None
    assert published_peak_flops("Some other GPU", torch.float32) is None


def test_tf32_is_a_peak_of_its_own() -> None:
    assert published_peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert published_peak_flops("NVIDIA A100-SXM4-80GB", torch.float32, tf32=True) == 156e12


def test_mfu_is_one_at_the_peak_of_all_devices() -> None:
    assert mfu(tokens_per_s=40.0, flops_per_token=5.0, peak_flops=50.0, num_devices=4) == 1.0


def test_the_measured_rate_is_a_rate_of_this_machine() -> None:
    rate = measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e15


@pytest.mark.full
def test_peak_memory_grows_by_a_tensor_that_is_gone() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    torch.ones(2 * before // 4)  # float32: twice of what there was
    assert peak_memory_bytes(torch.device("cpu")) >= 2 * before
