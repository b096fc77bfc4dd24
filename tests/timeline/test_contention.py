"""Contention by hand: every number is worked out beside the events that it is of."""

import random
from dataclasses import replace

import pytest

from megalina.timeline.contention import Alone, all_to_alls, group_slowdowns, quantile, slowdowns, summary
from megalina.timeline.recorder import Event
from megalina.timeline.spans import length_s, overlaps, shared_s, union
from tests.timeline.made import compute, event, grads, tokens, wait

ALONE = {"tokens": Alone(0.5, 0.0005), "grads": Alone(0.0, 0.001)}  # 1,000 bytes: 1 s each


def step() -> list[Event]:
    """Ten seconds: two all-to-alls, the second under a piece of gradients that goes on after it."""
    return [
        compute("attention", 0, 2, layer=0),
        tokens("dispatch", 2, 3, layer=0),
        wait("dispatch", 2, 3, 1.0, layer=0),
        compute("experts", 3, 4, layer=0),
        compute("experts", 4, 5, layer=0, phase="B"),
        tokens("dispatch", 5, 8, layer=0, phase="B"),
        grads("dense.1", 4.5, 9),
        compute("shared", 5, 6, layer=0, phase="B"),
        wait("dispatch", 6, 8, 2.0, layer=0, phase="B"),
        wait("dense.1", 8, 9, 1.0, "grads", phase="B"),
        event("send", "measured", 9, 9.5, op="sum", axis="world", num_bytes=8, phase="U"),
        event("wait", "measured", 9, 9.5, exposed_s=0.5, op="sum", axis="world", phase="U"),
        compute("update dense.1", 9.5, 10, phase="U"),
    ]


def test_a_step_is_taken_apart_by_class() -> None:
    found = summary(step(), ALONE)
    assert (found.step_s, found.compute_s, found.idle_share) == (10, 5.5, pytest.approx(0.45))
    a2a, gradients, other = found.traffic["a2a"], found.traffic["grads"], found.traffic["other"]
    assert (a2a.wire_s, a2a.exposed_s, a2a.num_bytes, a2a.slowdowns) == (4, 3, 2000, (1, 3))
    assert a2a.under == {"compute": 0.25, "grads": 0.75, "params": 0, "other": 0}
    assert (gradients.wire_s, gradients.exposed_s, gradients.slowdowns) == (4.5, 1, (4.5,))
    assert gradients.under["a2a"] == pytest.approx(3 / 4.5)
    assert (other.wire_s, other.exposed_s, other.slowdowns) == (0.5, 0.5, ())
    assert found.traffic["params"].under == {}
    exposed_s = sum(traffic.exposed_s for traffic in found.traffic.values())
    assert exposed_s + found.compute_s == found.step_s  # each second is accounted for


def test_metrics_are_flat_numbers_and_none_where_there_is_no_number() -> None:
    metrics = summary(step(), ALONE).as_metrics()
    assert (metrics["a2a_exposed_s"], metrics["grads_exposed_s"], metrics["params_exposed_s"]) == (3, 1, 0)
    assert (metrics["a2a_slowdown"], metrics["a2a_slowdown_max"], metrics["a2a_under_grads"]) == (2, 3, 0.75)
    assert (metrics["a2a_bytes"], metrics["grads_bytes"], metrics["grads_slowdown"]) == (2000, 1000, 4.5)
    assert (metrics["grads_under_a2a"], metrics["grads_under_compute"]) == (pytest.approx(3 / 4.5), pytest.approx(1.5 / 4.5))
    assert metrics["params_under_grads"] is metrics["params_slowdown"] is None and "a2a_under_a2a" not in metrics
    assert all(value is None or isinstance(value, float | int) for value in metrics.values())
    for alone in ({}, {"tokens": Alone(0.0, 0.0)}):  # not calibrated; one rank
        metrics = summary(step(), alone).as_metrics()
        assert metrics["a2a_slowdown"] is metrics["a2a_slowdown_p95"] is metrics["grads_slowdown"] is None
    nobody = summary([compute("attention", 0, 1)], ALONE).as_metrics()
    assert (nobody["a2a_wire_s"], nobody["a2a_under_compute"], nobody["idle_share"]) == (0, None, 0)


def test_transfers_along_another_axis_than_the_calibrated_one_have_no_slowdown() -> None:
    copies = grads("experts.0", 0, 7, axis="copies")
    assert summary([*step(), copies], ALONE).traffic["grads"].slowdowns == (4.5,)


def test_two_transfers_at_once_are_on_the_wire_once() -> None:
    found = summary([compute("attention", 0, 1), tokens("dispatch", 0, 2), tokens("combine", 1, 3)], ALONE).traffic["a2a"]
    assert (found.wire_s, found.slowdowns) == (3, (2, 2))


def test_the_last_rank_to_come_says_how_long_a_transfer_took() -> None:
    early = [tokens("dispatch", 0, 10), tokens("combine", 20, 22)]
    late = [tokens("dispatch", 1008, 1010), tokens("combine", 1017, 1022)]  # another clock
    assert slowdowns([early, late], ALONE) == [2, 2]
    assert slowdowns([early], ALONE) == [2, 10]  # one rank alone can't tell waiting from sending


def test_the_rank_with_the_fullest_link_sets_the_measure() -> None:
    assert slowdowns([[tokens("dispatch", 0, 3, 100)], [tokens("dispatch", 0, 3, 5000)]], ALONE) == [1]
    assert slowdowns([[tokens("dispatch", 0, 3, 0)], [tokens("dispatch", 0, 3, 0)]], ALONE) == []  # nothing was routed away


def test_only_those_under_gradients_and_of_backward_are_picked() -> None:
    calm = [tokens("dispatch", 0, 1), tokens("dispatch", 2, 4, phase="B"), tokens("combine", 6, 9, phase="B")]
    crowded = [*calm, grads("dense.0", 3.5, 5)]
    assert slowdowns([calm, crowded], ALONE) == [1, 2, 3]
    assert slowdowns([calm, crowded], ALONE, under="grads") == [2]
    assert slowdowns([calm, crowded], ALONE, under="params") == []
    assert slowdowns([calm, crowded], ALONE, phase="B") == [2, 3]
    assert slowdowns([calm, crowded], ALONE, under="grads", phase="F") == []
    assert [t.beside for t in all_to_alls([calm, crowded], ALONE)] == [set(), {"grads"}, set()]


def test_touching_is_not_sharing() -> None:
    assert slowdowns([[tokens("dispatch", 0, 1), grads("dense.0", 1, 5)]], ALONE, under="grads") == []
    assert [t.beside for t in all_to_alls([[tokens("dispatch", 0, 1), tokens("combine", 1, 2)]], ALONE)] == [set(), set()]


def test_an_exchange_beside_another_one_is_not_alone() -> None:
    found = all_to_alls([[tokens("dispatch", 0, 2), tokens("dispatch", 1, 3, part="1"), tokens("combine", 5, 6)]], ALONE)
    assert [t.beside for t in found] == [{"tokens"}, {"tokens"}, set()]


def test_a_group_agrees_on_the_smallest_and_each_transfer_is_one_of_its_own() -> None:
    early, late = [tokens("dispatch", 0, 4), grads("dense.0", 5, 7)], [tokens("dispatch", 1, 4), grads("dense.0", 5, 8)]
    assert group_slowdowns([early, late], ALONE) == {"F:dispatch>.-.0": 3, "B:dense.0>.-.0": 2}


def test_spans_add_up_as_seconds_counted_one_by_one() -> None:
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([(s, s + rng.randrange(6)) for s in (rng.randrange(40) for _ in range(8))] for _ in "ab")
        seconds = [{t for start, end in spans for t in range(start, end)} for spans in (a, b)]
        assert length_s(union(a)) == len(seconds[0])
        assert shared_s(union(a), union(b)) == len(seconds[0] & seconds[1])
        each = [set(range(start, end)) for start, end in a]
        pairs = {frozenset((i, j)): s for i, j, s in overlaps(a)}
        assert pairs == {frozenset((i, j)): len(each[i] & each[j]) for i in range(8) for j in range(i) if each[i] & each[j]}
        assert all(a[i][0] <= a[j][0] for i, j, _ in overlaps(a))


def test_what_was_sent_before_the_step_began_does_not_make_it_longer() -> None:
    gathered = event("send", "dense.0", -3, 1, op="params", axis="dp", phase="U")
    found = summary([*step(), gathered], ALONE)
    assert (found.step_s, found.traffic["params"].wire_s) == (10, 4)


def test_messages_between_stages_are_a_class_of_their_own() -> None:
    assert "pp_exposed_s" not in summary(step(), ALONE).as_metrics()
    messages = [
        event("send", "stream", 0.0, 3.0, op="recv", axis="pp0-1", layer=1),
        wait("stream", 1.0, 3.0, 2.0, op="recv", layer=1),
        event("send", "stream", 2.0, 4.0, num_bytes=64, op="send", axis="pp0-1", layer=2),
    ]
    plain, piped = (summary(events, ALONE) for events in (step(), [*step(), *messages]))
    metrics = piped.as_metrics()
    assert (metrics["pp_exposed_s"], metrics["pp_wire_s"], metrics["pp_bytes"]) == (2.0, 4.0, 64)
    assert piped.traffic["other"] == replace(plain.traffic["other"], under=piped.traffic["other"].under)


def test_quantiles() -> None:
    values = [float(n) for n in range(1, 21)]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.95, 1.0)] == [1, 10.5, 19, 20]
    assert quantile([], 0.5) is None


def test_slowdowns_are_the_groups_where_it_tells_them() -> None:
    found = summary(step(), ALONE, {"B:dispatch>.0.0": 2.5}).traffic["a2a"]
    assert found.slowdowns == (1, 2.5)  # this rank alone would say 3: it came early
    assert (found.wire_s, found.exposed_s) == (4, 3)
