"""The origin of a value that is not finite: the first instruction of the forward pass that makes one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.parallel.executor import Executor
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction

NOWHERE = 1 << 40


def first_bad_stage(trainable: Trainable, batch: Batch) -> tuple[int, str]:
    """Run the forward passes of `batch` again, with the weights as they are; all ranks together.

    Returns the place in order of this rank's first instruction whose output is not finite, and its tag; (NOWHERE, "") if all are.
    """
    found = (NOWHERE, "")
    place = 0

    def watched(instruction: Instruction) -> Callable[..., Any]:
        function = trainable.functions(instruction)

        def run(*arguments: Any) -> Any:
            nonlocal found, place
            place += 1
            out = function(*arguments)
            values = out if isinstance(out, tuple) else (out,)
            bad = any(isinstance(v, Tensor) and v.is_floating_point() and not v.isfinite().all() for v in values)
            if bad and found[0] == NOWHERE:
                found = place, instruction.tag
            return out

        return run

    executor = Executor(trainable.evaluation_program, watched, trainable.mesh, trainable.buckets, log=trainable.log)
    trainable.gpt.train()
    with torch.no_grad():
        for part in batch.split(trainable.micro_batch_size):
            executor.run({"#batch.-.0": part})
    return found
