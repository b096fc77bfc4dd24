"""Balanced order: which experts change places so that no rank has much more to do than another.

Tokens choose experts unevenly, and a step ends when the rank with most rows does.  From the rows that each expert has had, the
busiest rank exchanges an expert for a less busy one of another rank, again and again, as long as that pays: few experts move,
and where loads are even none does.  In the manner of SmartMoE (Zhai et al., ATC'23), which places experts by their loads during
training, and of DeepSeek's EPLB without its replicas.  In integers alone, so that all ranks come to the same order.

E experts, R ranks of E / R experts each.
"""

import numpy as np
from numpy.typing import NDArray

from megalina.placement.expert_order import Order

LEAST_GAIN = 100  # an exchange must take a hundredth of a rank's mean load off the busiest one: less is chance


def balanced_order(load_E: NDArray[np.int64], ranks: int, present: Order) -> Order:
    """The expert in each place: `present` after exchanges.  `load_E`: rows of each expert.

    ValueError unless ranks hold equally many experts."""
    if len(load_E) % ranks or sorted(present) != list(range(len(load_E))):
        raise ValueError(f"{len(load_E)} experts in the order {present} can't be cut over {ranks} ranks, equally many on each")
    held_RS = np.array(present).reshape(ranks, -1)
    least = max(1, int(load_E.sum()) // ranks // LEAST_GAIN)
    while ranks > 1:
        load_RS = load_E[held_RS]
        total_R = load_RS.sum(1)
        busiest = int(total_R.argmax())
        less_SRS = load_RS[busiest][:, None, None] - load_RS[None]  # what goes from the busiest rank to another by each exchange
        then_SRS = np.maximum(total_R[busiest] - less_SRS, total_R[None, :, None] + less_SRS)  # the fuller of the two
        then_SRS[:, busiest] = total_R[busiest]
        here, other, there = (int(i) for i in np.unravel_index(then_SRS.argmin(), then_SRS.shape))
        if then_SRS[here, other, there] > total_R[busiest] - least:
            break
        held_RS[busiest, here], held_RS[other, there] = held_RS[other, there], held_RS[busiest, here]
    return tuple(held_RS.ravel().tolist())


def changed_ranks(before: Order, after: Order, ranks: int) -> int:
    """How many experts are on another rank."""
    held = len(before) // ranks
    rank_of = {expert: place // held for place, expert in enumerate(before)}
    return sum(rank_of[expert] != place // held for place, expert in enumerate(after))
