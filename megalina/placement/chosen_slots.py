"""Chosen slots: which slot each of a rank's choices goes to, once it is decided how many of an expert's rows go to each device.

A rank's rows of an expert go to the devices in turn of their numbers, earlier tokens first; of two slots of one device with the
same expert the first has them.  All ranks and the simulator decide alike, from numbers alone.

T tokens, K choices a token, E experts, N devices, S slots a device, Q = N x S slots in all.
"""

import numpy as np
from numpy.typing import NDArray

from megalina.placement.placement import EMPTY, Placement
from megalina.placement.predictors.predictor import Ids

Numbers = NDArray[np.int64]


def first_slots(placement: Placement) -> Numbers:
    """[E, N]: of all Q slots the one that has an expert on a device; -1: none."""
    slot_EN = np.full((placement.num_experts, placement.num_devices), -1)
    for device, experts in enumerate(placement.slots):
        for slot in reversed(range(placement.slots_per_device)):
            if experts[slot] != EMPTY:
                slot_EN[experts[slot], device] = device * placement.slots_per_device + slot
    return slot_EN


def chosen_slots(chosen_TK: Ids, split_EN: Numbers, slot_EN: Numbers, num_slots: int) -> Numbers:
    """[T, K], of all Q = `num_slots` slots; Q: nobody, as is an expert E.  `split_EN`: this rank's rows of each expert for each
    device, whose sums are its numbers of choices."""
    flat = chosen_TK.reshape(-1)
    by_expert_n = np.argsort(flat, kind="stable")[: int(split_EN.sum())]
    slot = np.full(flat.shape, num_slots, np.int64)
    slot[by_expert_n] = np.repeat(slot_EN.ravel(), split_EN.ravel())
    return slot.reshape(chosen_TK.shape)


def rows_once(slot_TK: Numbers, num_devices: int, slots_per_device: int) -> Numbers:
    """[N]: tokens that have a choice on each device."""
    device_TK = np.where(slot_TK < num_devices * slots_per_device, slot_TK // slots_per_device, num_devices)
    visits_TN = np.zeros((len(slot_TK), num_devices + 1), bool)
    np.put_along_axis(visits_TN, device_TK, True, 1)
    rows_N: Numbers = visits_TN[:, :num_devices].sum(0)
    return rows_N
