"""Emulation at inference: devices that take the time they are given, and the words that must stand on every figure.

A device's time follows what it really has to do: attention its own tokens, experts the rows that came.  The arithmetic, routing,
planning, exchanges and fetches are real.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megalina.blocks.routers import visited
from megalina.config import ClusterConfig, ModelConfig, PretrainConfig, RouterConfig, TrainConfig
from megalina.nearest import nearest
from megalina.parallel.emulated_device import SMALLEST_SHARE, ServingDevice, emulated_device
from megalina.step.program import Instruction, Kind

KEYS = ("device_gflops", "attention_ms", "experts_ms", "kernel_floor_ms")
EMULATED_INSTRUCTIONS = ("attention", "mlp", "experts", "shared")
REAL = "nothing is emulated: ranks are processes that share their node's cores, memory and loopback"


@dataclass(frozen=True, slots=True)
class FullBatch:
    """What a device takes for a whole batch of its own, rows spread evenly."""

    seconds: Mapping[str, float]  # by instruction
    floor_s: float  # of an instruction, besides its share; 0: 2% of the whole batch's time
    tokens: int
    rows: int  # that its experts get

    @property
    def row_us(self) -> float:
        """What a row more costs in a MoE layer."""
        return 1e6 * self.seconds["experts"] / self.rows

    def seconds_of(self, instruction: Instruction, tokens: int, rows: int) -> float:
        """Of a batch with so many tokens here, and of experts with so many rows."""
        whole_s = self.seconds.get(instruction.name, 0.0)
        if not whole_s:
            return 0.0
        share = rows / self.rows if instruction.name == "experts" else tokens / self.tokens
        return (self.floor_s or SMALLEST_SHARE * whole_s) + share * whole_s


def read_cluster(overrides: Sequence[str]) -> ClusterConfig:
    """The device that `cluster.KEY=VALUE` asks for; all zero: none.  ValueError for another key, for what is no number, and for
    rates and times together."""
    values: dict[str, float] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        name = key.removeprefix("cluster.")
        if name not in KEYS:
            raise ValueError(
                f"{text}: an evaluation emulates devices by cluster.{', cluster.'.join(KEYS)}{nearest(name, list(KEYS))}; links "
                "are emulated by tools/emulate_cluster.py"
            )
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = -1.0
        if not 0 <= values[name] < 1e15:  # nan is neither
            raise ValueError(f"{text}: {key} must be a number from 0 on, not {value!r}")
    cluster = ClusterConfig()
    for name, number in values.items():
        setattr(cluster, name, number)
    if bool(cluster.attention_ms) != bool(cluster.experts_ms):
        raise ValueError(
            f"cluster.attention_ms ({cluster.attention_ms:g}) and cluster.experts_ms ({cluster.experts_ms:g}) go together: give "
            "both"
        )
    if cluster.device_gflops and cluster.attention_ms:
        raise ValueError("cluster.device_gflops and cluster.attention_ms exclude each other: give rates or times")
    if cluster.kernel_floor_ms and not is_emulated(cluster):
        raise ValueError(
            "cluster.kernel_floor_ms alone emulates no device: give cluster.device_gflops, or attention_ms and experts_ms"
        )
    return cluster


def is_emulated(cluster: ClusterConfig) -> bool:
    return bool(cluster.device_gflops or cluster.attention_ms)


def full_batch(
    cluster: ClusterConfig, model: ModelConfig, router: RouterConfig, *, sequences: int, length: int
) -> FullBatch | None:
    """Of `sequences` of `length` tokens; None where no device is emulated."""
    train = TrainConfig(micro_batch_size=sequences, seq_len=length)
    without_floor = replace(cluster, kernel_floor_ms=0.0)
    device = emulated_device(PretrainConfig(model=model, router=router, cluster=without_floor, train=train))
    if device is None:
        return None
    instructions = {name: Instruction("F", Kind.COMPUTE, name, 0, "0", (), ()) for name in EMULATED_INSTRUCTIONS}
    times = {name: device.seconds(instruction) / (1 + SMALLEST_SHARE) for name, instruction in instructions.items()}
    return FullBatch(
        times, cluster.kernel_floor_ms / 1e3, sequences * length, sequences * length * visited(router, model.num_experts)
    )


def device_of(full: FullBatch | None) -> ServingDevice | None:
    """A new one; None: the real one."""
    return None if full is None else ServingDevice(full.seconds_of)


def emulated_parts(full: FullBatch | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """For eval.json: `device_ms` of a layer's instructions (None: real), `link_mbit` (0: real), `slowdown`, as
    tools/emulate_cluster.py tells its ranks."""
    return {
        "device_ms": {name: 1e3 * s for name, s in full.seconds.items() if s} if full is not None else None,
        "link_mbit": float(environ.get("MEGALINA_LINK_MBIT", 0)),
        "slowdown": float(environ.get("MEGALINA_SLOWDOWN", 1)),
    }


def emulation_note(parts: Mapping[str, Any]) -> str:
    """What must stand on every figure."""
    told = []
    if parts["device_ms"]:
        shown = ", ".join(f"{name} {ms:.3g} ms" for name, ms in parts["device_ms"].items() if name in ("attention", "experts"))
        told.append(f"devices ({shown} a layer for a whole batch, experts in proportion to their rows)")
    if parts["link_mbit"]:
        told.append(f"links between nodes ({parts['link_mbit']:g} Mbit/s each way)")
    if not told:
        return REAL
    dilated = f", all times {parts['slowdown']:g}x dilated" if parts["slowdown"] != 1 else ""
    real = "" if parts["device_ms"] else "devices, which are processes that share this machine's cores, "
    return (
        f"emulated: {' and '.join(told)}{dilated}; measured as they are here: {real}routing, planning, fetches from host "
        "memory. Ratios count, not the milliseconds."
    )
