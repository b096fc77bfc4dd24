"""Guards: what a step's own numbers say of a run that goes wrong.  All ranks see the same numbers, so all judge alike.

Spikes, losses that have jumped away from the last ones: a robust z-score (Iglewicz and Hoaglin, 1993): the distance from the
median of a window of losses, over 1.4826 times the median distance from it, which for normal values is their standard deviation.
One bad value moves neither."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalina.config import GuardConfig
from megalina.parallel.step_result import StepResult

DEAD_STEPS = 3  # in a row; at a usual spread of first weights the loss is off ln(vocabulary) by a thousandth
SAME = 1e-6  # relative: float32 has seven digits
WINDOW_STEPS = 100  # an expert without a token in so many steps is dead
LOW_STEPS = 10  # a layer whose entropy is low in so many steps in a row has collapsed


class SpikeGuard:
    """Knows the losses of the last `guard.window` updates.  All ranks see the same losses, so all judge alike."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)

    def is_spike(self, loss: float) -> bool:
        """Never with `guard.spike=none`, and not before a quarter of the window is there."""
        return self.config.spike != "none" and self.rise(loss) > self.config.min_rise and self.score(loss) > self.config.threshold

    def rise(self, loss: float) -> float:
        """Nats above the median; 0 while there are too few losses to say."""
        if len(self._losses) < max(2, self.config.window // 4):
            return 0.0
        return loss - statistics.median(self._losses)

    def score(self, loss: float) -> float:
        """Robust standard deviations above the median; 0 while there are too few losses to say."""
        if len(self._losses) < max(2, self.config.window // 4):
            return 0.0
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in self._losses)
        return (loss - median) / max(deviation, 1e-12)

    def accept(self, loss: float) -> None:
        """The loss of a step whose update was made."""
        self._losses.append(loss)

    def state(self) -> list[float]:
        return list(self._losses)

    def load(self, losses: Sequence[float]) -> None:
        self._losses = deque(losses, maxlen=self.config.window)


class DeadModel:
    """Counts the steps in a row in which the model was dead: every word equally likely, or not one gradient.

    Weights whose squares overflow do that: a norm divides by infinity, so logits are all zero, the loss is exactly
    ln(vocabulary), and no step changes it any more."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._steps = 0

    @property
    def dead(self) -> bool:
        return self._steps >= DEAD_STEPS

    def warnings(self, result: StepResult) -> list[str]:
        """A line when the model has been dead for `DEAD_STEPS` steps; again if it has been alive in between."""
        if not math.isfinite(result.loss):  # which is reported elsewhere
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


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One number a MoE layer, in order."""

    load_max_over_mean: list[float]  # 1: even; E: one expert gets everything
    load_entropy: list[float]  # of the shares, over log E: 1 is even, 0 is one expert
    dropped_fraction: list[float]  # choices lost to capacity
    dead_experts: list[int]
    expert_load: list[list[float]]  # shares, [layer][expert]


class LoadWatch:
    """What a step's counts say of experts' load in each MoE layer; remembers when each expert last got a token."""

    def __init__(self, num_layers: int, num_experts: int):
        self._last_step_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._low_steps_L = [0] * num_layers
        self._dead_L = [0] * num_layers

    def report(self, step: int, loads: Tensor) -> LoadReport:
        """`loads`, int64 [L, E + 1]: tokens that chose each expert, choices lost to capacity."""
        chosen_LE, dropped_L = loads[:, :-1], loads[:, -1]
        self._last_step_LE[chosen_LE > 0] = step
        total_L1 = chosen_LE.sum(1, keepdim=True).clamp(min=1)
        share_LE = chosen_LE.double() / total_L1
        num_experts = max(share_LE.shape[1], 2)
        entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(1) / torch.tensor(float(num_experts)).log()
        return LoadReport(
            (share_LE.amax(1) * share_LE.shape[1]).tolist() if share_LE.numel() else [],
            entropy_L.tolist(),
            (dropped_L.double() / total_L1.squeeze(1)).tolist(),
            (step - self._last_step_LE >= WINDOW_STEPS).sum(1).tolist(),
            share_LE.tolist(),
        )

    def warnings(self, report: LoadReport, *, moe_layers: Sequence[int], min_entropy: float) -> list[str]:
        """What has got worse with this step: a layer whose router has collapsed, an expert that has died.  Each is said once,
        and again if it has been better in between."""
        found = []
        for i, layer in enumerate(moe_layers):
            entropy, dead = report.load_entropy[i], report.dead_experts[i]
            self._low_steps_L[i] = self._low_steps_L[i] + 1 if entropy < min_entropy else 0
            if self._low_steps_L[i] == LOW_STEPS:
                found.append(
                    f"layer {layer}: the router has collapsed: its load has had an entropy below {min_entropy:g} "
                    f"(guard.min_entropy; 1 is even, now {entropy:.2f}) for {LOW_STEPS} steps, the fullest expert has "
                    f"{report.load_max_over_mean[i]:.1f} times its share; try a higher router.balance_loss or a lower optim.lr"
                )
            if dead > self._dead_L[i]:
                found.append(f"layer {layer}: {dead} expert(s) have had no token for {WINDOW_STEPS} steps")
            self._dead_L[i] = dead
        return found

    def state(self) -> list[list[int]]:
        return self._last_step_LE.tolist()

    def load(self, state: list[list[int]]) -> None:
        self._last_step_LE = torch.tensor(state, dtype=torch.int64).view_as(self._last_step_LE)
