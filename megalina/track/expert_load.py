"""Expert load over time: for some steps, the share of each MoE layer's tokens that each expert got.

T snapshots, L MoE layers, E experts.  Shares of a layer sum to one; a balanced expert has 1 / E.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_SNAPSHOTS = 200


def keep_snapshot(step: int, total_steps: int) -> bool:
    """Whether this step's expert load is stored: about `MAX_SNAPSHOTS` a run, evenly spaced, and the last.

    A function of the step alone, so a run that was cut into pieces stores what an uninterrupted one does.
    """
    stride = -(-total_steps // MAX_SNAPSHOTS)
    return step == total_steps or step % max(stride, 1) == 0


def short_shares(shares_LE: Sequence[Sequence[float]]) -> list[list[float]]:
    """Shares with five significant digits: enough for a picture, a third of the size."""
    return [[float(f"{share:.5g}") for share in layer] for layer in shares_LE]


def layer_numbers(model: Mapping[str, Any], num_moe_layers: int) -> list[int]:
    """The model's numbers (from 0) of its MoE layers, as `ModelConfig` places them.

    A model section that says nothing of them, or of another count, gives 0, 1, ...
    """
    first, every = int(model.get("dense_layers_first", 0)), max(int(model.get("moe_every", 1)), 1)
    numbers = [layer for layer in range(first, int(model.get("num_layers", 0))) if (layer - first + 1) % every == 0]
    return numbers if len(numbers) == num_moe_layers else list(range(num_moe_layers))


@dataclass(frozen=True, slots=True)
class LoadHistory:
    steps: list[int]
    share_TLE: np.ndarray  # float64

    @staticmethod
    def of(records: Sequence[Mapping[str, Any]]) -> "LoadHistory | None":
        """From the records that hold `expert_load` (layer x expert shares); None: no record does."""
        found = [(record["step"], record["expert_load"]) for record in records if record.get("expert_load")]
        if not found:
            return None
        shares = np.array([load for _, load in found], dtype=np.float64)  # a number that was not finite is None, here nan
        return LoadHistory([step for step, _ in found], np.nan_to_num(shares))

    @property
    def ratio_TLE(self) -> np.ndarray:
        """Share over balanced share: 1 is balanced, 0 no token."""
        return self.share_TLE * self.share_TLE.shape[-1]
