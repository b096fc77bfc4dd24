"""Inference in virtual time: rows are conserved, modes stand in their order, seconds are those counted by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.blocks.model import plain_shape
from megalina.compose import compose
from megalina.perfmodel.forecast.network import network_of
from megalina.perfmodel.sim.network import Network
from megalina.placement.controller import Policy
from megalina.placement.placement import Placement
from megalina.placement.planners.greedy import greedy
from megalina.placement.planners.identity import identity
from megalina.placement.routing_trace import traced
from megalina.placement.split import even, load_aware
from megalina.placement.triggers import always, never
from megalina.serve.modes import read_mode
from megalina.serve.policies import Served, policy_of
from megalina.step.inference import given_of
from megalina.step.program import Instruction, Kind, Op, check
from placement_lab.offline import replay
from placement_lab.oracle import OraclePredictor
from placement_lab.serving.decisions import Decider, ServedBatch, even_choices, shared_evenly
from placement_lab.serving.seconds import GivenTimes, RooflineSeconds, row_s
from placement_lab.serving.simulator import BatchTime, PlannerSeconds, Serving, program_of, serve, sizes_of
from placement_lab.workloads import WORKLOADS, Size, drawn, trace_of

CONF = Path(__file__).resolve().parents[3] / "conf" / "infer"
EXPERTS, DEVICES, LAYERS, TOKENS = 8, 4, 5, 64
SIZE = Size(num_experts=EXPERTS, num_devices=DEVICES, num_layers=LAYERS, batch_tokens=TOKENS, num_batches=4)
EVEN = TOKENS // DEVICES
TIMES = GivenTimes(attention_s=1.0, experts_full_s=4.0, even_tokens=EVEN, even_rows=EVEN)
NO_WIRE = Network(nic_bytes_per_s=math.inf)
MODES = ("static", "window", "lina", "best")


def resident(slots: int = 4) -> Placement:
    return identity(np.ones(EXPERTS), DEVICES, slots)


def serving(policy: Policy, **changes: object) -> Serving:
    one = Serving(
        shape=plain_shape((True,) * LAYERS),
        policy=policy,
        residents=[resident()] * LAYERS,
        device=TIMES,
        network=NO_WIRE,
        row_bytes=8.0,
        expert_s=0.01,
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def served(batches: Sequence[ServedBatch], setting: Serving) -> list[BatchTime]:
    server = Decider(setting.policy, setting.residents)
    return [serve(batch, server, setting) for batch in batches]


def workload_batches(name: str) -> list[ServedBatch]:
    workload = WORKLOADS[name](SIZE)
    return [ServedBatch(ids, tokens_R) for ids, tokens_R in zip(drawn(workload, 0), workload.tokens_BR, strict=True)]


def policy_for(mode: str, workload: str) -> Policy:
    config = replace(read_mode(CONF, mode), slots_per_device=4, row_us=4e6 / EVEN, replan_ms=40.0)
    return policy_of(config, Served(EXPERTS, 1, DEVICES), trace_of(WORKLOADS[workload](SIZE), seed=1))


def oracle_policy(batches: Sequence[ServedBatch]) -> Policy:
    counts_BLE = np.stack([[np.bincount(b.ids_TLK[:, i, 0], minlength=EXPERTS) for i in range(LAYERS)] for b in batches])
    return Policy(OraclePredictor(counts_BLE), greedy, load_aware, never)


NOTHING = Policy(None, None, even, never)


# who sends what


@given(
    seed=st.integers(0, 10**6),
    tokens_R=st.lists(st.integers(0, 9), min_size=DEVICES, max_size=DEVICES).filter(any),
    top_k=st.integers(1, 3),
    mode=st.sampled_from(["static", "window", "best"]),
    nobody=st.booleans(),
)
def test_no_row_is_lost_and_rows_go_where_their_expert_sits(
    seed: int, tokens_R: list[int], top_k: int, mode: str, nobody: bool
) -> None:
    random = np.random.default_rng(seed)
    profile_TLK = np.argsort(random.random((40, LAYERS, EXPERTS)), axis=2)[..., :top_k]
    config = replace(read_mode(CONF, mode), slots_per_device=4, row_us=1.0, replan_ms=1e-3)
    policy = policy_of(config, Served(EXPERTS, top_k, DEVICES), traced(profile_TLK, EXPERTS))
    decider = Decider(policy, [resident()] * LAYERS)
    for _ in range(3):
        ids_TLK = np.argsort(random.random((sum(tokens_R), LAYERS, EXPERTS)), axis=2)[..., :top_k]
        if nobody:
            ids_TLK[::3] = EXPERTS
        batch = ServedBatch(ids_TLK, np.array(tokens_R))
        for d in decider.decide(batch):
            parts = np.split(ids_TLK[:, d.layer], np.cumsum(tokens_R)[:-1])
            assert d.rows_RNS.min() >= 0
            for rank, part in enumerate(parts):
                went_E = np.zeros(EXPERTS + 1, int)
                np.add.at(went_E, np.asarray(d.placement.slots), d.rows_RNS[rank])  # EMPTY is the last one
                assert went_E[EXPERTS] == 0
                assert went_E[:EXPERTS].tolist() == np.bincount(part.ravel(), minlength=EXPERTS + 1)[:EXPERTS].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", ["hot_expert", "rotating", "burst"])
def test_decisions_are_those_of_a_replay(mode: str, workload: str) -> None:
    batches = drawn(WORKLOADS[workload](SIZE), 0)
    policy = policy_for(mode, workload)
    known = replay(batches, policy, num_experts=EXPERTS, num_devices=DEVICES, slots_per_device=4)
    decider = Decider(policy, [resident()] * LAYERS)
    for number, ids in enumerate(batches):
        for d in decider.decide(shared_evenly(ids, DEVICES)):
            assert d.load_N.tolist() == known.load_BLN[number, d.layer].tolist()
            assert (d.fetched_N + d.fetched_again_N).sum() == known.moved_BL[number, d.layer]
            assert d.replanned == known.replanned_BL[number, d.layer]
            assert d.rows_RNS.sum(2).trace() == known.local_BL[number, d.layer]


def test_even_choices_give_all_experts_as_many_rows() -> None:
    batch = even_choices(workload_batches("hot_expert")[0], EXPERTS)
    for d in Decider(NOTHING, [resident()] * LAYERS).decide(batch):
        assert d.load_N.tolist() == [EVEN] * DEVICES


def test_what_can_not_be_served_is_said() -> None:
    ids_TLK = np.zeros((6, LAYERS, 1), int)
    with pytest.raises(ValueError, match="5 tokens of 2 ranks, but ids are"):
        ServedBatch(ids_TLK, np.array([2, 3]))
    with pytest.raises(ValueError, match="a batch of 5 MoE layers and 3 ranks, but there are 5 placements on 4 devices"):
        Decider(NOTHING, [resident()] * LAYERS).decide(shared_evenly(ids_TLK, 3))
    with pytest.raises(ValueError, match="no hidden states"):
        Decider(replace(NOTHING, looks_ahead=True), [resident()])
    with pytest.raises(ValueError, match="5 MoE layers, but placements of 1"):
        serving(NOTHING, residents=[resident()])
    with pytest.raises(ValueError, match="expert_s -1"):
        serving(NOTHING, expert_s=-1.0)


# time


def by_hand(load: int, layers: int = LAYERS) -> float:
    """Attention of an even part, and experts of the busiest device."""
    return layers * (1.0 + 4.0 * (0.02 + load / EVEN))


def test_without_a_wire_a_batch_takes_attention_and_the_busiest_device() -> None:
    for workload in ("hot_expert", "hot_rank", "balanced"):
        batches = workload_batches(workload)
        loads_BL = WORKLOADS[workload](SIZE).static_load_BLN().max(axis=2)
        for batch, loads_L, time in zip(batches, loads_BL, served(batches, serving(NOTHING)), strict=True):
            assert time.seconds == pytest.approx(sum(by_hand(int(load), 1) for load in loads_L))
            assert [layer.load_max for layer in time.layers] == loads_L.tolist()
            assert sum(layer.seconds for layer in time.layers) == pytest.approx(time.seconds)
            assert all(sum(layer.parts_s.values()) == pytest.approx(layer.seconds) for layer in time.layers)
            assert sum(layer.load_mean for layer in time.layers) * DEVICES == batch.ids_TLK.size


def test_rows_that_go_back_in_chunks_take_the_same_work() -> None:
    batches = workload_batches("hot_rank")
    whole = served(batches, serving(NOTHING))
    chunked = served(batches, serving(NOTHING, combine_chunks=2))
    for one, two in zip(whole, chunked, strict=True):
        assert two.seconds == pytest.approx(one.seconds + LAYERS * 0.02 * 4.0)  # what experts cost besides, once more


def test_a_slow_wire_takes_the_bytes_of_the_rows_that_leave() -> None:
    """One rank sends all its rows to one device, both ways, over links of 8 bytes a second."""
    ids_TLK = np.repeat(np.arange(DEVICES) * (EXPERTS // DEVICES), EVEN)[:, None, None].repeat(LAYERS, 1)  # all stay at home
    ids_TLK[:EVEN] = 2  # but for those of rank 0, which go to device 1
    batch = shared_evenly(ids_TLK, DEVICES)
    network = Network(nic_bytes_per_s=8.0)
    slow, quick = (served([batch], serving(NOTHING, network=n))[0] for n in (network, NO_WIRE))
    told_bytes = (EXPERTS + 2) * 8 * (DEVICES - 1)  # a ring brings each rank what the others tell
    assert slow.seconds - quick.seconds == pytest.approx(LAYERS * (2 * EVEN * 8.0 + told_bytes) / 8.0)
    again = served([batch], serving(NOTHING, network=network, row_bytes=16.0))[0]
    assert again.seconds - slow.seconds == pytest.approx(LAYERS * 2 * EVEN)


def test_ideal_is_no_slower_than_best_and_best_no_slower_than_static_on_skewed_routing() -> None:
    for workload in ("hot_expert", "hot_rank", "spread_heat"):
        batches = workload_batches(workload)
        even_batches = [even_choices(batch, EXPERTS) for batch in batches]
        static = sum(t.seconds for t in served(batches, serving(NOTHING)))
        best = sum(t.seconds for t in served(batches, serving(policy_for("best", workload))))
        oracle = sum(t.seconds for t in served(batches, serving(oracle_policy(batches))))
        ideal = sum(t.seconds for t in served(even_batches, serving(NOTHING)))
        assert ideal <= oracle <= best * (1 + 1e-12) and best < static


@pytest.mark.parametrize("mode", MODES)
def test_balanced_routing_costs_no_more_than_deciding_explains(mode: str) -> None:
    batches, planner = workload_batches("balanced"), PlannerSeconds(plan_s=0.3, check_s=0.1)
    static = served(batches, serving(NOTHING))
    for own, bound in zip(served(batches, serving(policy_for(mode, "balanced"), planner=planner)), static, strict=True):
        fetching_s = sum(layer.fetched_again for layer in own.layers) * 0.01
        slack_s = sum(by_hand(layer.load_max, 1) - by_hand(EVEN, 1) for layer in own.layers)
        assert own.seconds <= bound.seconds + own.planner_s + fetching_s + slack_s + 1e-9
        assert mode == "static" or own.planner_s > 0


@pytest.mark.parametrize("chunks", [1, 2])
def test_rows_go_back_the_way_they_came_chunk_by_chunk(chunks: int) -> None:
    setting = serving(policy_for("best", "hot_rank"), combine_chunks=chunks)
    decisions = Decider(setting.policy, setting.residents).decide(workload_batches("hot_rank")[0])
    sizes, everybody = sizes_of(decisions, setting, DEVICES), tuple(range(DEVICES))
    for d in decisions:
        out = Instruction("F", Kind.START, "dispatch", d.layer, op=Op.TOKENS)
        back = [replace(out, name="combine", chunk=(c, chunks)) for c in range(chunks)]
        out_NN, *back_NN = (sizes.sent(instruction, everybody)[2] for instruction in (out, *back))
        assert out_NN is not None and (out_NN != out_NN.T).any()
        assert out_NN.tolist() == (8.0 * d.rows_RNS.sum(2)).tolist() == sum(x.T for x in back_NN if x is not None).tolist()
        assert out_NN.sum() == TOKENS * 8.0


# deciding and fetching


def test_planning_hides_under_the_dispatch_but_not_before_it() -> None:
    """Only the first layer's plan, which nothing precedes, is seen while the wire takes longer than planning."""
    batches, network = workload_batches("hot_rank"), Network(nic_bytes_per_s=64.0)
    policy = oracle_policy(batches)
    free, hidden, seen = (
        sum(t.seconds for t in served(batches, serving(policy, network=network, planner=p)))
        for p in (PlannerSeconds(), PlannerSeconds(plan_s=0.25), PlannerSeconds(plan_s=0.25, hides=False))
    )
    assert hidden == pytest.approx(free + len(batches) * 0.25)
    assert seen == pytest.approx(free + len(batches) * LAYERS * 0.25)
    hidden, seen = (
        sum(t.seconds for t in served(batches, serving(policy, planner=PlannerSeconds(plan_s=0.25, hides=hides))))
        for hides in (True, False)
    )
    assert hidden == pytest.approx(seen)  # there is nothing to hide behind


def test_phase_2_blocks_by_planning_or_by_checking_and_by_what_it_fetches() -> None:
    batches = workload_batches("rotating")
    planner = PlannerSeconds(plan_s=0.25, check_s=0.125)
    anew = Policy(None, greedy, load_aware, always)
    free = served(batches, serving(anew, expert_s=0.0))
    for other in served(batches, serving(anew, expert_s=0.5, planner=planner)):
        assert other.replanned == LAYERS and not any(layer.planned or layer.agreed for layer in other.layers)
        assert other.planner_s == LAYERS * 0.25
    decider = Decider(anew, [resident()] * LAYERS)
    decisions = [decider.decide(batch) for batch in batches]
    times = served(batches, serving(anew, expert_s=0.5, planner=planner))
    for one, other, layers in zip(free, times, decisions, strict=True):
        fetching_s = sum(0.5 * int(d.fetched_again_N.max()) for d in layers)
        assert other.seconds == pytest.approx(one.seconds + LAYERS * 0.25 + fetching_s)
    calm = Policy(oracle_policy(batches).predictor, greedy, load_aware, lambda situation: False)
    checked, unchecked = (served(batches, serving(calm, planner=p)) for p in (planner, replace(planner, check_s=0.0)))
    for one, other in zip(unchecked, checked, strict=True):
        assert [layer.agreed for layer in other.layers] == [True] * LAYERS
        assert other.seconds == pytest.approx(one.seconds + LAYERS * 0.125)


def test_fetches_hide_behind_what_is_computed_until_they_are_longer() -> None:
    batches = workload_batches("rotating")
    policy = oracle_policy(batches)
    decider = Decider(policy, [resident()] * LAYERS)
    most_BL = np.array([[int(d.fetched_N.max()) for d in decider.decide(batch)] for batch in batches])
    assert most_BL[1:].min() > 0
    free, short, long = (served(batches, serving(policy, expert_s=s)) for s in (0.0, 0.01, 100.0))
    for one, two, three, most_L in zip(free, short, long, most_BL, strict=True):
        first_s = max(0.0, 0.01 * most_L[0] - 1.0)  # under attention
        assert two.seconds == pytest.approx(one.seconds + first_s)
        behind_s = [by_hand(layer.load_max, 1) for layer in three.layers]
        exposed_s = [100.0 * most_L[0] - 1.0, *(100.0 * n - s for n, s in zip(most_L[1:], behind_s, strict=False))]
        assert three.seconds == pytest.approx(one.seconds + sum(max(0.0, s) for s in exposed_s))
        assert three.parts_s["wait fetch"] == pytest.approx(sum(max(0.0, s) for s in exposed_s))


def test_the_list_is_complete_with_its_fetches() -> None:
    batches = workload_batches("rotating")
    setting = serving(oracle_policy(batches), combine_chunks=2)
    decider = Decider(setting.policy, setting.residents)
    for batch in batches:
        decisions = decider.decide(batch)
        program = program_of(decisions, setting)
        check(program, given_of(setting.shape), {})
        fetched = [d.layer for d in decisions if d.fetched_N.any()]
        assert [s.layer for s in program if s.name == "fetch"] == [layer for layer in fetched for _ in (0, 1)]


def test_dense_layers_count_with_the_moe_layer_after_them() -> None:
    batches = workload_batches("balanced")
    shape = plain_shape((False, True) * LAYERS)
    (first, *_), (plain, *_) = (served(batches, serving(NOTHING, shape=s)) for s in (shape, plain_shape((True,) * LAYERS)))
    assert first.seconds == pytest.approx(plain.seconds + LAYERS * 1.0)
    assert [layer.parts_s["attention"] for layer in first.layers] == pytest.approx([2.0] * LAYERS)


# the roofline


def roofline(context: int = 0, **model: object) -> RooflineSeconds:
    config = compose(["cluster=h100_400g", "model=mixtral_8x7b", "train.dtype=bfloat16", "train.seq_len=2048"])
    return RooflineSeconds(replace(config, model=replace(config.model, **model)), context=context)  # type: ignore[arg-type]


def test_experts_pay_for_rows_and_for_each_slot_whose_weights_are_read() -> None:
    device = roofline()
    assert device.experts_s([0, 0]) == 0.0
    assert device.experts_s([4, 0, 0]) == device.experts_s([0, 4]) < device.experts_s([2, 2]) < 2.1 * device.experts_s([4])
    many = device.experts_s([4096]), device.experts_s([8192])
    assert many[1] == pytest.approx(2 * many[0], rel=0.1)
    flops_s = 3 * 2 * 8192 * 4096 * 14336 / (989.4e12 * 0.75)
    assert flops_s < many[1] < 1.15 * flops_s
    weights_s = 3 * 4096 * 14336 * 2 / (3350e9 * 0.85)
    assert weights_s < device.experts_s([1]) < 1.3 * weights_s + 60e-6
    assert 0 < row_s(device, 4096, 2) < 2 * many[0] / 4096


def test_decoding_reads_keys_and_values_and_prefill_does_not() -> None:
    short, long = roofline(context=1024), roofline(context=32768)
    cache_s = 256 * (32768 - 1024) * 2 * 8 * 128 * 2 / (3350e9 * 0.85)
    assert long.instruction_s("attention", 256) - short.instruction_s("attention", 256) == pytest.approx(cache_s)
    assert long.instruction_s("score", 256) == short.instruction_s("score", 256) > 0
    assert roofline().instruction_s("attention", 2048) > roofline().instruction_s("attention", 1024) > 0
    own = roofline(layer=["attention", f"{Path(__file__).resolve().parents[3]}/docs/examples/own_layer.py:Gate", "ffn"])
    assert own.instruction_s("gate", 2048) > own.instruction_s("gate", 1024) > 0 == roofline().instruction_s("gate", 1024)
    assert roofline().instruction_s("foresee", 64) == roofline().instruction_s("attention", 0) == 0.0
    windowed = roofline(context=32768, window=1025, full_attention_every=2)  # half of the layers read as many as `short`
    half_s = (long.instruction_s("attention", 256) + short.instruction_s("attention", 256)) / 2
    assert windowed.instruction_s("attention", 256) == pytest.approx(half_s)
    assert roofline(window=128).instruction_s("attention", 2048) < roofline().instruction_s("attention", 2048)
    with pytest.raises(ValueError, match="a context of -1 tokens"):
        roofline(context=-1)


def test_a_cluster_of_devices_serves_a_skewed_batch() -> None:
    """Many rows a device: static waits for the busiest device, and an oracle does not."""
    config = compose(["cluster=h100_400g", "model=mixtral_8x7b", "train.dtype=bfloat16", "train.seq_len=2048"])
    size = replace(SIZE, num_layers=LAYERS, batch_tokens=2048 * DEVICES)
    batches = [shared_evenly(ids, DEVICES) for ids in drawn(WORKLOADS["hot_rank"](size), 0)]
    device = RooflineSeconds(config)
    found = {}
    for name, policy in (("static", NOTHING), ("oracle", oracle_policy(batches))):
        setting = serving(policy, device=device, network=network_of(config.cluster), row_bytes=4096 * 2, expert_s=0.007)
        found[name] = served(batches, setting)[-1]
    assert found["oracle"].seconds < 0.75 * found["static"].seconds
    static, parts = found["static"], found["static"].parts_s
    assert parts["wait combine"] > 0.9 * parts["experts"]  # three devices wait for the fourth, which has half of all rows
    assert static.seconds > LAYERS * device.experts_s([int(static.layers[0].load_max) // 2] * 2)
