"""Ahead ids: they stay with their tokens through all that is done to a trace, or go; and what is learned from them by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalina.placement.controller import Policy
from megalina.placement.planners.greedy import greedy
from megalina.placement.predictors.look_ahead import LookAheadPredictor, fit_confusion
from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import (
    RoutingTrace,
    alternate,
    batches,
    best_first,
    halves,
    joined,
    merged_experts,
    read_trace,
    rerouted_evenly,
    top1,
    traced,
    write_trace,
)
from megalina.placement.split import even
from megalina.placement.triggers import never
from placement_lab.offline import replay

E, K, L = 4, 2, 3


def asked(seed: int, tokens: int = 12, lengths: tuple[int, ...] = (4, 4, 4)) -> RoutingTrace:
    random = np.random.default_rng(seed)
    ids, ahead = np.argsort(random.random((2, tokens, L, E)), axis=3)[..., :K].astype(np.uint8)
    ahead[:, 0] = E
    weights = random.random(ids.shape).astype(np.float16)
    return traced(ids, E, weights_TLK=weights, sample_lengths_S=np.array(lengths), name=f"t{seed}", ahead_ids_TLK=ahead)


def said(trace: RoutingTrace) -> Ids:
    assert trace.ahead_ids_TLK is not None
    return trace.ahead_ids_TLK


def test_a_file_gives_them_back_and_older_files_have_none(tmp_path: Path) -> None:
    trace = asked(1)
    write_trace(tmp_path / "t.npz", trace)
    found = read_trace(tmp_path / "t.npz")
    assert said(found).dtype == np.uint8 and np.array_equal(said(found), said(trace))
    write_trace(tmp_path / "t.npz", replace(trace, ahead_ids_TLK=None))
    assert read_trace(tmp_path / "t.npz").ahead_ids_TLK is None


GOOD = np.array([[[4, 4], [1, 2]], [[4, 4], [4, 4]]])  # of 4 experts; nobody may be there several times
BAD: list[tuple[Any, str]] = [
    (GOOD[:1], r"ahead_ids must be integers \[2, 2, 2\] as expert_ids are, not int64 \[1, 2, 2\]"),
    (GOOD.astype(np.float32), r"not float32 \[2, 2, 2\]"),
    (GOOD + 1, "ahead_ids go from 2 to 5, but there are experts 0 to 3, and 4 is nobody"),
    (GOOD - 2, "ahead_ids go from -1 to 2"),
    (GOOD[:, ::-1], "2 of the first layer's ahead_ids name an expert, but no layer before could be asked: 4 is nobody"),
    (np.where(GOOD == 2, 1, GOOD), r"ahead_ids name an expert twice for token 0 in layer 1: \[1, 1\]"),
]


@pytest.mark.parametrize(("ahead", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_is_named_and_nothing_is_written(tmp_path: Path, ahead: Any, message: str) -> None:
    ids = np.array([[[0, 1], [1, 2]], [[3, 1], [1, 0]]])
    assert traced(ids, 4, ahead_ids_TLK=GOOD).ahead_ids_TLK is GOOD
    np.savez(tmp_path / "bad.npz", expert_ids=ids, num_experts=np.array(4), ahead_ids=ahead)
    with pytest.raises(ValueError, match=message) as raised:
        read_trace(tmp_path / "bad.npz")
    assert str(raised.value).startswith(f"{tmp_path / 'bad.npz'}: trace bad: ") and "\n" not in str(raised.value)


# parts and wholes


def test_they_are_cut_and_joined_with_their_tokens() -> None:
    a, b = asked(1), asked(2)
    first, second = halves(a)
    assert np.array_equal(said(first), said(a)[:4]) and np.array_equal(said(second), said(a)[4:])
    assert np.array_equal(said(joined([b, a])), np.concatenate([said(b), said(a)]))
    assert joined([a, replace(b, ahead_ids_TLK=None)]).ahead_ids_TLK is None
    assert [batch.tolist() for batch in batches(a, 5, ahead=True)] == [said(a)[i : i + 5].tolist() for i in (0, 5, 10)]
    turns = list(alternate([a, b], 6, ahead=True))
    assert np.array_equal(np.concatenate(turns), np.concatenate([said(a)[:6], said(b)[:6], said(a)[6:], said(b)[6:]]))
    with pytest.raises(ValueError, match="trace t3 has no ahead_ids: record it"):
        list(batches(replace(asked(3), ahead_ids_TLK=None), 5, ahead=True))


# other routing


def test_they_change_as_choices_do_or_go() -> None:
    trace = asked(1)
    assert np.array_equal(said(best_first(trace)), said(trace))  # by what routers said, not by what came true
    one = top1(trace)
    assert np.array_equal(said(one), said(trace)[..., :1])
    merged = merged_experts(one, 2)
    assert merged.num_experts == 2 and np.array_equal(said(merged)[:, 1:], said(one)[:, 1:] // 2)
    assert (said(merged)[:, 0] == 2).all()  # still nobody
    distinct = traced(np.array([[[0, 2], [0, 2]]]), 4, ahead_ids_TLK=np.array([[[4, 4], [2, 3]]]))
    with pytest.raises(ValueError, match="merging 4 experts to 2 needs top1 first: .*ahead_ids name an expert twice"):
        merged_experts(distinct, 2)
    assert rerouted_evenly(trace, 0.5, 0).ahead_ids_TLK is None


# what is learned from them


def test_a_router_that_errs_the_same_way_is_understood() -> None:
    """What is said is off by one expert: so is the map, up to the ridge, and the first layer's does nothing."""
    random = np.random.default_rng(0)
    chosen = np.argsort(random.random((4000, L, E)), axis=2)[..., :K]
    ahead = (chosen + 1) % E
    ahead[:, 0] = E
    maps = fit_confusion(ahead, chosen, E, ridge=1e-6)
    np.testing.assert_allclose(maps[1:], [np.roll(np.eye(E), -1, 1)] * (L - 1), atol=1e-6)
    np.testing.assert_allclose(maps[0], np.eye(E))
    np.testing.assert_allclose(fit_confusion(ahead, chosen, E, ridge=1e12), [np.eye(E)] * L, atol=1e-6)
    predictor = LookAheadPredictor(np.ones((L, E)), maps=maps)
    shares = predictor.expect(1, np.array([2.0, 6.0, 0.0, 0.0]), predictor.start(1))
    np.testing.assert_allclose(shares, [0.75, 0.0025, 0.0025, 0.25], rtol=0.01)  # none below a hundredth of an even share


def test_the_map_is_the_ridge_regression_of_a_solver() -> None:
    trace = joined([asked(seed) for seed in range(5)])
    ahead, chosen = said(trace), trace.expert_ids_TLK
    found = fit_confusion(ahead, chosen, E, ridge=3.0)
    for layer in range(L):
        x, y = ((ids[:, layer, :, None] == np.arange(E)).sum(1).astype(float) for ids in (ahead, chosen))
        prior = np.sqrt(3.0) * np.eye(E)
        wanted = np.linalg.lstsq(np.concatenate([x, prior]), np.concatenate([y, prior]), rcond=None)[0]
        np.testing.assert_allclose(found[layer], wanted, atol=1e-9)


def test_what_was_said_is_told_layer_by_layer_and_rank_by_rank() -> None:
    """A look-ahead that is right is an oracle; ranks have unequal parts of 11 tokens; only the first layer isn't foreseen."""
    served = [asked(seed, 11, (11,)).expert_ids_TLK for seed in (1, 2)]
    right = [np.concatenate([np.full((11, 1, K), E), ids_TLK[:, 1:]], 1) for ids_TLK in served]
    policy = Policy(LookAheadPredictor(np.ones((L, E))), greedy, even, never, looks_ahead=True)
    found = replay(served, policy, num_experts=E, num_devices=2, slots_per_device=3, ahead=right)
    assert found.expected_BLE is not None
    np.testing.assert_allclose(found.expected_BLE[:, 1:], found.counts_BLE[:, 1:] / 22)
    for ahead, said_so in ((None, "there are 0"), (right[:1], "there are 1"), ([r[:9] for r in right], "2, of other shapes")):
        with pytest.raises(ValueError, match=f"needs ahead ids of 2 batches.*: .*{said_so}") as raised:
            replay(served, policy, num_experts=E, num_devices=2, slots_per_device=3, ahead=ahead)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fit_confusion(GOOD, GOOD[:1], 4), r"not \[2, 2, 2\] and \[1, 2, 2\]"),
        (lambda: fit_confusion(GOOD[:0], GOOD[:0], 4), "at least one of each"),
        (lambda: fit_confusion(GOOD, GOOD, 4, ridge=0.0), "ridge 0.0: take one above 0"),
        (lambda: LookAheadPredictor(np.ones((2, 4)), maps=np.ones((1, 4, 4))), r"maps are \[1, 4, 4\]: for counts \[2, 4\]"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        make()
    assert "\n" not in str(raised.value)
