"""The watch over a model that has stopped to say anything: every word equally likely, or not one gradient.

Weights whose squares overflow do that: a norm divides by infinity, so logits are all zero, the loss is exactly ln(vocabulary),
and no step changes it any more.  What is looked at is the step's own reduction, so all ranks decide alike."""

import math

from megalina.parallel.step_result import StepResult

DEAD_STEPS = 3  # in a row; at a usual spread of first weights the loss is off ln(vocabulary) by a thousandth
SAME = 1e-6  # relative: float32 has seven digits


class DeadModel:
    """Counts the steps in a row in which the model was dead."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._steps = 0

    @property
    def dead(self) -> bool:
        return self._steps >= DEAD_STEPS

    def warnings(self, result: StepResult) -> list[str]:
        """A line when the model has been dead for `DEAD_STEPS` steps; again if it has been alive in between."""
        if not math.isfinite(result.loss):  # which is told elsewhere
            return []
        even = math.log(self._vocab_size)
        says_nothing = self._vocab_size > 1 and abs(result.loss - even) <= SAME * even
        learns_nothing = result.grad_norm == 0
        self._steps = self._steps + 1 if says_nothing or learns_nothing else 0
        if self._steps != DEAD_STEPS:
            return []
        what = [f"its loss is ln(vocabulary {self._vocab_size}) = {even:.6f} to the last digits"] if says_nothing else []
        what += ["all its gradients are zero"] if learns_nothing else []
        return [
            f"the model is dead: for {DEAD_STEPS} steps {' and '.join(what)}; it learns nothing any more: go back to an older "
            "checkpoint, or start anew, with a lower optim.lr or model.init_std"
        ]
