"""What was measured, as text: figures, how well lines and curves fit, and what nothing was fitted on."""

import statistics
from dataclasses import asdict
from typing import Any

from megalina.config import ClusterConfig
from megalina.measure.figures import Figures, Measured, experts_s, pass_rates
from megalina.perfmodel.cost.instruction_seconds import device_of

BUSY_LOAD = 0.3  # of the cores, before the ranks begin
LEAST_CORE_SHARE = 0.9
WIDE_SPREAD = 0.1  # between two passes, the median over all times


def report(measured: Measured, figures: Figures, cluster: ClusterConfig) -> str:
    return "\n\n".join(filter(None, (_products(measured, figures), _memory(measured, figures), _wires(measured, figures),
                                     _contention(measured), _experts(measured, cluster), _spread(measured))))  # fmt: skip


def warnings(measured: Measured, num_cores: int) -> list[str]:
    """Why these figures should not be trusted."""
    out = []
    if measured.load > BUSY_LOAD * num_cores:
        out.append(f"the machine was busy before this began: load {measured.load:.1f}; the ranks have {num_cores} of its cores")
    if measured.core_share < LEAST_CORE_SHARE:
        out.append(f"a rank had its cores for {measured.core_share:.0%} of the time: something else was running")
    if (spread := statistics.median(measured.spread.values())) > WIDE_SPREAD:
        out.append(f"two passes differ by {spread:.0%} (median): measure again on a quiet machine")
    return out


def as_json(measured: Measured, figures: Figures, cluster: ClusterConfig) -> dict[str, Any]:
    return {"measured": asdict(measured), "figures": asdict(figures), "cluster": asdict(cluster)}


def _products(measured: Measured, figures: Figures) -> str:
    sizes, seconds = measured.sizes, measured.seconds
    heads = "".join(f"{dtype + ' rows':>16}{'columns':>9}{'depth':>9}{'share':>8}" for dtype in measured.dtypes)
    lines = [f"products, GFLOP/s of a rank, by the smallest side; the others are {sizes.large_side}", f"{'side':>6}{heads}"]
    for i, side in enumerate(sizes.sides):
        cells = ""
        for dtype in measured.dtypes:
            rows, columns, depth = (shape.flops / seconds[shape.key] / 1e9 for shape in sizes.products(dtype)[i])
            cells += f"{rows:16.2f}{columns:9.2f}{depth:9.2f}{figures.curves[dtype][i][1]:8.3f}"
        lines.append(f"{side:6}{cells}")
    lines.append(
        f"they differ from the curve by {figures.curve_error:.0%}; the half-size formula, at its best with "
        f"{figures.half_size:.0f}, is off by {figures.half_size_error:.0%} for rows and columns"
    )
    return "\n".join(lines)


def _memory(measured: Measured, figures: Figures) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in pass_rates(measured, figures.kernel_s).items())
    return (
        f"memory: a copy {figures.copy_bytes_per_s / 1e9:.1f} GB/s; the model's passes, as counted: {rates} GB/s\n"
        f"attention {figures.attention_share:.0%} of the best rate; an operation {figures.kernel_s * 1e6:.1f} us; "
        f"the host {figures.host_instruction_s * 1e6:.0f} us an instruction"
    )


def _wires(measured: Measured, figures: Figures) -> str:
    titles = {"inside": "inside a node", "over": "over nodes"}
    lines: list[str] = []
    for where, wire in figures.wires.items():
        lines.append(f"{titles[where]}: alone, latency + bytes of the whole tensor, and the root mean square error of the fit")
        for op, own in wire.own.items():
            rate = f"{1 / own.s_per_byte / 1e9:8.2f} GB/s" if own.s_per_byte else "  no slope"
            errors = f"{own.error:5.0%}; by the one line below {wire.errors[op]:5.0%}"
            lines.append(f"  {op:15}{own.latency_s * 1e6:8.0f} us  {rate}  {errors}")
        lines.append(f"  one line for all: {wire.hop_s * 1e6:.0f} us a message, {wire.bytes_per_s / 1e9:.2f} GB/s")
    return "\n".join(lines)


def _contention(measured: Measured) -> str:
    lines = []
    for what, found in measured.contention.items():
        times = f"{found['median']:.2f} (median), {found['p95']:.2f} (p95)" if found["count"] else "nothing"
        lines.append(f"{what} on another group, time over time alone: {times} of {found['count']} that were together")
    return "\n".join(lines)


def _experts(measured: Measured, cluster: ClusterConfig) -> str:
    own, sizes = measured.dtypes[0], measured.sizes
    device = device_of(cluster, own)
    lines = [f"held out: {sizes.num_experts} experts, {sizes.d_model} x {sizes.d_ff}, forward and backward, by the figures above"]
    for rows, took_s in experts_s(measured).items():
        work = sizes.experts(own, rows)
        found_s = device.seconds(work) - (device.host_instruction_s if device.host_is_device else 0.0)
        times = f"measured {took_s * 1e3:8.3f} ms, predicted {found_s * 1e3:8.3f} ms"
        lines.append(f"  {rows:5} rows each: {times}, {found_s / took_s - 1:+.0%}")
    return "\n".join(lines)


def _spread(measured: Measured) -> str:
    spread = measured.spread
    worst = max(spread, key=lambda key: spread[key])
    return (
        f"two passes: the slower one is {statistics.median(spread.values()):.1%} slower (median over {len(spread)} times), "
        f"at most {spread[worst]:.0%} ({worst}); ranks had their cores for {measured.core_share:.0%} of the time; "
        f"load before {measured.load:.1f}"
    )
