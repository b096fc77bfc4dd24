"""Path profile and predictor: counts of what came next by path, exact over ranks; unknown paths fall back, no token gets lost."""

from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.placement.path_counts import (
    Profile,
    counted,
    empty_profile,
    first_choice,
    path_codes,
    profile_of,
)
from megalina.placement.predictors.path_table import PathTablePredictor
from megalina.placement.predictors.predictor import Predictor, Seen
from megalina.placement.routing_trace import alternate, best_first, halves, joined, merged_experts, read_trace, top1, traced

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
Chosen = list[np.ndarray[Any, Any]]


@st.composite
def choices(draw: st.DrawFn, num_experts: int = 4, top_k: int = 2, num_layers: int = 5, nobody: bool = True) -> Chosen:
    """[T, K] of each layer; some choices went to nobody, and some tokens are padding."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = draw(st.integers(0, 30))
    ids = np.argsort(random.random((num_layers, tokens, num_experts)), axis=2)[..., :top_k]
    if nobody and draw(st.booleans()):
        ids[random.random(ids.shape) < 0.2] = num_experts
        ids[:, random.random(tokens) < 0.2] = num_experts
    return list(ids)


def empty(**changed: Any) -> Profile:
    model: dict[str, Any] = {"num_experts": 4, "top_k": 2, "layers": range(5), "longest": 3}
    return empty_profile(**(model | changed))


def same(a: Profile, b: Profile) -> bool:
    x, y = ([table for of_layer in profile.tables for table in of_layer] for profile in (a, b))
    tables = all(
        np.array_equal(t.codes_P, u.codes_P) and np.array_equal(t.counts_PE, u.counts_PE) and t.pruned == u.pruned
        for t, u in zip(x, y, strict=True)
    )
    return tables and all(getattr(a, f.name) == getattr(b, f.name) for f in fields(Profile) if f.name != "tables")


def in_loops(chosen: Chosen, longest: int, num_experts: int) -> list[dict[tuple[int, ...], Counter[int]]]:
    """[layer]: path -> next choices, said as plainly as can be."""
    found: list[dict[tuple[int, ...], Counter[int]]] = []
    for layer in range(len(chosen)):
        of_path: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for token in range(len(chosen[0])):
            firsts = [next((int(e) for e in c[token] if e < num_experts), num_experts) for c in chosen[:layer]]
            if firsts and firsts[-1] == num_experts:
                continue
            for length in range(min(layer, longest) + 1):
                of_path[tuple(firsts[layer - length :])].update(int(e) for e in chosen[layer][token] if e < num_experts)
        found.append(of_path)
    return found


# counting


@given(choices(), st.integers(1, 4))
def test_counts_are_what_loops_count(chosen: Chosen, longest: int) -> None:
    profile = counted(empty(longest=longest), chosen)
    assert profile.tokens == len(chosen[0]) and not profile.pruned
    for of_layer, of_path in zip(profile.tables, in_loops(chosen, longest, 4), strict=True):
        got: dict[tuple[int, ...], list[int]] = {}
        for length, table in enumerate(of_layer):
            for code, counts_E in zip(table.codes_P.tolist(), table.counts_PE.tolist(), strict=True):
                got[tuple(code // 5**power % 5 for power in reversed(range(length)))] = counts_E
        assert got == {path: [counter[e] for e in range(4)] for path, counter in of_path.items()}


@given(choices(), st.integers(0, 30))
def test_what_is_counted_in_parts_is_what_is_counted_at_once(chosen: Chosen, cut: int) -> None:
    first = counted(empty(), [c[:cut] for c in chosen])
    assert same(counted(first, [c[cut:] for c in chosen]), counted(empty(), chosen))


@given(st.lists(choices(), min_size=1, max_size=4), st.integers(4, 8))
def test_memory_stays_bounded_and_what_stays_is_what_most_came_by(batches: list[Chosen], most_paths: int) -> None:
    profile, exact = empty(most_paths=most_paths), empty()
    for chosen in batches:
        profile, exact = counted(profile, chosen), counted(exact, chosen)
    assert profile.num_bytes <= len(profile.layers) * (1 + profile.longest * most_paths) * 8 * 5
    for of_layer, of_exact in zip(profile.tables, exact.tables, strict=True):
        assert np.array_equal(of_layer[0].counts_PE, of_exact[0].counts_PE)  # the marginal is never pruned
        for table, true in zip(of_layer, of_exact, strict=True):
            assert len(table.codes_P) <= most_paths and table.pruned == (len(true.codes_P) > most_paths)
            true_PE = true.counts_PE[np.searchsorted(true.codes_P, table.codes_P)]
            assert (table.counts_PE <= true_PE).all()
            if len(batches) == 1 and table.pruned:
                order = np.lexsort((true.codes_P, -true.counts_PE.sum(1)))[: most_paths - most_paths // 4]
                assert table.codes_P.tolist() == sorted(true.codes_P[order].tolist())


def test_of_paths_as_frequent_the_lower_codes_stay() -> None:
    firsts = np.arange(8).repeat(2)[:, None]
    profile = counted(empty(num_experts=8, top_k=1, layers=(0, 1), longest=1, most_paths=4), [firsts, firsts])
    assert profile.tables[1][1].codes_P.tolist() == [0, 1, 2] and profile.pruned


def test_a_path_is_a_number_with_the_latest_choice_last() -> None:
    chosen = [np.array([[1, 0]]), np.array([[4, 2]]), np.array([[4, 4]]), np.array([[3, 1]])]
    assert path_codes(chosen, 4, 4).tolist() == [((1 * 5 + 2) * 5 + 4) * 5 + 3]
    assert path_codes(chosen, 1, 4).tolist() == [3] and path_codes(chosen, 0, 4).tolist() == [0]
    assert first_choice(np.array([[4, 4, 2], [1, 4, 0], [4, 4, 4]]), 4).tolist() == [2, 1, 4]
    many = [np.full((1, 1), 255, np.uint8)] * 7
    assert path_codes(many, 7, 256).tolist() == [sum(255 * 257**power for power in range(7))]  # not cut to eight bits


def test_what_makes_no_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="9 layers of 128 experts have no room in 63 bits"):
        empty(num_experts=128, longest=9)
    for changed, message in (({"top_k": 5}, "1 to 4 choices"), ({"layers": ()}, "0 layers"), ({"longest": 0}, "longest path 0")):
        with pytest.raises(ValueError, match=message):
            empty(**changed)
    ids = np.zeros((2, 2), np.int64)
    with pytest.raises(ValueError, match="choices of 4 layers can't be counted in a profile of 5"):
        counted(empty(), [ids] * 4)
    with pytest.raises(ValueError, match=r"layer 1's choices are \[3, 2\], but the profile counts \[2, 2\]"):
        counted(empty(), [ids, np.zeros((3, 2), np.int64), ids, ids, ids])
    with pytest.raises(ValueError, match="layer 4's choices go from 5 to 5, but the profile has experts 0 to 3"):
        counted(empty(), [ids, ids, ids, ids, ids + 5])


# the predictor


def expected_rows(
    profile_chosen: Chosen, seen: Chosen, longest: int, kept: int | None, renormalise: bool
) -> np.ndarray[Any, Any]:
    """Token by token: the longest path that was met."""
    layer = len(seen)
    of_path = in_loops(profile_chosen, longest, 4)[layer]
    rows_E = np.zeros(4)
    for token in range(len(seen[0])):
        firsts = [next((int(e) for e in c[token] if e < 4), 4) for c in seen]
        if firsts[-1] == 4:
            continue
        for length in range(min(longest, layer), -1, -1):
            counter = of_path.get(tuple(firsts[layer - length :]))
            if counter is not None and counter.total():
                likeliest = sorted(range(4), key=lambda e: (-counter[e], e))[:kept]
                total = sum(counter[e] for e in likeliest) if renormalise else counter.total()
                for expert in likeliest:
                    rows_E[expert] += counter[expert] / total
                break
    return rows_E


@given(
    choices(), choices(), st.integers(1, 3), st.sampled_from([None, 1, 2, 4]), st.booleans(), st.integers(1, 4), st.integers(1, 3)
)
def test_each_token_does_what_those_on_its_longest_known_path_did(
    past: Chosen, now: Chosen, longest: int, kept: int | None, renormalise: bool, layer: int, shorter: int
) -> None:
    profile = counted(empty(longest=longest), past)
    if any(not tables[0].counts_PE.any() for tables in profile.tables):
        with pytest.raises(ValueError, match="counted nothing in MoE layers"):
            PathTablePredictor(profile)
        return
    used = min(longest, shorter)
    predictor: Predictor = PathTablePredictor(profile, longest=used, kept=kept, renormalise=renormalise)
    rows_E = predictor.features(layer, Seen(tuple(now[:layer])))
    assert rows_E.shape == (4,) and rows_E.dtype == np.float64
    np.testing.assert_allclose(rows_E, expected_rows(past, now[:layer], used, kept, renormalise), rtol=1e-5, atol=1e-6)
    if kept is None or renormalise:  # a token is worth a token
        assert abs(rows_E.sum() - (now[layer - 1] != 4).any(1).sum()) < 1e-4
    shares_E = predictor.expect(layer, rows_E, predictor.start(layer))
    assert (shares_E >= 0).all() and abs(shares_E.sum() - 1) < 1e-9
    parts = [predictor.features(layer, Seen(tuple(c[part] for c in now[:layer]))) for part in (slice(7), slice(7, None))]
    np.testing.assert_allclose(parts[0] + parts[1], rows_E, rtol=1e-5, atol=1e-6)  # ranks agree by sums


def test_a_layer_that_follows_from_the_one_before_is_foreseen_exactly() -> None:
    random = np.random.default_rng(0)
    start = random.integers(0, 8, 1000)
    chosen = [((start * 3 + layer) % 8)[:, None] for layer in range(4)]
    profile = counted(empty(num_experts=8, top_k=1, layers=range(4)), chosen)
    predictor = PathTablePredictor(profile, longest=1)
    now = [c[:100] for c in chosen]
    for layer in range(1, 4):
        rows_E = predictor.features(layer, Seen(tuple(now[:layer])))
        assert rows_E.tolist() == np.bincount(now[layer][:, 0], minlength=8).tolist()


def test_two_layers_tell_what_one_does_not() -> None:
    """The third layer's choice is the parity of the first two: one layer says nothing, two say all."""
    a, b = np.array([0, 0, 1, 1] * 5)[:, None], np.array([0, 1, 0, 1] * 5)[:, None]
    profile = counted(empty(num_experts=2, top_k=1, layers=range(3), longest=2), [a, b, a ^ b])
    seen = Seen((np.array([[0], [1]]), np.array([[1], [0]])))
    assert PathTablePredictor(profile).features(2, seen).tolist() == [0, 2]
    assert PathTablePredictor(profile, longest=1).features(2, seen).tolist() == [1, 1]
    assert PathTablePredictor(profile, least_rows=6).features(2, seen).tolist() == [1, 1]  # 5 rows came each path of two


def test_before_the_first_layer_and_without_a_token_the_marginal_is_expected() -> None:
    chosen = [np.array([[0, 1], [0, 2]])] * 5
    predictor = PathTablePredictor(counted(empty(), chosen), kept=1)
    for layer, seen in ((0, Seen(())), (2, Seen((np.zeros((0, 2), np.int64),) * 2)), (1, Seen((np.full((3, 2), 4),)))):
        rows_E = predictor.features(layer, seen)
        assert rows_E.tolist() == [0, 0, 0, 0] and predictor.expect(layer, rows_E, None).tolist() == [0.5, 0.25, 0.25, 0]
    evidence = predictor.evidence(1, Seen((chosen[0],)), chosen[1])
    assert evidence.shape == (0,) and predictor.learn(1, rows_E, evidence, None) is None


def test_the_papers_estimate_keeps_probabilities_of_the_likeliest_alone() -> None:
    past = [np.array([[0], [0], [0], [1], [1], [1], [1]]), np.array([[2], [2], [3], [0], [1], [2], [3]])]
    profile = counted(empty(num_experts=4, top_k=1, layers=range(2)), past)
    seen = Seen((np.array([[0], [1]]),))
    rows_E = PathTablePredictor(profile, kept=1).features(1, seen)
    np.testing.assert_allclose(rows_E, [0.25, 0, 2 / 3, 0], rtol=1e-6)  # of four equals the lowest id
    assert PathTablePredictor(profile, kept=1, renormalise=True).features(1, seen).tolist() == [1, 0, 1, 0]


def test_knobs_that_make_no_sense_are_refused() -> None:
    profile = counted(empty(), [np.array([[0, 1]])] * 5)
    wrong: list[tuple[dict[str, Any], str]]
    wrong = [({"longest": 4}, "has those of 1 to 3"), ({"longest": 0}, "1 to 3"), ({"kept": 5}, "take 1 to 4")]
    for knobs, message in wrong:
        with pytest.raises(ValueError, match=message):
            PathTablePredictor(profile, **knobs)
    with pytest.raises(ValueError, match=r"counted nothing in MoE layers \[0, 1, 2, 3, 4\]"):
        PathTablePredictor(empty())


# real traces


def test_on_real_traces_earlier_layers_know_more_than_the_marginal() -> None:
    paths = [TRACES / f"esft_dsv2lite_{task}.npz" for task in ("summary", "translation")]
    if not all(path.is_file() for path in paths):
        pytest.skip("no real traces: esft_dsv2lite_*.npz are not in ../shared/data/traces")
    both = [halves(merged_experts(top1(best_first(read_trace(path))), 16)) for path in paths]
    known, served = joined([a for a, _ in both]), [b for _, b in both]
    profile = profile_of(known)
    assert (profile.num_experts, profile.top_k, profile.layers) == (16, 1, tuple(range(1, 27)))
    predictor = PathTablePredictor(profile)
    off_path, off_marginal = [], []
    for batch in alternate(served, 1024, drop_last=True):
        for layer in range(3, 26, 4):
            seen = Seen(tuple(batch[:, before] for before in range(layer)))
            shares_E = predictor.expect(layer, predictor.features(layer, seen), None)
            true_E = np.bincount(batch[:, layer].ravel(), minlength=16) / len(batch)
            off_path.append(np.abs(shares_E - true_E).sum())
            off_marginal.append(np.abs(predictor.expect(layer, np.zeros(16), None) - true_E).sum())
    assert np.mean(off_path) < 0.6 * np.mean(off_marginal)


def test_a_trace_is_profiled_as_its_choices_are() -> None:
    ids = np.argsort(np.random.default_rng(1).random((40, 5, 4)), axis=2)[..., :2].astype(np.uint8)
    assert same(profile_of(traced(ids, 4)), counted(empty(), [ids[:, layer] for layer in range(5)]))
