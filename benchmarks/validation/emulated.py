"""A step on an emulated cluster, simulated: devices take the times that they are given, links are slow, and the host is real.

Several ranks share a core there, so what the host does between two waits (small math, sockets, Python) is no trifle.  It has a
clock of its own in the walk, and costs a few constants that are fitted on measured steps (`benchmarks/validate_simulator.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_seconds import emulated_seconds, once_a_kind
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline, priced
from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.virtual import Timeline
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Kind, Op


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConstants:
    """What a rank's host and its sockets take.  All are fitted."""

    flops_per_s: float  # of the real math, which an emulated device hides if it can
    bytes_per_s: float  # of its tensors
    kernel_s: float  # of each operation of an instruction
    stage_s: float  # of each instruction besides
    outside_s: float  # of a step, besides its list: the batch, the verdict
    link_efficiency: float  # share of a link's rate that collectives reach
    all_to_all_s: float  # of each all-to-all, whatever its size
    collective_s: float  # of each other collective
    hop_s: float  # of each message that waits for another one
    sum_weight: float  # what a flow of a ring gets of a link that it shares with one of an all-to-all, which gets 1


def simulate_emulated(
    config: PretrainConfig,
    plan: Plan,
    *,
    nodes: int,
    ranks_per_node: int,
    link_mbit: float,
    vocab_size: int,
    host: HostConstants,
    tokens_first: bool = False,
) -> Timeline:
    """One step of `nodes` emulated nodes, of a pipeline with all its micro-batches.

    `tokens_first`: links, which the emulated ones can't, let all-to-alls pass everything else.  ValueError where the
    configuration emulates no device."""
    step = priced(config, nodes * ranks_per_node, plan, vocab_size=vocab_size)
    of_device = emulated_seconds(config, step.held.buckets)
    if of_device is None:
        raise ValueError("no device is emulated: give cluster.attention_ms and cluster.experts_ms, or cluster.device_gflops")
    network = Network(
        nic_bytes_per_s=link_mbit * 1e6 / 8 * host.link_efficiency,
        ranks_per_node=ranks_per_node,
        latency_s=host.collective_s,
        all_to_all_s=host.all_to_all_s,
        reduce_scatter="direct",  # gloo's own costs a whole all-reduce, see megalina/comm/exchange.py
        hop_s=host.hop_s,
        fast_hop_s=host.hop_s,
        weight=host.sum_weight,
        at_once=2,  # gloo's threads of a group
        first=((Op.TOKENS,),) if tokens_first else (),
    )

    def seconds(instruction: Instruction) -> float:
        return of_device(instruction) if instruction.kind is Kind.COMPUTE else 0.0

    of_host = _host_seconds(step.work, host)
    if isinstance(step, PricedPipeline):
        timeline = step.walk(step.micro_batches, network=network, seconds=seconds, host=of_host)
    else:
        timeline = step.walk(network, seconds=seconds, host=of_host)
    return replace(timeline, step_s=timeline.step_s + host.outside_s)


def _host_seconds(work: InstructionWork, host: HostConstants) -> Callable[[Instruction], float]:
    def computed_s(instruction: Instruction) -> float:
        asked = work(instruction)
        math_s = asked.flops / host.flops_per_s + asked.num_bytes / host.bytes_per_s
        return math_s + asked.kernels * host.kernel_s + host.stage_s

    known_s = once_a_kind(computed_s, work.alike)
    return lambda instruction: known_s(instruction) if instruction.kind is Kind.COMPUTE else host.stage_s
