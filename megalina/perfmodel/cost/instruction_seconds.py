"""How long a device takes for a compute instruction: a roofline over its kernels, or the times that an emulated device is given.

A matrix product takes the longer of its FLOPs, at the rate that products of its shape reach, and its bytes.  An output of
[rows, columns] is computed in tiles, so a product costs as if it had `product_half_size` rows and columns more: what an expert
with few rows pays.  Where shares were measured (`product_sizes`), the smallest of rows, columns and depth says the share instead.
All other kernels take their bytes, and every kernel a launch.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from megalina.blocks.work import Product, Work
from megalina.config import ClusterConfig, PretrainConfig
from megalina.perfmodel.cost.instruction_work import InstructionWork, forward_flops, newton_schulz_flops, weight_shares
from megalina.step.program import BucketSpec, Instruction, Kind
from megalina.validate import check_hardware

SMALLEST_SHARE = 0.02  # of the full time, whatever the share: half a batch never takes exactly half the time


@dataclass(frozen=True, slots=True)
class Device:
    """What is reached of a device, from the figures of its cluster's file."""

    flops_per_s: float  # of large products, in the run's type
    wide_flops_per_s: float  # in float32
    attention_flops_per_s: float
    half_size: float  # rows or columns
    bytes_per_s: float
    kernel_s: float
    host_instruction_s: float
    product_curve: tuple[tuple[float, float], ...] = ()  # measured: smallest sides, rising, and the share that each reaches
    host_is_device: bool = False  # CPU: what the host needs comes on top

    def efficiency(self, product: Product) -> float:
        """The share of what a large product reaches, from its shape."""
        rows, columns = product.rows, product.columns
        if self.product_curve:
            return share_at(self.product_curve, min(rows, columns, product.inner))
        return rows / (rows + self.half_size) * columns / (columns + self.half_size) if rows and columns else 1.0

    def product_s(self, product: Product) -> float:
        """Without the launch."""
        if product.attention:
            compute_s = product.flops / self.attention_flops_per_s
        else:
            rate = self.wide_flops_per_s if product.wide else self.flops_per_s
            compute_s = product.flops / (rate * self.efficiency(product))
        return max(compute_s, product.num_bytes / self.bytes_per_s)

    def seconds(self, work: Work) -> float:
        """Kernels run one after another; the device waits for a host that takes longer for the instruction.  No kernels: 0, but
        for
        the host's own time where it is the device."""
        products_s = sum(map(self.product_s, work.products))
        kernels_s = products_s + work.moved_bytes / self.bytes_per_s + work.kernels * self.kernel_s
        if self.host_is_device:
            return kernels_s + self.host_instruction_s
        return max(kernels_s, self.host_instruction_s) if work.kernels else 0.0


def share_at(curve: Sequence[tuple[float, float]], size: float) -> float:
    """The share of a large product's rate that a product with this smallest side reaches, a straight line between logarithms.

    What is smaller than all that was measured takes as long as the smallest, what is larger reaches what the largest does.
    `curve`: sizes, rising, and their shares.  No product at all: 1."""
    if not size:
        return 1.0
    sizes = [s for s, _ in curve]
    i = bisect_right(sizes, size)
    if i == 0:
        return curve[0][1] * size / sizes[0]
    if i == len(curve):
        return curve[-1][1]
    (small, low), (large, high) = curve[i - 1], curve[i]
    return low * (high / low) ** (math.log(size / small) / math.log(large / small))


def device_of(cluster: ClusterConfig, dtype: str) -> Device:
    """A device of the cluster that computes in `dtype`.  ValueError for figures that are missing or wrong, and for float64."""
    check_hardware(cluster)
    hardware = cluster.hardware
    peaks = {"float32": hardware.float32_tflops, "bfloat16": hardware.bfloat16_tflops}
    if not peaks.get(dtype):
        known = " or ".join(name for name, tflops in peaks.items() if tflops) or "none"
        raise ValueError(f"conf/cluster/{cluster.name}.yaml gives peaks for {known}, not for {dtype}: change train.dtype")
    peak = peaks[dtype] * 1e12
    return Device(
        flops_per_s=peak * hardware.product_efficiency,
        wide_flops_per_s=hardware.float32_tflops * 1e12 * hardware.product_efficiency,
        attention_flops_per_s=peak * hardware.attention_efficiency,
        half_size=hardware.product_half_size,
        bytes_per_s=hardware.memory_gbyte_s * 1e9 * hardware.memory_efficiency,
        kernel_s=hardware.kernel_us / 1e6,
        host_instruction_s=hardware.host_stage_us / 1e6,
        product_curve=tuple(zip(hardware.product_sizes, hardware.product_shares, strict=True)),
        host_is_device=hardware.host_is_device,
    )


def instruction_seconds(config: PretrainConfig, work: InstructionWork, *, load: float = 1.0) -> Callable[[Instruction], float]:
    """How long each instruction takes on a device of `config.cluster`, emulated or not; instructions that send or wait take the
    host's time
    where the host is the device, and else 0.

    `load`: rows of the experts there as a multiple of the mean; an emulated device is as fast whatever it is.
    ValueError where the cluster's file lacks a figure."""
    emulated = emulated_seconds(config, work.buckets)
    if emulated is not None:
        check_hardware(config.cluster)
        return lambda instruction: emulated(instruction) if instruction.kind is Kind.COMPUTE else 0.0
    device = device_of(config.cluster, config.train.dtype)
    computed_s = once_a_kind(lambda instruction: device.seconds(work(instruction, load)), work.alike)
    return lambda instruction: computed_s(instruction) if instruction.kind is Kind.COMPUTE else device.seconds(Work())


def once_a_kind(
    seconds: Callable[[Instruction], float], alike: Callable[[Instruction], Hashable]
) -> Callable[[Instruction], float]:
    """The same of compute instructions, asked once of each kind of them.  `alike`: the same for those of layers that cost the
    same."""
    known: dict[tuple[Hashable, ...], float] = {}

    def of(instruction: Instruction) -> float:
        i = instruction
        key = (i.phase, i.name, alike(i), i.share, i.chunk[1], i.recompute, i.late)
        if key not in known:
            known[key] = seconds(instruction)
        return known[key]

    return of


def emulated_seconds(
    config: PretrainConfig, buckets: Mapping[str, BucketSpec] | None = None
) -> Callable[[Instruction], float] | None:
    """The costs of compute instructions on the emulated device that `cluster` asks for; None where it asks for none.

    `buckets`: those of the program, whose matrices an optimizer makes orthogonal; None: it has none to make.  Directions take
    their FLOPs at the rate of the device, which is `device_gflops`, or what follows from the times of attention and experts."""
    cluster = config.cluster
    if not (cluster.attention_ms or cluster.experts_ms or cluster.device_gflops):
        return None
    flops = forward_flops(config)
    if cluster.attention_ms or cluster.experts_ms:
        cores = ("attention", "attention_heads", "attention_core", "attention_gathered", "attention_of_heads")
        times = dict.fromkeys(cores, cluster.attention_ms / 1e3)
        times |= dict.fromkeys(("experts", "mlp", "mlp_hidden"), cluster.experts_ms / 1e3)
        timed = [name for name in flops if times.get(name)]
        flops_per_s = sum(flops[name] for name in timed) / sum(times[name] for name in timed) if timed else 0.0
    else:
        flops_per_s = cluster.device_gflops * 1e9
        times = {name: of_name / flops_per_s for name, of_name in flops.items()}
    if flops_per_s:
        times |= {name: of_bucket / flops_per_s for name, of_bucket in newton_schulz_flops(config, buckets or {}).items()}
    return from_full_times(
        lambda name: times.get(name, 0.0), floor_s=cluster.kernel_floor_ms / 1e3, weight_shares=weight_shares(config)
    )


def from_full_times(
    full_s: Callable[[str], float], *, floor_s: float, weight_shares: Mapping[str, float]
) -> Callable[[Instruction], float]:
    """Costs of instructions from the forward times of whole micro-batches.

    `full_s(name)`: the time of an instruction for a whole micro-batch; 0: it isn't emulated and takes as long as here, which
    holds up what comes after it.  A part costs `floor_s` (0: 2% of the full time) and its share of the full time; what has no
    parts, the directions of an optimizer, all of it.
    Backward is twice forward, and once more where activations are computed again.  Weights' gradients that are an instruction of
    their own take `weight_shares` of forward, and backward so much less.
    """

    def seconds(instruction: Instruction) -> float:
        full = full_s(instruction.name)
        if not full:
            return 0.0
        weights = weight_shares[instruction.name] if instruction.late or instruction.phase == "W" else 0.0
        times = {"F": 1.0, "U": 1.0, "W": weights}.get(instruction.phase, 2 + instruction.recompute - weights)
        share = instruction.share / instruction.chunk[1]
        return times * ((floor_s or SMALLEST_SHARE * full) + share * full)

    return seconds
