"""What each START of a training step sends, in bytes, from the configuration alone."""

from collections.abc import Callable

from megalina.config import PretrainConfig
from megalina.cost.stage_bytes import StageBytes
from megalina.parameters import BYTES
from megalina.sim.sizes import Sizes
from megalina.step.program import Op, Stage

COUNT_BYTES = 8  # of a number of rows


def sizes_of(config: PretrainConfig, held: StageBytes) -> Sizes:
    """Routing is even.  `held`: of one rank."""
    return Sizes(bytes_of(config, held), scattered=[name for name, spec in held.buckets.items() if spec.sharded])


def bytes_of(config: PretrainConfig, held: StageBytes) -> Callable[[Stage], float]:
    """Of a START: the whole tensor that a rank sends (all-to-all: also to itself), sums, or has after a gather."""
    weight_bytes = BYTES[config.train.dtype]
    gradient_bytes = max(weight_bytes, 4)
    layers = config.model.num_layers if config.router.kind == "expert_choice" else 1  # told at once, see `Shape.equal_counts`

    def of(stage: Stage) -> float:
        elements = stage.piece[1] - stage.piece[0]
        match stage.op:
            case Op.GRADS:
                return elements * gradient_bytes
            case Op.PARAMS:
                return elements * weight_bytes
            case Op.COUNTS:
                return config.model.num_experts * layers * COUNT_BYTES
            case Op.GATHER:
                return held.value(stage.reads[0], stage) * held.axes[stage.axis]
            case _:
                return held.value(stage.reads[0], stage)

    return of
