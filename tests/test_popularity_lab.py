"""tools/popularity_lab.py: replays are what a hand or a loop computes, traces are cut as --help says, bad input is one line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.config import InferConfig
from megalina.placement.controller import Policy
from megalina.placement.planners.greedy import greedy
from megalina.placement.planners.identity import identity
from megalina.placement.predictors.counts import WindowPredictor
from megalina.placement.predictors.predictor import Ids, Seen, choice_counts
from megalina.placement.routing_trace import RoutingTrace, counts_LE, traced, write_trace
from megalina.placement.split import even, load_aware
from megalina.placement.triggers import OrderedTop, always, never
from megalina.serve.policies import Served, policy_of
from placement_lab import replays
from placement_lab import report as lab_report
from placement_lab.input import CONTESTANTS, NEEDING_AHEAD, Lab, lab_of, modes_of
from placement_lab.offline import accuracy, balance, counts_of_batches, max_over_mean, replay
from placement_lab.oracle import OraclePredictor
from placement_lab.replays import PLANNERS, SPLITS, TRIGGERS, Contest, cases_of
from placement_lab.report import report
from tools import popularity_lab
from tools.popularity_lab import BAD_INPUT, MODES, asked_of, main

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"
E, K, L = 8, 2, 5
SMALL = "--batch-tokens 32 --devices 4 --slots 3"
REPLAYED = [name for name in CONTESTANTS if name not in NEEDING_AHEAD]  # of traces that don't say anything ahead


def drawn(
    seed: int, tokens: int = 160, *, layers: int = L, experts: int = E, top_k: int = K, sample: int = 20, name: str = "t"
) -> RoutingTrace:
    """Skewed choices, best first; samples of equal length."""
    random = np.random.default_rng(seed)
    score = random.random((tokens, layers, experts)) * random.exponential(size=(layers, experts))
    ids = np.argsort(-score, axis=2)[..., :top_k].astype(np.uint8)
    return traced(ids, experts, sample_lengths_S=np.full(tokens // sample, sample), name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces")
    for seed, name in enumerate("ab"):
        write_trace(path / f"{name}.npz", drawn(seed, name=name))
    write_trace(path / "short.npz", drawn(2, tokens=20, name="short"))
    write_trace(path / "one.npz", drawn(3, sample=160, name="one"))
    write_trace(path / "experts.npz", drawn(4, experts=12, name="experts"))
    write_trace(path / "layers.npz", drawn(4, layers=4, name="layers"))
    write_trace(path / "top3.npz", drawn(4, top_k=3, name="top3"))
    (path / "empty.npz").write_bytes(b"")
    (path / "foreign.npz").write_text("not a trace")
    np.savez(path / "other.npz", counts=np.ones(3))
    np.savez(path / "nothing.npz", expert_ids=np.zeros((0, L, K), np.uint8))
    return path


def words(folder: Path, text: str) -> list[str]:
    return [str(folder / word) if word.endswith(".npz") else word for word in text.split()]


def lab(folder: Path, text: str) -> Lab:
    return lab_of(asked_of(popularity_lab._parser().parse_args(words(folder, f"{SMALL} {text}"))))


# replays


def one_layer(*batches: Sequence[int]) -> list[Ids]:
    """Batches of top-1 tokens."""
    return [np.array(batch)[:, None, None] for batch in batches]


def test_loads_by_hand_of_a_window_that_is_one_batch_late() -> None:
    """Two devices of two slots.  Profile even: greedy puts 0, 2 and 1, 3 together.  After 0 0 0 1: 0 and 1
    apart, then 2 beside the smaller 1, and 3 beside 0.  After 3 3 3 2: 3 and 2 apart, then 0 beside 2, and 1 beside 3."""
    batches = one_layer([0, 0, 0, 1], [3, 3, 3, 2], [3, 3, 0, 0])
    policy = Policy(WindowPredictor(np.ones((1, 4))), greedy, even, never)
    found = replay(batches, policy, num_experts=4, num_devices=2, slots_per_device=2)
    assert found.load_BLN[:, 0].tolist() == [[3, 1], [3, 1], [2, 2]]
    assert found.moved_BL[:, 0].tolist() == [2, 2, 2]  # from 01 23 to 02 13, to 03 12, to 13 02
    assert found.local_BL[:, 0].tolist() == [3, 3, 4]  # all but rank 1's first row, twice
    assert found.expected_BLE is not None
    assert found.expected_BLE[:, 0].tolist() == [[0.25] * 4, [0.75, 0.25, 0, 0], [0, 0, 0.25, 0.75]]
    assert not found.replanned_BL.any()
    ratio_BL = max_over_mean(found.load_BLN)
    assert ratio_BL.tolist() == [[1.5], [1.5], [1.0]]
    assert balance(ratio_BL).median == 1.5


def test_nothing_moves_where_nothing_is_planned() -> None:
    found = replay(one_layer([0, 0, 0, 1], [3, 3, 2, 2]), Policy(None, None, even, never), num_experts=4, num_devices=2,
                   slots_per_device=3)  # fmt: skip
    assert found.load_BLN[:, 0].tolist() == [[4, 0], [0, 4]] and not found.moved_BL.any()
    assert found.expected_BLE is None


def test_the_second_phase_sees_what_the_router_chose() -> None:
    """Three slots a device: 0, of three rows, is on both, and rows can be split evenly."""
    batches = one_layer([0, 0, 0, 1], [0, 0, 0, 1])
    window = WindowPredictor(np.ones((1, 4)))
    found = replay(batches, Policy(window, greedy, load_aware, OrderedTop(2)), num_experts=4, num_devices=2, slots_per_device=3)
    assert found.replanned_BL[:, 0].tolist() == [False, False]  # of equal ones the lower is first: 0, 1 both times
    found = replay(one_layer([3, 3, 3, 1], [3, 3, 3, 1]), Policy(window, greedy, load_aware, OrderedTop(2)), num_experts=4,
                   num_devices=2, slots_per_device=3)  # fmt: skip
    assert found.replanned_BL[:, 0].tolist() == [True, False]
    assert found.moved_BL[:, 0].tolist() == [5, 0]  # from 01 23 to 012 013, to 013 123
    assert found.load_BLN[:, 0].tolist() == [[2, 2], [2, 2]]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name in REPLAYED if name not in ("none", "oracle")])
@given(seed=st.integers(0, 2**32 - 1), devices=st.sampled_from([1, 2, 4]), tokens=st.sampled_from([16, 29]))
def test_a_replay_is_the_loop_over_predictor_planner_and_split(name: str, seed: int, devices: int, tokens: int) -> None:
    """The predictor is asked of the whole batch here, of the ranks' slices there."""
    profile, trace = drawn(seed), drawn(seed + 1, tokens=4 * tokens, sample=4)
    batches = np.split(trace.expert_ids_TLK, 4)
    config = InferConfig(planner="greedy", slots_per_device=9, **CONTESTANTS[name])
    policy = policy_of(config, Served(E, K, devices), profile)
    found = replay(batches, policy, num_experts=E, num_devices=devices, slots_per_device=9)
    predictor = policy.predictor
    assert predictor is not None and found.expected_BLE is not None
    states = [predictor.start(layer) for layer in range(L)]
    for batch, ids_TLK in enumerate(batches):
        for layer in range(L):
            seen, chosen_TK = Seen(tuple(ids_TLK[:, i] for i in range(layer))), ids_TLK[:, layer]
            features = predictor.features(layer, seen)
            expected_E = predictor.expect(layer, features, states[layer])
            assert np.allclose(found.expected_BLE[batch, layer], expected_E, atol=1e-6)
            count_RE = np.array([choice_counts(p, E) for p in np.array_split(chosen_TK, devices)]).astype(np.int64)
            split_REN = even(count_RE, greedy(found.expected_BLE[batch, layer], devices, 9))
            assert found.load_BLN[batch, layer].tolist() == split_REN.sum((0, 1)).tolist()
            assert found.local_BL[batch, layer] == sum(split_REN[r, :, r].sum() for r in range(devices))
            assert found.counts_BLE[batch, layer].tolist() == count_RE.sum(0).tolist()
            evidence = predictor.evidence(layer, seen, chosen_TK)
            states[layer] = predictor.learn(layer, features, evidence, states[layer])


def test_an_oracle_is_always_right() -> None:
    batches = np.split(drawn(5).expert_ids_TLK, 4)
    oracle = OraclePredictor(counts_of_batches(batches, E))
    found = replay(batches, Policy(oracle, greedy, load_aware, never), num_experts=E, num_devices=4, slots_per_device=3)
    assert found.expected_BLE is not None
    was = accuracy(found.expected_BLE, found.counts_BLE, K)
    assert (was.same_list, was.recall, was.misordered, was.distance) == (1, 1, 0, pytest.approx(0))


def test_where_all_is_planned_anew_it_does_not_matter_who_foresaw() -> None:
    batches = np.split(drawn(5).expert_ids_TLK, 4)
    predictors = OraclePredictor(counts_of_batches(batches, E)), WindowPredictor(np.ones((L, E)))
    oracle, window = (
        replay(batches, Policy(p, greedy, even, always), num_experts=E, num_devices=4, slots_per_device=3) for p in predictors
    )
    assert oracle.replanned_BL.all() and window.replanned_BL.all() and np.array_equal(oracle.load_BLN, window.load_BLN)


def test_accuracy_by_hand() -> None:
    expected_BLE = np.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]])
    counts_BLE = np.array([[[4, 2, 3, 1], [1, 2, 3, 4]]])
    top1 = accuracy(expected_BLE, counts_BLE, 1)  # lists of two: 0, 1 for 0, 2; and 3, 2 as it is
    assert (top1.same_list, top1.recall, top1.misordered) == (0.5, 1.0, 1.0)
    assert top1.distance == pytest.approx(0.1)
    top2 = accuracy(expected_BLE, counts_BLE, 2)  # 0, 1 for 0, 2: one of two
    assert (top2.same_list, top2.recall) == (0.5, 0.75)
    turned = accuracy(np.array([[[0.2, 0.4, 0.3, 0.1]]]), np.array([[[3, 4, 1, 2]]]), 1)  # 1 2 0 3 for 1 0 3 2
    assert (turned.same_list, turned.recall, turned.misordered) == (0, 1, 3)
    ties = accuracy(np.full((1, 1, 4), 0.25), np.array([[[5, 5, 5, 5]]]), 2)
    assert (ties.same_list, ties.misordered) == (1, 0)


@pytest.mark.parametrize(
    ("batches", "devices", "slots", "said"),
    [
        ([], 2, 4, "there is no batch to replay"),
        ([[0]], 2, 4, "a batch of 1 tokens can't be shared by 2 devices"),
        ([[0, 1]], 2, 1, "4 experts need as many slots, but 2 devices of 1 slots have 2"),
    ],
)
def test_what_cannot_be_replayed(batches: list[list[int]], devices: int, slots: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replay(one_layer(*batches), Policy(None, None, even, never), num_experts=4, num_devices=devices, slots_per_device=slots)


# which part of a trace is used


@pytest.mark.parametrize(
    ("arguments", "train", "serve"),
    [
        ("--serve a.npz", {"a": 80}, {"a": 80}),
        ("--train a.npz", {"a": 80}, {"a": 80}),
        ("--train a.npz --serve b.npz", {"a": 160}, {"b": 160}),
        ("--train a.npz --serve a.npz b.npz", {"a": 80}, {"a": 80, "b": 160}),
        ("--train a.npz b.npz --serve a.npz b.npz", {"a": 80, "b": 80}, {"a": 80, "b": 80}),
        ("--train b.npz a.npz --serve b.npz", {"b": 80, "a": 160}, {"b": 80}),
    ],
)
def test_a_trace_that_is_given_to_both_is_cut_in_halves(
    folder: Path, arguments: str, train: dict[str, int], serve: dict[str, int]
) -> None:
    found = lab(folder, arguments)
    assert {trace["name"]: trace["tokens"] for trace in found.settings["train"]} == train
    assert {t["name"]: t["tokens"] for t in found.settings["serve"]} == {
        name: tokens // 32 * 32 for name, tokens in serve.items()
    }
    whole = {name: drawn(seed, name=name) for seed, name in enumerate("ab")}
    trained = [whole[name].expert_ids_TLK[:tokens] for name, tokens in train.items()]
    assert np.array_equal(found.profile.expert_ids_TLK, np.concatenate(trained))
    served = [whole[name].expert_ids_TLK[-tokens:][: tokens // 32 * 32] for name, tokens in serve.items()]
    assert np.array_equal(np.concatenate(list(found.batches)), np.concatenate(served))


def test_served_traces_take_turns_batch_by_batch(folder: Path) -> None:
    found = lab(folder, "--train one.npz --serve a.npz b.npz --alternate")
    a, b = (drawn(seed).expert_ids_TLK for seed in (0, 1))
    assert len(found.batches) == 10
    for turn, batch in enumerate(found.batches):
        at = turn // 2 * 32
        assert np.array_equal(batch, (a, b)[turn % 2][at : at + 32])


def test_a_link_to_a_trace_is_the_trace(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (tmp_path / "link.npz").symlink_to(folder / "a.npz")
    arguments = ["--train", "a.npz", "--serve", str(tmp_path / "link.npz"), *SMALL.split()]
    assert lab_of(asked_of(popularity_lab._parser().parse_args(arguments))).settings["train"][0]["tokens"] == 80


def test_first_choices_of_merged_experts(folder: Path) -> None:
    found = lab(folder, "--train b.npz --serve a.npz --top1-experts 4")
    first = drawn(0).expert_ids_TLK[:, :, :1] // 2
    assert (found.served.num_experts, found.served.top_k) == (4, 1)
    assert np.array_equal(np.concatenate(list(found.batches)), first)


def test_a_sample_of_many_experts_and_all_of_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lab(folder, "--train b.npz --serve a.npz --first-layer 1 --warm-up-batches 1")
    every = [(batch, layer) for batch in range(1, 5) for layer in range(1, L)]
    assert cases_of(found, 0) == every
    monkeypatch.setattr(replays, "SMALL", E - 1)
    sample = cases_of(found, 7)
    assert len(sample) == replays.SAMPLE == len(set(sample)) and set(sample) < set(every) and sample == sorted(sample)
    assert sample == cases_of(found, 7) != cases_of(found, 8)


# the tool


@pytest.fixture(scope="module")
def ran(folder: Path) -> Path:
    out = folder / "out"
    out.mkdir()
    files = ["--json", str(out / "lab.json"), "--plot", str(out / "lab.png")]
    assert main([*words(folder, f"{SMALL} --train a.npz b.npz --serve a.npz b.npz --alternate --optimum"), *files]) == 0
    return out


def read(ran: Path) -> dict[str, Any]:
    return json.loads((ran / "lab.json").read_text())


@pytest.mark.full
def test_the_files_are_whole_and_alone(ran: Path) -> None:
    assert sorted(path.name for path in ran.iterdir()) == ["lab.json", "lab.png"]
    assert (ran / "lab.png").read_bytes().startswith(b"\x89PNG") and (ran / "lab.png").stat().st_size > 10_000


def test_the_json_has_every_combination(ran: Path) -> None:
    result = read(ran)
    assert list(result["predictors"]) == list(result["load_aware"]) == REPLAYED
    assert set(result["skipped_predictors"]) == set(NEEDING_AHEAD)
    assert {p: tuple(splits) for p, splits in result["planners"].items()} == dict.fromkeys(PLANNERS, SPLITS)
    assert {t: tuple(splits) for t, splits in result["triggers"].items()} == dict.fromkeys(TRIGGERS, SPLITS[:2])
    assert set(result["modes"]) == {"static", "lina", "lina_paper", "window", "best", "profile"}
    assert set(result["skipped_modes"]) == {"ideal", "lookahead"}
    assert result["best"] in set(REPLAYED) - {"none", "oracle"}
    assert (
        result["settings"] | {"experts": E, "top_k": K, "layers": L, "devices": 4, "slots": 3, "batches": 4} == result["settings"]
    )
    rows = [*result["predictors"].values(), *result["load_aware"].values(), *result["modes"].values()]
    rows += [row for table in ("planners", "triggers") for of in result[table].values() for row in of.values()]
    for row in rows:
        assert 1 <= row["median"] <= row["p95"] <= 4
    for name, row in result["predictors"].items():
        assert ("recall" in row, "predictor_us" in row, "planner_us" in row) == (name != "none",) * 3
    assert result["predictors"]["oracle"]["same_list"] == 1


def test_the_numbers_fit_together(ran: Path) -> None:
    result = read(ran)
    best, predictors = result["best"], result["predictors"]
    assert min(predictors[name]["p95"] for name in set(REPLAYED) - {"none", "oracle"}) == predictors[best]["p95"]
    assert result["planners"]["greedy"]["even"]["p95"] == predictors[best]["p95"] == result["triggers"]["never"]["even"]["p95"]
    assert result["planners"]["none"]["even"]["median"] == predictors["none"]["median"] == result["modes"]["static"]["median"]
    assert result["triggers"]["always"]["even"]["median"] == predictors["oracle"]["median"]
    assert result["triggers"]["never"]["even"]["replanned"] == 0
    assert result["modes"]["window"]["p95"] == predictors["window"]["p95"] or result["modes"]["window"]["slots"] != 3
    for name in REPLAYED:
        assert result["load_aware"][name]["median"] <= predictors[name]["median"] + 1e-12
    optimum = result["optimum"]
    assert optimum["cases"] == optimum["of"] == 4 * 2 and optimum["not_found"] == optimum["not_proven"] == 0
    for rival in optimum["over_optimum"].values():  # it splits rows at will, the even split doesn't
        assert 1 <= rival["median"] <= rival["max"]


def test_the_tables_say_what_the_json_says(folder: Path, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print(report(read(ran)))
    out = capsys.readouterr().out
    assert all(len(line) <= 220 for line in out.splitlines())
    load = read(ran)["predictors"]["window"]
    line = next(line for line in out.splitlines() if line.startswith("window "))
    assert f"{load['median']:.3f} / {load['p95']:.3f}" in line
    assert out.count("not replayed, it needs ahead_ids, which traces lack: a, b;") == 2  # a line for predictors, one for modes
    assert "all)" in out and "trained on a (80 tokens), b (80 tokens)" in out


def test_equal_input_gives_equal_numbers(folder: Path, ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--predictors", "window,online_map,window", "--json", str(tmp_path / "lab.json")]
    assert main([*words(folder, f"{SMALL} --train a.npz b.npz --serve a.npz b.npz --alternate"), *some]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n\n") == 4 and "replays" in captured.err  # five tables, no optimum
    again, before = json.loads((tmp_path / "lab.json").read_text()), read(ran)
    assert list(again["predictors"]) == ["window", "online_map"] and again["optimum"] is None
    for name in again["predictors"]:
        assert without_times(again["predictors"][name]) == without_times(before["predictors"][name])
    assert {m: without_times(row) for m, row in again["modes"].items()} == {
        m: without_times(r) for m, r in before["modes"].items()
    }


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith("_us")}


def test_what_warms_up_does_not_count(folder: Path) -> None:
    full, warm = (lab(folder, f"--train a.npz --serve b.npz --warm-up-batches {n}") for n in (0, 2))
    contests = [Contest(found) for found in (full, warm)]
    rows = [contest.row("window", "even") for contest in contests]
    load_BLN = contests[0].loads["window", "even", "greedy", "never"]
    assert np.array_equal(load_BLN, contests[1].loads["window", "even", "greedy", "never"])  # served all the same
    for row, first in zip(rows, (0, 2), strict=True):
        assert row["median"] == np.median(load_BLN[first:, 3:].max(-1) / load_BLN[first:, 3:].mean(-1))


def test_modes_have_room_for_all_experts(folder: Path) -> None:
    found = lab(folder, "--train a.npz --serve b.npz")
    assert {name: config.slots_per_device for name, config in modes_of(MODES, found)[0].items()} == {
        "best": 3, "lina": 4, "lina_paper": 4, "profile": 3, "static": 3, "window": 3,
    }  # fmt: skip
    wide = lab(folder, "--train a.npz --serve b.npz --devices 1 --slots 9")
    assert modes_of(MODES, wide)[0]["lina"].slots_per_device == 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "there is no trace: give --train, --serve or both"),
        ("--serve none.npz", "none.npz: No such file or directory"),
        ("--serve empty.npz", "empty.npz is no routing trace, or damaged"),
        ("--serve foreign.npz", "foreign.npz is no routing trace, or damaged"),
        ("--serve other.npz", "other.npz is no routing trace: it has no array expert_ids"),
        ("--serve nothing.npz", "nothing.npz: trace nothing is empty"),
        ("--serve one.npz", "trace one is one sample of 160 tokens: halves need two samples or more"),
        ("--serve a.npz a.npz", "--serve names the same trace twice"),
        ("--train a.npz --serve experts.npz", "not of one shape of model: 8 and 12 experts"),
        ("--train a.npz --serve layers.npz", "layers [0, 1, 2, 3, 4] and [0, 1, 2, 3]"),
        ("--train a.npz --serve top3.npz", "top-2 and top-3"),
        ("--train a.npz --serve short.npz", "short has 20 tokens to serve, no batch of 32: lower --batch-tokens"),
        ("--serve a.npz --slots 1", "--slots 1: 4 devices then have 4 slots for 8 experts; give 2 or more"),
        ("--serve a.npz --devices 33", "--devices 33: a batch of 32 tokens has none for some; raise --batch-tokens"),
        ("--serve a.npz --first-layer 5", "--first-layer 5: the traces' MoE layers are 0 to 4"),
        ("--serve a.npz --warm-up-batches 2", "--warm-up-batches 2 of 2 leaves none that counts"),
        ("--serve a.npz --devices-per-node 3", "--devices-per-node 3 must divide 4 devices"),
        ("--serve a.npz --experts 4", "a.npz: it says that there are 8 experts, not 4"),
        ("--serve a.npz --top1-experts 3", "8 experts can't be merged to 3: take a divisor"),
        ("--serve a.npz --predictors look_ahead", "--predictors look_ahead needs ahead_ids, which traces lack: a; record them"),
        ("--serve a.npz --predictors windov", "--predictors windov: there are none, static, window"),
        ("--serve a.npz --predictors none", "--predictors none predicts nothing: name another one too"),
        ("--serve a.npz --plot x.gif", "--plot x.gif: the name must end in .png or .svg"),
        ("--serve a.npz --json /no/such/x.json", "--json /no/such/x.json: there is no folder /no/such"),
        ("--serve a.npz --json /tmp", "--json /tmp is a folder: name a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    files = ["--json", str(tmp_path / "x.json")] if "--json" not in arguments else []
    assert main([*words(folder, SMALL), *files, *words(folder, arguments)]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1) and list(tmp_path.iterdir()) == []


def test_files_stay_as_they_were_where_one_cannot_be_written(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lab.json").write_text("before")

    def full(path: Path, result: object) -> None:
        path.write_bytes(b"half a picture")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(lab_report, "draw", full)
    args = popularity_lab._parser().parse_args(["--json", str(tmp_path / "lab.json"), "--plot", str(tmp_path / "lab.png")])
    assert popularity_lab.write(read(ran), args) == BAD_INPUT
    assert capsys.readouterr().err.endswith("No space left on device\n")
    assert (tmp_path / "lab.json").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_without_a_solver_the_optimum_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(popularity_lab, "find_spec", lambda name: None)
    assert main(words(folder, f"{SMALL} --serve a.npz --optimum")) == BAD_INPUT
    assert capsys.readouterr().err == "--optimum needs scipy, which is not installed: pip install 'megalina[dev]'\n"


# real traces


@pytest.mark.full
def test_real_traffic_that_alternates_is_foreseen(capsys: pytest.CaptureFixture[str]) -> None:
    """Both tasks trained on: the window fails, the online map doesn't; a load-aware split takes what is left."""
    paths = [TRACES / f"esft_dsv2lite_{task}.npz" for task in ("summary", "translation")]
    if missing := [path.name for path in paths if not path.is_file()]:
        pytest.skip(f"no real trace: {', '.join(missing)} not in ../shared/data/traces")
    arguments = ["--train", *map(str, paths), "--serve", *map(str, paths), "--alternate"]
    contest = Contest(lab_of(asked_of(popularity_lab._parser().parse_args(arguments))))
    assert contest.row("window", "even")["p95"] > 1.8
    assert contest.row("online_map", "even")["p95"] <= 1.15
    assert contest.row("online_map", "load_aware")["p95"] <= 1.01
    assert counts_LE(contest.lab.profile).sum() == 8005 * 26 * 6


def test_identity_is_where_a_replay_begins() -> None:
    found = replay(one_layer([0, 1, 2, 3]), Policy(None, None, even, never), num_experts=4, num_devices=2, slots_per_device=2)
    assert identity(np.ones(4), 2, 2).slots == ((0, 1), (2, 3)) and found.load_BLN[0, 0].tolist() == [2, 2]
    assert found.local_BL[0, 0] == 4
