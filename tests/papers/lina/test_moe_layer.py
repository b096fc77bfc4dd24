"""A MoE layer taken apart, with numbers worked out by hand."""

import pytest

from papers.lina.moe_layer import all_to_all_share, forward_seconds
from tests.timeline.made import compute, event, grads, tokens, wait

LAYER = [
    compute("attention", 0, 50, layer=1),
    compute("route", 50, 51, layer=1),
    event("send", "counts", 51, 52, layer=1, op="counts", axis="counts"),
    tokens("dispatch", 52, 55, layer=1),
    wait("dispatch", 52, 55, 3.0, layer=1),
    compute("experts", 55, 57, layer=1),
    tokens("combine", 57, 60, layer=1),
    compute("mix", 60, 61, layer=1),
]
NOT_IN_IT = [
    compute("mlp", 0, 99, layer=0),  # of a dense layer
    compute("experts", 0, 99, layer=1, phase="B"),
    tokens("dispatch", 0, 99, layer=1, phase="B"),
    compute("loss", 0, 99),
    grads("dense.1", 0, 99),
]


def test_the_forward_pass_of_a_layer_is_its_instructions_and_its_exchanges() -> None:
    seconds = forward_seconds([*NOT_IN_IT, *LAYER])
    assert seconds == {"route": 1, "counts": 1, "all-to-all dispatch": 3, "experts": 2, "all-to-all combine": 3, "mix": 1}
    assert all_to_all_share(seconds) == pytest.approx(6 / 11)


def test_layers_are_averaged_and_parts_of_a_layer_add_up() -> None:
    second = [compute("experts", 0, 4, layer=2), compute("experts", 4, 8, layer=2, part="1"), tokens("combine", 8, 9, layer=2)]
    assert forward_seconds([*LAYER, *second])["experts"] == (2 + 4 + 4) / 2


def test_a_model_without_moe_layers_has_none() -> None:
    assert forward_seconds(NOT_IN_IT[:1]) == {}
    assert all_to_all_share({}) == 0
