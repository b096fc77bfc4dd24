"""Routing as vLLM returns it: arrays and completions come in whatever their padding, and go out again; what is odd is named."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalina.placement.routed_experts import Routed, from_arrays, from_json_lines, to_arrays
from megalina.placement.router_replay import RouterReplay
from megalina.placement.routing_trace import RoutingTrace

MODEL = Routed(num_experts=5, layers=(1, 2, 4), num_layers=5)
LENGTHS = [6, 4, 2]
B, S, L, K = 3, 6, 3, 2


def ids_of(tokens: int, layers: int = L, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((tokens, layers, 5)).argsort(2)[..., :K].astype(np.int16)


ROUTED = [ids_of(n, seed=n) for n in LENGTHS]
TOKENS = [np.arange(n) + 10 * n for n in LENGTHS]


def padded(arrays: list[np.ndarray[Any, Any]], fill: int, *, left: bool = False) -> np.ndarray[Any, Any]:
    out = np.full((B, S, *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[S - len(array) if left else 0 : S if left else len(array)] = array
    return out


def same(trace: RoutingTrace, routed: list[np.ndarray[Any, Any]], tokens: list[np.ndarray[Any, Any]]) -> bool:
    assert trace.text is not None and trace.layers == MODEL.layers and trace.num_experts == 5
    lengths = trace.sample_lengths_S.tolist() == [len(of) for of in tokens]
    return lengths and all(
        np.array_equal(got, np.concatenate(want)) for got, want in ((trace.expert_ids_TLK, routed), (trace.text.tokens_T, tokens))
    )


@pytest.mark.parametrize("dummy", [-1, 3])  # what stands in padding is nobody's
def test_padding_behind_and_in_front_is_left_out(dummy: int) -> None:
    lengths = np.array(LENGTHS)
    behind = from_arrays(padded(ROUTED, dummy), padded(TOKENS, 0), MODEL, lengths_B=lengths)
    assert same(behind, ROUTED, TOKENS)
    mask_BS = np.arange(S) >= S - lengths[:, None]
    front = from_arrays(padded(ROUTED, dummy, left=True), padded(TOKENS, 0, left=True), MODEL, mask_BS=mask_BS.astype(np.int64))
    assert same(front, ROUTED, TOKENS)


def test_the_last_token_of_a_sequence_may_lack_its_route() -> None:
    """A server never reads the last token that it has sampled."""
    short = [of[:-1] for of in ROUTED]
    trace = from_arrays(padded(short, -1)[:, : S - 1], padded(TOKENS, 0), MODEL, lengths_B=np.array(LENGTHS))
    assert same(trace, short, [of[:-1] for of in TOKENS])


def test_layers_without_experts_are_left_out() -> None:
    wide = [np.zeros((n, 5, K), np.int16) for n in LENGTHS]
    for of, routed in zip(wide, ROUTED, strict=True):
        of[:, list(MODEL.layers)] = routed
    assert same(from_arrays(padded(wide, -1), padded(TOKENS, 0), MODEL, lengths_B=np.array(LENGTHS)), ROUTED, TOKENS)


def test_arrays_that_go_out_come_back() -> None:
    trace = from_arrays(padded(ROUTED, -1), padded(TOKENS, 0), MODEL, lengths_B=np.array(LENGTHS))
    found = to_arrays(trace)
    assert found["routed_experts"].shape == (B, S, L, K) and found["routed_experts"].dtype == np.int16
    assert np.array_equal(found["routed_experts"], padded(ROUTED, -1))
    again = from_arrays(found["routed_experts"], found["tokens"], MODEL, lengths_B=found["lengths"])
    assert same(again, ROUTED, TOKENS)


def test_holes_are_left_to_the_router_where_that_is_asked_for() -> None:
    holed = padded(ROUTED, -1)
    holed[0, 1:3] = holed[0, 5] = -1
    trace = from_arrays(holed, padded(TOKENS, 0), MODEL, lengths_B=np.array(LENGTHS), holes=True)
    assert trace.text is not None and trace.text.known_T is not None
    assert (~trace.text.known_T).nonzero()[0].tolist() == [1, 2, 5]
    replay = RouterReplay(trace)
    assert np.array_equal(replay.choices(TOKENS[0], "it"), holed[0])
    assert np.array_equal(replay.choices(TOKENS[1], "it"), ROUTED[1])
    assert np.array_equal(to_arrays(trace)["routed_experts"], holed)


def changed(place: tuple[int, ...], value: int) -> np.ndarray[Any, Any]:
    out = padded(ROUTED, -1)
    out[place] = value
    return out


ARRAYS = [
    ((changed((0, 2, 1, 0), 5), padded(TOKENS, 0), {}), r"sequence 0: token 2 goes to expert 5 in layer 2, .* 0 to 4: places"),
    ((changed((0, 2, 1, 0), ROUTED[0][2, 1, 1]), padded(TOKENS, 0), {}), "token 2 goes to an expert twice in layer 2"),
    ((changed((0, 2), -1), padded(TOKENS, 0), {}), "sequence 0 lacks the routes of token 2, but has later ones"),
    ((padded(ROUTED, -1), padded(TOKENS, 0), {"lengths_B": None}), "sequence 1 has routes of 4 of 6 tokens; only the last may"),
    ((padded(ROUTED, -1)[:, :3], padded(TOKENS, 0), {}), "routed_experts are of 3 tokens a sequence, and tokens has 6"),
    ((padded(ROUTED, -1)[:, :, :2], padded(TOKENS, 0), {}), "sequence 0 is of 2 layers, and the model has 3 with experts and 5"),
    ((padded(ROUTED, -1)[0, 0], padded(TOKENS, 0), {}), r"routed_experts must be integers \[B, S, L, K\], not int16 \[3, 2\]"),
    ((padded(ROUTED, -1) * 1.0, padded(TOKENS, 0), {}), "routed_experts must be integers .* not float64"),
    ((padded(ROUTED, -1), padded(TOKENS, 0)[:2], {}), r"tokens must be integers \[3, S\] beside"),
    ((padded(ROUTED, -1), padded(TOKENS, 0), {"lengths_B": np.array([6, 4, 7])}), "lengths must be 3 numbers from 1 to 6"),
    ((padded(ROUTED, -1), padded(TOKENS, 0), {"mask_BS": np.ones((3, 6), bool)}), "lengths and attention_mask: give one"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), ARRAYS, ids=[message for _, message in ARRAYS])
def test_arrays_that_do_not_fit_are_named(arguments: tuple[Any, Any, dict[str, Any]], message: str) -> None:
    routed, tokens, settings = arguments
    with pytest.raises(ValueError, match=message):
        from_arrays(routed, tokens, MODEL, **({"lengths_B": np.array(LENGTHS)} | settings))


# completions


def npy(array: np.ndarray[Any, Any]) -> str:
    out = io.BytesIO()
    np.save(out, array)
    return base64.b64encode(out.getvalue()).decode()


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_completions_of_every_kind_are_read(tmp_path: Path) -> None:
    prompts, made = [of[:2].tolist() for of in TOKENS], [of[2:].tolist() for of in TOKENS]
    path = written(
        tmp_path / "c.jsonl",
        {"prompt_token_ids": prompts[0], "token_ids": made[0], "routed_experts": ROUTED[0][:-1].tolist()},
        {  # vLLM 0.21
            "prompt_routed_experts": ROUTED[1][:2].tolist(),
            "prompt_token_ids": prompts[1],
            "choices": [
                {"token_ids": made[1], "routed_experts": ROUTED[1][2:].tolist(), "logprobs": {"token_logprobs": [-1, -2]}}
            ],
        },
        {"choices": [{"prompt_token_ids": TOKENS[2].tolist(), "token_ids": [], "routed_experts": npy(ROUTED[2])}]},
    )
    trace = from_json_lines(path, MODEL)
    assert same(trace, [ROUTED[0][:-1], *ROUTED[1:]], [TOKENS[0][:-1], *TOKENS[1:]])
    assert trace.text is not None and trace.text.logprobs_T is not None
    told = trace.text.logprobs_T.tolist()
    assert told[6:8] == [-1, -2] and np.isnan(told[:6] + told[8:]).all()


RECORD = {"prompt_token_ids": [1, 2], "token_ids": [3], "routed_experts": ROUTED[2].tolist()}
LINES = [
    ('{"prompt_token_ids": [1', "line 1 is no JSON, or cut off"),
    ("[1]", "line 1 is no object"),
    (json.dumps(RECORD | {"token_ids": [3, 4, 5]}), r"routed_experts has 2 rows for 2 tokens of the prompt and 3 after"),
    (json.dumps(RECORD | {"routed_experts": None}), "routed_experts must be integers of 3 dimensions"),
    (json.dumps(RECORD | {"routed_experts": [[[0, 1]], [[0]]]}), "routed_experts is no list of equal rows"),
    (json.dumps(RECORD | {"routed_experts": npy(ROUTED[2])[:-60]}), "routed_experts is no list of equal rows"),
    (json.dumps(RECORD | {"prompt_routed_experts": ROUTED[0].tolist()}), "beside 2 tokens of the prompt"),
    (json.dumps(RECORD | {"logprobs": [-1.0, -2.0]}), "logprobs must be a number for each of 1 generated tokens"),
    ("", "holds no sequence"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[message for _, message in LINES])
def test_a_completion_that_does_not_fit_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        from_json_lines(tmp_path / "c.jsonl", MODEL)
