"""Throughput in FLOP/s: what a token costs, what a device can do, and the share in between (MFU).

A FLOP is one multiplication or one addition, so a product of [m, k] and [k, n] takes 2 m k n.
"""

import resource
import sys
import time
from pathlib import Path

import torch

# Published dense peaks (no structured sparsity), TFLOP/s, by words that must all be in the device's name; the first row
# that fits counts.  bfloat16: tensor cores with float32 accumulation; tf32: float32 products where torch may use TF32;
# float32: without it; float64: the faster of vector and tensor cores.  Missing: not published or not supported.
_PEAK_TFLOPS: list[tuple[tuple[str, ...], dict[str, float]]] = [
    # NVIDIA HGX B200 datasheet, an eighth of the board
    (("B200",), {"bfloat16": 2250, "tf32": 1125, "float32": 75, "float64": 37}),
    # NVIDIA H200 datasheet (SXM and NVL)
    (("H200", "NVL"), {"bfloat16": 835.5, "tf32": 417.5, "float32": 60, "float64": 60}),
    (("H200",), {"bfloat16": 989.4, "tf32": 494.7, "float32": 66.9, "float64": 66.9}),
    # NVIDIA H100 datasheet and "H100 Tensor Core GPU Architecture", table 2
    (("H100", "NVL"), {"bfloat16": 835.5, "tf32": 417.5, "float32": 60, "float64": 60}),
    (("H100", "PCIe"), {"bfloat16": 756, "tf32": 378, "float32": 51.2, "float64": 51.2}),
    (("H100",), {"bfloat16": 989.4, "tf32": 494.7, "float32": 66.9, "float64": 66.9}),
    (("GH200",), {"bfloat16": 989.4, "tf32": 494.7, "float32": 66.9, "float64": 66.9}),
    # NVIDIA A100 datasheet (PCIe and SXM alike)
    (("A100",), {"bfloat16": 312, "tf32": 156, "float32": 19.5, "float64": 19.5}),
    # NVIDIA L40S, L40, L4, A40, A10 datasheets
    (("L40S",), {"bfloat16": 362.05, "tf32": 183, "float32": 91.6}),
    (("L40",), {"bfloat16": 181.05, "tf32": 90.5, "float32": 90.5}),
    (("L4",), {"bfloat16": 121, "tf32": 60, "float32": 30.3}),
    (("A40",), {"bfloat16": 149.7, "tf32": 74.8, "float32": 37.4}),
    (("A10",), {"bfloat16": 125, "tf32": 62.5, "float32": 31.2}),
    # "NVIDIA RTX Blackwell GPU architecture", "NVIDIA Ada GPU architecture" and "NVIDIA Ampere GA102 GPU architecture":
    # consumer cards accumulate in float32 at half rate, which is what torch asks for
    (("RTX", "5090"), {"bfloat16": 209.5, "tf32": 104.8, "float32": 104.8}),
    (("RTX", "4090"), {"bfloat16": 165.2, "tf32": 82.6, "float32": 82.6}),
    (("RTX", "3090"), {"bfloat16": 71, "tf32": 35.6, "float32": 35.6}),
    # NVIDIA V100 and T4 datasheets: neither has bfloat16 or TF32 units
    (("V100", "SXM2"), {"float32": 15.7, "float64": 7.8}),
    (("V100",), {"float32": 14, "float64": 7}),
    (("T4",), {"float32": 8.1}),
    # AMD Instinct MI300X and MI250X data sheets (matrix cores; a MI250X shows up as two devices)
    (("MI300X",), {"bfloat16": 1307.4, "float32": 163.4, "float64": 163.4}),
    (("MI250X",), {"bfloat16": 191.5, "float32": 47.9, "float64": 47.9}),
]
# Other products under the same number, or parts of a device.
_NOT_THE_CARD = ("Laptop", "MIG", "D", "Ti", "Max-Q")


def published_peak_flops(device_name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Dense peak in FLOP/s of the GPU that `torch.cuda.get_device_name` calls so; None: not in the table.

    `tf32`: whether float32 products may use TF32 (`torch.backends.cuda.matmul.allow_tf32`).
    """
    words = set(device_name.replace("-", " ").split())
    if words & set(_NOT_THE_CARD):
        return None
    kind = "tf32" if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")
    for required, tflops in _PEAK_TFLOPS:
        if words.issuperset(required):
            return tflops[kind] * 1e12 if kind in tflops else None
    return None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one rank's device: the published dense peak of a GPU, or the best matmul rate measured here and now."""
    if device.type == "cuda":
        published = published_peak_flops(torch.cuda.get_device_name(device), dtype)
        if published is not None:
            return published
    return measure_matmul_flops(device, dtype)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """The best rate of a square matrix product within about `seconds`, FLOP/s, with torch's present number of threads."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    end = time.perf_counter() + seconds
    best_s = float("inf")
    runs = 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if runs:  # the first one warms up
            best_s = min(best_s, time.perf_counter() - start)
        runs += 1
    return 2 * size**3 / best_s


def mfu(*, tokens_per_s: float, flops_per_token: float, peak_flops: float, num_devices: int) -> float:
    """Model FLOP/s utilisation, 0 to 1: `tokens_per_s` of all devices against `peak_flops` of each."""
    return tokens_per_s * flops_per_token / (peak_flops * num_devices)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has had so far: allocated by tensors on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss survives exec: it would report the parent's peak where that was higher
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
