"""What each START of a training step sends, in bytes, from the configuration alone."""

from collections.abc import Callable

from megalina.blocks.sizes import LIMBS
from megalina.collective_log import NUM_RIDERS
from megalina.config import BYTES, PretrainConfig, is_moe_layer
from megalina.perfmodel.cost.stage_bytes import StageBytes
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import Instruction, Op

NUMBER_BYTES = 8  # of a number of rows, and of all that is summed to close a step


def sizes_of(config: PretrainConfig, held: StageBytes) -> Sizes:
    """Routing is even.  `held`: of one rank."""
    return Sizes(bytes_of(config, held), scattered=[name for name, spec in held.buckets.items() if spec.sharded])


def bytes_of(config: PretrainConfig, held: StageBytes) -> Callable[[Instruction], float]:
    """Of a START: the whole tensor that a rank sends (all-to-all: also to itself), sums, or has after a gather."""
    weight_bytes = BYTES[config.train.dtype]
    gradient_bytes = max(weight_bytes, 4)
    experts, moe_layers = config.model.num_experts, sum(is_moe_layer(config.model, i) for i in range(config.model.num_layers))
    loads = moe_layers * (experts + 1 + LIMBS)  # of each layer: rows of each expert, lost choices, a digest
    numbers = {"divisor": 2 + LIMBS, "all_loads": loads, "measured": len(held.blocks.losses) + 2 + NUM_RIDERS + loads}

    def of(instruction: Instruction) -> float:
        elements = instruction.piece[1] - instruction.piece[0]
        match instruction.op:
            case Op.GRADS:
                return elements * gradient_bytes
            case Op.PARAMS:
                return elements * weight_bytes
            case Op.COUNTS:
                return experts * NUMBER_BYTES  # also where one exchange is enough for all layers
            case Op.SUM if instruction.name in numbers:
                return numbers[instruction.name] * NUMBER_BYTES
            case Op.GATHER:
                return held.value(instruction.reads[0], instruction) * held.axes[instruction.axis]
            case _:
                return held.value(instruction.reads[0], instruction)

    return of
