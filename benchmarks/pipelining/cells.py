"""What a pipeline's cells take on an emulated device: the time of the instructions of their layers."""

from collections.abc import Callable, Mapping

from megalina.blocks.pipelined import pipelined
from megalina.config import BYTES, PretrainConfig, is_moe_layer
from megalina.perfmodel.cost.instruction_seconds import emulated_seconds
from megalina.step.pipeline.walk import Times, walk
from megalina.step.program import Instruction, Kind

CELL = "cell"


def cell_seconds(config: PretrainConfig, layers_of: Mapping[int, tuple[int, ...]]) -> Callable[[Instruction], float] | None:
    """What a cell takes on the emulated device that `cluster` asks for; None where it asks for none.  A cell is an instruction
    here, named CELL: `phase`, its stage as `layer`, and `late` where a backward leaves out the gradients of weights.  Others take
    what they take in a list."""
    seconds = emulated_seconds(config)
    if seconds is None:
        return None

    def of(cell: Instruction) -> float:
        if cell.name != CELL:
            return seconds(cell)
        out = 0.0
        for layer in layers_of[cell.layer]:
            for name in ("attention", "experts" if is_moe_layer(config.model, layer) else "mlp"):
                out += seconds(Instruction(cell.phase, cell.kind, name, layer, late=cell.late))
        return out

    return of


def walk_s(config: PretrainConfig, *, link_mbit: float, ranks_per_node: int = 1) -> float | None:
    """A step of a pipeline's lists in virtual time, where nothing takes time but cells and messages; None without an emulated
    device.  Each node has stages of its own, whose ranks share its link (`link_mbit`; 0: messages take no time)."""
    job = pipelined(config, config.parallel.pp * ranks_per_node)
    seconds = cell_seconds(config, {number: stage.layers for number, stage in enumerate(job.stages)})
    if seconds is None:
        return None
    cells = (("F", False), ("B", True), ("W", False))
    forward, inputs, weights = (
        [seconds(Instruction(phase, Kind.COMPUTE, CELL, number, late=late)) for number in range(len(job.stages))]
        for phase, late in cells
    )
    ranks, train = job.ranks, config.train
    stream_bytes = train.micro_batch_size * train.seq_len * config.model.d_model * BYTES[train.dtype]
    times = Times(
        forward=sum(forward) / ranks,
        inputs=sum(inputs) / ranks,
        weights=sum(weights) / ranks,
        message=stream_bytes * ranks_per_node / (link_mbit * 1e6 / 8) if link_mbit else 0.0,
        shares=tuple(of * ranks / sum(forward) for of in forward),
    )
    return walk(job.pipeline, times).makespan
