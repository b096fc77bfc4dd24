"""A cluster's file from what was measured: every figure says how it was found."""

import statistics
from collections.abc import Iterable

from megalina.config import ClusterConfig, HardwareConfig
from megalina.measure.figures import Figures, Measured

SOURCES = {  # what isn't below
    "nics_per_node": "the node's rate was measured, not its adapters",
    "oversubscription": "rates were measured as the network gives them",
    "collective_efficiency": "rates are what collectives reached",
    "product_efficiency": "the peak is what the best product reached",
}


def cluster_of(name: str, measured: Measured, figures: Figures) -> ClusterConfig:
    """The configuration that the file stands for."""
    own = measured.dtypes[0]
    inside, over = figures.wires.get("inside"), figures.wires.get("over")
    fast_bytes_per_s = inside.bytes_per_s if inside else figures.copy_bytes_per_s
    link_bytes_per_s = over.bytes_per_s if over else fast_bytes_per_s
    tflops = {dtype: figures.flops_per_s.get(dtype, figures.flops_per_s[own]) / 1e12 for dtype in ("float32", "bfloat16")}
    hardware = HardwareConfig(
        memory_gib=_rounded(measured.memory_gib),
        memory_gbyte_s=_rounded(figures.memory_bytes_per_s / 1e9),
        memory_efficiency=_rounded(figures.pass_bytes_per_s / figures.memory_bytes_per_s),
        float32_tflops=_rounded(tflops["float32"]),
        bfloat16_tflops=_rounded(tflops["bfloat16"]),
        product_efficiency=1.0,
        product_half_size=_rounded(figures.half_size),
        product_sizes=[size for size, _ in figures.curves[own]],
        product_shares=[_rounded(share) for _, share in figures.curves[own]],
        attention_efficiency=_rounded(figures.attention_share),
        kernel_us=_rounded(figures.kernel_s * 1e6),
        host_stage_us=_rounded(figures.host_instruction_s * 1e6),
        host_is_device=measured.kind == "cpu",
        domain_ranks=measured.ranks_per_node,
        domain_gbyte_s=_rounded(fast_bytes_per_s / 1e9),
        domain_latency_us=_rounded(inside.hop_s * 1e6 if inside else 0.0),
        nics_per_node=1,
        oversubscription=1.0,
        collective_efficiency=1.0,
    )
    return ClusterConfig(
        name=name,
        peak_tflops=_rounded(tflops[own]),
        nodes=measured.nodes,
        ranks_per_node=measured.ranks_per_node,
        link_gbit=_rounded(link_bytes_per_s * 8 / 1e9),
        latency_us=_rounded(over.hop_s * 1e6 if over else 0.0),
        hardware=hardware,
    )


def cluster_file(name: str, measured: Measured, figures: Figures, *, day: str, command: str) -> str:
    """`day`: when it was measured; `command`: how."""
    cluster, sources = cluster_of(name, measured, figures), sources_of(measured, figures)
    ranks = f"{measured.nodes} x {measured.ranks_per_node} ranks of {measured.threads} threads, all at once as in training"
    passes = f"median {statistics.median(measured.spread.values()):.1%}, at most {max(measured.spread.values()):.0%}"
    lines = [
        f"# This machine, as tools/measure_cluster.py found it: measure yours anew, these are of {measured.device}.",
        f"# Measured {day}: {measured.device}, torch {measured.torch}, {ranks}.",
        f"# Command: {command}",
        f"# Of two passes the faster time counts; they differ by {passes}.",
        f"# Load before it began {measured.load:.1f}; ranks had their cores for {measured.core_share:.0%} of the time.",
    ]
    for what, found in measured.contention.items():
        if found["median"] is not None:
            times = f"{found['median']:.2f} times as long as alone (median; p95 {found['p95']:.2f})"
            lines.append(f"# Measured, and not a figure of the model: {what} takes {times}.")
    lines.append(f"name: {name}")
    for field in ("peak_tflops", "nodes", "ranks_per_node", "link_gbit", "latency_us"):
        lines.append(f"{field}: {plain(getattr(cluster, field))} # {sources[field]}")
    lines.append("hardware:")
    for field in HardwareConfig.__dataclass_fields__:
        lines.append(f"  {field}: {plain(getattr(cluster.hardware, field))} # {sources[field]}")
    return "\n".join(lines) + "\n"


def sources_of(measured: Measured, figures: Figures) -> dict[str, str]:
    """How each figure was found, by its field."""
    own = measured.dtypes[0]
    inside, over = figures.wires.get("inside"), figures.wires.get("over")
    line = "one line through all-to-all, all-reduce, reduce-scatter and all-gather"
    missing = {dtype for dtype in ("float32", "bfloat16") if dtype not in measured.dtypes}
    rate = {
        dtype: f"not measured, {own} stands here" if dtype in missing else "measured: the best of all products, all ranks at once"
        for dtype in ("float32", "bfloat16")
    }
    one_rank = "not measured, there is one rank a node: a copy's rate stands here"
    return SOURCES | {
        "peak_tflops": f"measured: as {own}_tflops",
        "nodes": "measured on so many",
        "ranks_per_node": "measured with so many",
        "link_gbit": f"measured: a node's, {line}, error {_error(over.errors.values())}"
        if over
        else "not measured, there is one node: domain_gbyte_s stands here",
        "latency_us": f"measured: of a message, {line}" if over else "not measured, there is one node",
        "memory_gib": "the machine's, divided by the ranks of a node" if measured.kind == "cpu" else "as the driver says",
        "memory_gbyte_s": f"measured: the most of a copy ({figures.copy_bytes_per_s / 1e9:.3g} GB/s) and the model's own passes",
        "memory_efficiency": "measured: norm, SwiGLU and residual, forward and backward, in bytes that perfmodel/cost counts",
        "float32_tflops": rate["float32"],
        "bfloat16_tflops": rate["bfloat16"],
        "product_half_size": f"measured: the formula's best fit, error {figures.half_size_error:.0%}; the next two replace it",
        "product_sizes": f"measured: smallest sides of products in {own}, the others {measured.sizes.large_side}",
        "product_shares": f"measured: of the best rate; short rows, columns, depths differ by {figures.curve_error:.0%}",
        "attention_efficiency": f"measured: {own}, forward and backward, {measured.sizes.seq_len} tokens",
        "kernel_us": "measured: an operation on next to nothing",
        "host_stage_us": "measured: a step of next to nothing, its operations taken off",
        "host_is_device": "a CPU is" if measured.kind == "cpu" else "a GPU is not",
        "domain_ranks": "measured inside a node of so many ranks",
        "domain_gbyte_s": f"measured: a rank's, {line}, error {_error(inside.errors.values())}" if inside else one_rank,
        "domain_latency_us": f"measured: of a message, {line}" if inside else "not measured, there is one rank a node",
    }


def plain(value: object) -> str:
    """A number as digits and a point, a list in brackets, a truth in YAML's word."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = f"{value:.10f}".rstrip("0")
        return f"{text}0" if text.endswith(".") else text
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    return str(value)


def _rounded(value: float) -> float:
    """Four digits are more than is known."""
    return float(f"{value:.4g}")


def _error(errors: Iterable[float]) -> str:
    return f"{max(errors):.0%} for the worst of them"
