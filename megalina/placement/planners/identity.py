"""Identity: experts sit in blocks by their number, as in training; popularity is not looked at.

Shapes: E experts.
"""

from megalina.placement.placement import EMPTY, Placement, checked_share
from megalina.placement.predictors.predictor import Floats


def identity(share_E: Floats, num_devices: int, slots_per_device: int) -> Placement:
    """Device d of N holds experts d*E/N up to (d+1)*E/N; further slots stay empty.

    Where N does not divide E, training has no such layout; then the first E mod N devices hold one expert more than the others.
    ValueError where experts lack room."""
    num_experts = len(checked_share(share_E, num_devices, slots_per_device))
    least, more = divmod(num_experts, num_devices)
    slots, begin = [], 0
    for device in range(num_devices):
        end = begin + least + (device < more)
        slots.append((*range(begin, end), *[EMPTY] * (slots_per_device - (end - begin))))
        begin = end
    return Placement(num_experts, tuple(slots))
