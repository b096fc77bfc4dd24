"""The watch over experts' load: what a step's counts say of each MoE layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW_STEPS = 100  # an expert without a token in so many steps is dead
LOW_STEPS = 10  # a layer whose entropy is low in so many steps in a row has collapsed


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One number a MoE layer, in order."""

    load_max_over_mean: list[float]  # 1: even; E: one expert gets everything
    load_entropy: list[float]  # of the shares, over log E: 1 is even, 0 is one expert
    dropped_fraction: list[float]  # choices lost to capacity
    dead_experts: list[int]
    expert_load: list[list[float]]  # shares, [layer][expert]


class LoadWatch:
    """Remembers when each expert last got a token."""

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
