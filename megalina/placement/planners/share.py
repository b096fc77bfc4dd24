"""An expected share of rows, as planners take it: checked, and scaled to sum 1.

Shapes: E experts.
"""

import numpy as np

from megalina.placement.placement import check_room
from megalina.placement.predictors.predictor import Floats


def checked_share(share_E: Floats, num_devices: int, slots_per_device: int) -> Floats:
    """`share_E` as float64 [E] in its own scale.  ValueError where a share is below 0 or not a number, or experts lack room."""
    share_E = np.asarray(share_E, np.float64)
    if share_E.ndim != 1 or not len(share_E):
        raise ValueError(f"shares have shape {share_E.shape}: give one number an expert, of at least one expert")
    if not (np.isfinite(share_E) & (share_E >= 0)).all():
        wrong = int(np.flatnonzero(~(np.isfinite(share_E) & (share_E >= 0)))[0])
        raise ValueError(f"expert {wrong} is expected to get a share of {share_E[wrong]}: shares must be finite and at least 0")
    check_room(len(share_E), num_devices, slots_per_device)
    return share_E


def scaled_share(share_E: Floats, num_devices: int, slots_per_device: int) -> Floats:
    """`share_E` scaled to sum 1, [E]; all zero means that nothing is known: uniform.  Errors as `checked_share`."""
    share_E = checked_share(share_E, num_devices, slots_per_device)
    largest = share_E.max()
    if largest == 0:
        return np.full(len(share_E), 1 / len(share_E))
    share_E = share_E / largest  # first, since the sum of very large numbers is infinite
    return share_E / share_E.sum()
