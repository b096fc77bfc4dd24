"""The diagnosis where there is little to say: nothing differs, or nothing known explains it."""

from megalina.verify.recording import INITIAL
from tests.verify.changed_recording import TP, diagnosed, only, reference_of


def test_equal_recordings_have_no_cause() -> None:
    assert diagnosed("plain", TP, lambda e: None).named == ""


def test_rounding_has_no_cause() -> None:
    assert diagnosed("plain", TP, lambda e: e.value * (1 + 1e-14) if e.value.is_floating_point() else None).named == ""


def test_other_weights_at_the_start_are_said_to_be_that() -> None:
    told = diagnosed("plain", TP, lambda e: e.value + 1 if (e.step, e.name) == (INITIAL, "embedding") else None)
    assert told.named == "unknown"
    assert "initial value of embedding" in told.sentence


def test_a_difference_without_known_cause_names_the_tensor() -> None:
    spoilt = reference_of("plain", TP).entry(1, "activation", "layers.0").value.clone()
    spoilt[3, 2, 1] += 1
    told = diagnosed("plain", TP, only(1, "activation", "layers.0", spoilt))
    assert told.named == "unknown"
    assert "activation layers.0 of step 1" in told.sentence
