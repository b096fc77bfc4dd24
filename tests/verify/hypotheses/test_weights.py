"""Causes of wrong weights, each with a near miss that is not named."""

from collections.abc import Callable

import torch
from torch import Tensor

from megalina.verify.recording import INITIAL, Entry
from tests.verify.changed_recording import (
    EDP,
    ZERO,
    Change,
    diagnosed,
    first_step,
    reference_of,
)


def stale(share: float) -> Change:
    """Each rank has a quarter of each tensor that is new; the rest is old, or lies between."""

    def change(e: Entry) -> list[Tensor]:
        old = reference_of("plain", ZERO).entry(INITIAL, "weight", e.name).value
        quarter = torch.arange(e.value.numel()).view(e.value.shape) * 4 // e.value.numel()
        return [torch.where(quarter == rank, e.value, old + share * (e.value - old)) for rank in range(4)]

    return first_step("weight", change)


def test_old_weights_in_other_ranks_shards_are_stale() -> None:
    assert diagnosed("plain", ZERO, stale(0.0)).named == "stale_zero_shard"


def test_weights_between_old_and_new_are_not_stale() -> None:
    assert diagnosed("plain", ZERO, stale(0.5)).named == "unknown"


def decayed(rate: float, what: Callable[[str], bool]) -> Change:
    reference = reference_of("plain", EDP)
    return first_step(
        "weight",
        lambda e: e.value - rate * reference.entry(INITIAL, "weight", e.name).value if what(e.name) else None,
    )


def test_norms_with_weight_decay_are_named() -> None:
    assert diagnosed("plain", EDP, decayed(0.01 * 0.1, lambda n: "norm" in n)).named == "decay_on_norms"


def test_norms_with_another_decay_are_not() -> None:
    assert diagnosed("plain", EDP, decayed(0.01 * 0.11, lambda n: "norm" in n)).named == "unknown"


def test_decay_of_matrices_is_not_that_of_norms() -> None:
    assert diagnosed("plain", EDP, decayed(0.01 * 0.1, lambda n: "norm" in n or n == "embedding")).named == "unknown"
