"""Parts inside of cells: the layers of a stage walk in parts of a micro-batch, as a range of a partition does.

A part is some of the micro-batch's sequences.  A stage begins and ends whole, so what goes to the next one stays one message a
micro-batch: the cell that reads it needs all parts, and a message a part would be as many latencies more.
"""

from collections.abc import Sequence

from megalina.step.partition import Range, partition, ranges_from, widest
from megalina.step.pipeline.stages import StageLayers
from megalina.step.program import Program


def in_stages(
    forward: Program,
    text: str,
    stages: Sequence[StageLayers],
    rank_of: Sequence[int],
    *,
    one_group: bool = False,
    whole_routers: bool = False,
) -> Program:
    """The forward pass of one micro-batch, whose layers have counts of their own, with each stage's layers in parts.

    `text`: a number of parts, for ranges as wide as stages and routers allow, or ranges (`megalina.step.partition.ranges_from`);
    `rank_of`: each stage's pipeline rank.  ValueError as `partition`, and for a range that crosses a border of stages."""
    stage_of = {layer: number for number, stage in enumerate(stages) for layer in stage.layers}
    found = ranges_from(text)
    if isinstance(found, int):
        parts = found
        of_stages = [tuple(s for s in forward if stage_of.get(s.layer, -1) == number) for number in range(len(stages))]
        placed = [(r, n) for n, own in enumerate(of_stages) for r in widest(own, parts, whole_routers=whole_routers)]
    else:
        placed = [(r, _stage(r, stages, stage_of)) for r in found]
    return partition(
        forward,
        [r for r, _ in placed],
        one_group=one_group,
        whole_routers=whole_routers,
        places=[(stage, rank_of[stage]) for _, stage in placed],
    )


def _stage(r: Range, stages: Sequence[StageLayers], stage_of: dict[int, int]) -> int:
    """In which a range is."""
    first, last = (stage_of.get(int(name.rpartition(".")[2]), -1) for name in (r.first, r.last))
    if first != last:
        layers = stages[first].layers
        raise ValueError(
            f"strategy.partition: {r} begins in stage {first} of the pipeline, which has layers {layers[0]} to {layers[-1]}, and "
            f"ends in stage {last}: end it with layer {layers[-1]}, and begin another one behind it"
        )
    return first
