"""Causes of a wrong replay, each with a near miss that is not named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalina.verify.diagnosis import diagnose
from megalina.verify.recording import Layout
from tests.verify.changed_recording import EDP, TP, Change, changed, diagnosed, only, reference_of

ORDER = Path(__file__).parents[1] / "expert_order.json"
PLACED = (2, 0, 3, 1)  # of layer 0 there


def sent(layout: Layout, change: Callable[[Tensor], Tensor]) -> Change:
    """The first layer's choices if what is replayed were changed so; [sequences, L, K], -1 where the router chooses."""
    reference = reference_of("replayed", layout)
    batch, right = reference.batches[0], reference.entry(0, "routing", "layers.0.expert").value
    assert batch.replay_BSLK is not None
    found = change(batch.replay_BSLK[:, :, 0].long())
    own = reference.entry(0, "activation", "layers.0.logits").value.argsort(2, descending=True)[..., :2]
    out = found.where(found >= 0, own)
    assert bool((out != right).any())
    return only(0, "routing", "layers.0.expert", out.masked_fill(~batch.valid_BS[..., None], 4))


def of_places(*expert_E: int) -> Callable[[Tensor], Tensor]:
    return lambda given: torch.tensor(expert_E)[given.clamp(min=0)].where(given >= 0, given)


def test_numbers_that_are_taken_for_places_of_ranks_in_turns_are_named() -> None:
    assert diagnosed("replayed", EDP, sent(EDP, of_places(0, 2, 1, 3))).named == "replay_of_places"


@pytest.mark.parametrize("expert_E", [(1, 2, 0, 3), PLACED])
def test_another_order_is_not(expert_E: tuple[int, ...]) -> None:
    assert diagnosed("replayed", EDP, sent(EDP, of_places(*expert_E))).named == "unknown"


def test_numbers_that_are_taken_for_places_of_a_file_are_named_by_it() -> None:
    reference = reference_of("replayed", TP)
    recording = changed(reference, TP, sent(TP, of_places(*PLACED)))
    recording.config = replace(recording.config, parallel=replace(recording.config.parallel, placement=str(ORDER)))
    found = diagnose(reference, recording)
    assert found.named == "replay_of_places" and str(ORDER) in found.sentence


def test_choices_of_the_token_before_are_named_and_of_the_one_after_not() -> None:
    for step, name in ((1, "replay_shifted"), (-1, "unknown")):
        assert diagnosed("replayed", TP, sent(TP, lambda given, step=step: given.roll(step, dims=1))).named == name  # type: ignore[misc]


def test_weights_of_the_routers_own_choices_alone_are_named() -> None:
    reference = reference_of("replayed", TP)
    weight = reference.entry(0, "activation", "layers.0.weight").value
    own = reference.entry(0, "activation", "layers.0.logits").value.argsort(2, descending=True)[..., :2]
    is_own = (reference.entry(0, "routing", "layers.0.expert").value[..., None] == own[:, :, None]).any(3)
    assert not is_own.all()
    for zeroed, name in ((weight * is_own, "replay_scores_zeroed"), (weight * ~is_own, "unknown")):
        assert diagnosed("replayed", TP, only(0, "activation", "layers.0.weight", zeroed)).named == name
