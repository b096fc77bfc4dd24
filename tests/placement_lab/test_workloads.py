"""Workloads: rows are counted before a token is drawn, and what is drawn has exactly these; heat is where each name says."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.placement.controller import Policy
from megalina.placement.predictors.predictor import Seen
from megalina.placement.routing_trace import Counts, counts_LE
from megalina.placement.split import even
from megalina.placement.triggers import never
from placement_lab.offline import counts_of_batches, replay
from placement_lab.oracle import OraclePredictor
from placement_lab.workloads import (
    WORKLOADS,
    Size,
    Workload,
    balanced,
    burst,
    drawn,
    hot_expert,
    hot_rank,
    own_part,
    ragged_source,
    rotating,
    spread_heat,
    trace_of,
    zero_load_rank,
)

LAPTOP = Size(num_experts=16, num_devices=4, num_layers=3, batch_tokens=512, num_batches=6)
SHARES = st.floats(0, 1)


@st.composite
def sizes(draw: st.DrawFn) -> Size:
    """What every workload can be made of; more experts than devices, so that one device never has all of the heat's others."""
    devices = draw(st.integers(2, 6))
    return Size(
        num_experts=draw(st.integers(devices + 1, 13)),
        num_devices=devices,
        num_layers=draw(st.integers(1, 4)),
        batch_tokens=draw(st.integers(1, 90)),
        num_batches=draw(st.integers(3, 9)),
    )


def homes(size: Size) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.arange(size.num_experts), size.num_devices)]


def first(workload: Workload) -> Counts:
    """[B, E], rows in the first layer, as the oracle is told."""
    return workload.counts_BLE()[:, 0]


# of all workloads


@given(sizes(), st.sampled_from(sorted(WORKLOADS)), st.integers(0, 99), SHARES)
def test_what_is_drawn_has_exactly_the_counts_that_were_known_before(size: Size, name: str, seed: int, follow: float) -> None:
    workload = WORKLOADS[name](size)
    counts_BLE, batches = workload.counts_BLE(), drawn(workload, seed, follow=follow)
    assert workload.name == name
    assert counts_BLE.dtype == np.int64 and counts_BLE.min() >= 0
    assert counts_BLE.shape == (size.num_batches, size.num_layers, size.num_experts)
    assert [ids_TLK.shape for ids_TLK in batches] == [(size.batch_tokens, size.num_layers, 1)] * size.num_batches
    assert (counts_BLE.sum(axis=2) == size.batch_tokens).all()
    assert (workload.tokens_BR.sum(axis=1) == size.batch_tokens).all() and workload.tokens_BR.min() >= 0
    assert np.array_equal(counts_of_batches(batches, size.num_experts), counts_BLE)
    assert np.array_equal(counts_LE(trace_of(workload, seed)), counts_BLE.sum(axis=0))


@given(sizes(), st.sampled_from(sorted(WORKLOADS)))
def test_static_loads_are_those_of_a_replay_that_moves_nothing_and_the_same_in_all_layers(size: Size, name: str) -> None:
    size = replace(size, batch_tokens=size.batch_tokens + size.num_devices)
    workload = WORKLOADS[name](size)
    load_BLN = workload.static_load_BLN()
    slots = -(-size.num_experts // size.num_devices)
    shape = {"num_experts": size.num_experts, "num_devices": size.num_devices, "slots_per_device": slots}
    assert np.array_equal(replay(drawn(workload, 0), Policy(None, None, even, never), **shape).load_BLN, load_BLN)
    assert (load_BLN == load_BLN[:, :1]).all()


@given(sizes(), st.sampled_from(sorted(WORKLOADS)))
def test_an_oracle_expects_what_comes(size: Size, name: str) -> None:
    workload = WORKLOADS[name](size)
    oracle = OraclePredictor(workload.counts_BLE())
    for batch, ids_TLK in enumerate(drawn(workload, 3)):
        for layer in range(size.num_layers):
            share_E = oracle.expect(layer, oracle.features(layer, Seen(())), batch)
            came_E = np.bincount(ids_TLK[:, layer, 0], minlength=size.num_experts)
            assert np.array_equal(np.rint(share_E * size.batch_tokens).astype(np.int64), came_E)


@given(sizes(), st.sampled_from(sorted(WORKLOADS)), SHARES)
def test_so_many_tokens_follow_to_the_next_expert_of_their_device(size: Size, name: str, follow: float) -> None:
    workload = WORKLOADS[name](size)
    for experts in homes(size):
        assert [workload.next_E[expert] for expert in experts] == [*experts[1:], experts[0]]
    for ids_TLK in drawn(workload, 5, follow=follow):
        follows_TL = workload.next_E[ids_TLK[:, :-1, 0]] == ids_TLK[:, 1:, 0]
        assert (follows_TL.sum(axis=0) >= round(follow * size.batch_tokens)).all()


def test_nobody_follows_but_by_chance_where_nobody_is_to() -> None:
    workload = balanced(LAPTOP)
    follows = [(workload.next_E[ids[:, :-1]] == ids[:, 1:]).mean() for ids in drawn(workload, 5, follow=0.0)]
    assert 0.03 < np.mean(follows) < 0.1  # 1 / 16


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_seed_decides_all_and_decides_nothing_of_the_counts(name: str) -> None:
    workload = WORKLOADS[name](LAPTOP)
    one, same, other = (np.stack(drawn(workload, seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    if name != "burst":  # whose middle is elsewhere then
        longer = WORKLOADS[name](replace(LAPTOP, num_batches=9))
        assert np.array_equal(np.stack(drawn(longer, 1)[:6]), one)
    trace = trace_of(workload, 1)
    assert np.array_equal(trace.expert_ids_TLK, np.concatenate(one))
    assert trace.sample_lengths_S.tolist() == [512] * 6 and (trace.num_experts, trace.name) == (16, name)


@given(sizes(), st.sampled_from(sorted(WORKLOADS)))
def test_parts_of_ranks_are_the_batch_in_their_order(size: Size, name: str) -> None:
    for tokens_R in WORKLOADS[name](size).tokens_BR:
        parts = [list(range(size.batch_tokens))[own_part(tokens_R, rank)] for rank in range(size.num_devices)]
        assert [len(part) for part in parts] == tokens_R.tolist()
        assert sum(parts, []) == list(range(size.batch_tokens))


# one after another


@given(sizes())
def test_balanced_is_even(size: Size) -> None:
    workload = balanced(size)
    assert (np.ptp(workload.counts_BLE(), axis=2) <= 1).all() and (np.ptp(workload.tokens_BR, axis=1) <= 1).all()


@given(sizes(), SHARES, st.data())
def test_a_hot_expert_has_its_share_and_the_others_are_even(size: Size, share: float, data: st.DataObject) -> None:
    expert = data.draw(st.integers(0, size.num_experts - 1))
    workload = hot_expert(size, share=share, expert=expert)
    assert (abs(first(workload)[:, expert] - share * size.batch_tokens) <= 0.5).all()
    assert (np.ptp(np.delete(first(workload), expert, axis=1), axis=1) <= 1).all()
    if size.num_layers > 1:
        assert (workload.counts_BLE()[:, 1, workload.next_E[expert]] == first(workload)[:, expert]).all()


@given(sizes(), SHARES, st.data())
def test_a_hot_rank_has_its_share_and_all_else_is_even(size: Size, share: float, data: st.DataObject) -> None:
    device = data.draw(st.integers(0, size.num_devices - 1))
    workload = hot_rank(size, share=share, device=device)
    hot = homes(size)[device]
    assert (abs(workload.static_load_BLN()[..., device] - share * size.batch_tokens) <= 0.5).all()
    assert (np.ptp(first(workload)[:, hot], axis=1) <= 1).all()
    assert (np.ptp(np.delete(first(workload), hot, axis=1), axis=1) <= 1).all()


@given(sizes(), SHARES)
def test_spread_heat_is_on_one_expert_of_several_devices(size: Size, share: float) -> None:
    workload = spread_heat(size, share=share)
    many = max(2, size.num_devices // 2)
    by_device = [homes(size)[device][0] for device in range(size.num_devices)]
    hot = [expert for i, expert in enumerate(by_device) if i in [n * size.num_devices // many for n in range(many)]]
    assert len(hot) == many
    assert (abs(first(workload)[:, hot].sum(axis=1) - share * size.batch_tokens) <= 0.5).all()
    assert (np.ptp(first(workload)[:, hot], axis=1) <= 1).all()
    assert (np.ptp(np.delete(first(workload), hot, axis=1), axis=1) <= 1).all()


def test_spread_heat_by_hand() -> None:
    assert first(spread_heat(LAPTOP))[0].tolist() == [192, 10, 10, 9, 9, 9, 9, 9, 192, 9, 9, 9, 9, 9, 9, 9]


@given(sizes())
def test_ragged_ranks_have_tokens_in_turn_and_experts_are_less_popular_one_after_another(size: Size) -> None:
    workload = ragged_source(size)
    weight_R, popularity_E = np.arange(1, size.num_devices + 1), 1 / np.arange(1, size.num_experts + 1)
    for batch, tokens_R in enumerate(workload.tokens_BR):
        expected_R = size.batch_tokens * np.roll(weight_R, -batch) / weight_R.sum()
        assert (abs(tokens_R - expected_R) < 1).all()
    assert (abs(first(workload) - size.batch_tokens * popularity_E / popularity_E.sum()) < 1).all()
    assert (np.diff(first(workload), axis=1) <= 0).all()


def test_ragged_by_hand() -> None:
    workload = ragged_source(replace(LAPTOP, num_experts=4, batch_tokens=25))
    assert workload.tokens_BR.tolist()[:2] == [[3, 5, 7, 10], [5, 8, 10, 2]]  # of 2.5, 5, 7.5 and 10
    assert first(workload)[0].tolist() == [12, 6, 4, 3]


@given(sizes(), st.data())
def test_the_zero_load_rank_sends_nothing_and_is_sent_nothing(size: Size, data: st.DataObject) -> None:
    rank = data.draw(st.integers(-1, size.num_devices - 1))
    workload = zero_load_rank(size, rank=rank)
    assert (workload.tokens_BR[:, rank] == 0).all() and (workload.static_load_BLN()[..., rank] == 0).all()
    assert not np.isin(np.stack(drawn(workload, 0)), homes(size)[rank]).any()
    others = np.delete(np.arange(size.num_experts), homes(size)[rank])
    assert (np.ptp(np.delete(workload.tokens_BR, rank, axis=1), axis=1) <= 1).all()
    assert (np.ptp(first(workload)[:, others], axis=1) <= 1).all()


@given(sizes())
def test_heat_goes_round_the_devices_and_comes_back(size: Size) -> None:
    size = replace(size, num_batches=2 * size.num_devices + 1)
    workload = rotating(size, share=1.0)
    assert workload.static_load_BLN()[:, 0].argmax(axis=1).tolist() == [b % size.num_devices for b in range(size.num_batches)]
    assert np.array_equal(first(workload)[size.num_devices :], first(workload)[: -size.num_devices])
    assert ((first(workload) > 0).sum(axis=1) == 1).all()


def test_rotating_by_hand() -> None:
    counts_BE = first(rotating(LAPTOP))
    assert counts_BE.argmax(axis=1).tolist() == [0, 4, 8, 12, 0, 4]
    assert counts_BE.max(axis=1).tolist() == [128] * 6


@pytest.mark.parametrize(("batches", "hot"), [(3, [1]), (4, [1, 2]), (6, [2, 3]), (8, [2, 3, 4, 5]), (16, [5, 6, 7, 8, 9, 10])])
def test_a_burst_is_in_the_middle(batches: int, hot: list[int]) -> None:
    size = replace(LAPTOP, num_batches=batches)
    workload = burst(size, expert=7)
    for batch in range(batches):
        model = hot_expert(size, expert=7) if batch in hot else balanced(size)
        assert np.array_equal(workload.counts_BLE()[batch], model.counts_BLE()[batch]), batch


# what can't be


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(LAPTOP, num_layers=0), "num_layers is 0: choose 1 or more"),
        (lambda: replace(LAPTOP, num_devices=17), "17 devices can't each have one of 16 experts"),
        (lambda: hot_expert(LAPTOP, expert=16), "expert 16 is none of 16: choose 0 to 15"),
        (lambda: hot_expert(LAPTOP, share=1.1), r"share is 1\.1: it must be from 0 to 1"),
        (lambda: hot_expert(replace(LAPTOP, num_experts=1, num_devices=1)), "all 1 experts are hot: choose more"),
        (lambda: hot_rank(LAPTOP, device=-1), "device -1 is none of 4: choose 0 to 3"),
        (lambda: hot_rank(replace(LAPTOP, num_devices=1)), "hot_rank is about one device among others, but there is 1"),
        (lambda: spread_heat(replace(LAPTOP, num_devices=1)), "spread_heat is about"),
        (lambda: spread_heat(replace(LAPTOP, num_experts=2, num_devices=2)), "all 2 experts are hot"),
        (lambda: zero_load_rank(replace(LAPTOP, num_devices=1)), "zero_load_rank is about"),
        (lambda: zero_load_rank(LAPTOP, rank=4), "rank 4 is none of 4"),
        (lambda: burst(replace(LAPTOP, num_batches=2)), "burst has 2 batches: .* choose 3"),
        (lambda: burst(LAPTOP, expert=-1), "expert -1 is none of 16"),
        (lambda: drawn(balanced(LAPTOP), 0, follow=-0.5), r"follow is -0\.5"),
        (lambda: replace(balanced(LAPTOP), tokens_BR=balanced(LAPTOP).tokens_BR[:5]), r"batches of \[512, 512, 512, 512, 512\]"),
        (lambda: replace(balanced(LAPTOP), tokens_BR=balanced(LAPTOP).tokens_BR * 2), r"tokens have \[512, .* rows"),
        (lambda: replace(balanced(LAPTOP), next_E=np.zeros(16, np.int64)), "no permutation"),
    ],
)
def test_what_can_not_be_is_said_in_one_line(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        make()
    assert "\n" not in str(raised.value)
