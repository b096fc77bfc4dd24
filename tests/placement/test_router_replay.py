"""A replay finds a sequence's choices by its tokens, and says what is wrong where it can't."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalina.placement.router_replay import RouterReplay, read_replay
from megalina.placement.routing_trace import RoutingTrace, halves, joined, read_trace, rerouted_evenly, traced, write_trace
from megalina.placement.traced_text import TracedText

LENGTHS = [5, 3, 4]
TOKENS = np.arange(12, dtype=np.int64) * 7 % 12


def trace_of(tokens: Sequence[int] = TOKENS.tolist(), lengths: Sequence[int] = tuple(LENGTHS), seed: int = 0) -> RoutingTrace:
    """4 experts, 2 of them a token, in layers 1 and 3."""
    random = np.random.default_rng(seed)
    ids = random.random((len(tokens), 2, 4)).argsort(2)[..., :2].astype(np.uint8)
    return traced(
        ids, 4, sample_lengths_S=np.array(lengths), layers=[1, 3], name="t", text=TracedText(np.array(tokens, dtype=np.int64))
    )


def test_each_sequence_is_found_by_its_tokens_in_any_order() -> None:
    trace = trace_of()
    replay, ends = RouterReplay(trace), np.cumsum(LENGTHS)
    for number in (2, 0, 1):
        span = slice(ends[number] - LENGTHS[number], ends[number])
        assert np.array_equal(replay.choices(TOKENS[span], "it"), trace.expert_ids_TLK[span])


def test_the_last_token_may_be_unknown_and_no_other() -> None:
    replay = RouterReplay(trace_of())
    assert len(replay.choices(np.array([*TOKENS[:5], 99]), "it")) == 5
    with pytest.raises(ValueError, match=r"begins alike, but has 5 tokens instead of 7"):
        replay.choices(np.array([*TOKENS[:5], 99, 99]), "it")
    with pytest.raises(ValueError, match=r"begins alike, but has 5 tokens instead of 4"):
        replay.choices(TOKENS[:4], "it")


def test_other_tokens_are_refused_with_the_first_that_differs() -> None:
    other = TOKENS[5:8].copy()
    other[2] = 99
    message = (
        rf"sequence 31 isn't among the 3 sequences of trace t: .* number 1, first differs in token 2, {TOKENS[7]} instead of 99"
    )
    with pytest.raises(ValueError, match=message):
        RouterReplay(trace_of()).choices(other, "sequence 31")


def test_one_sequence_with_two_routes_is_refused() -> None:
    twice = trace_of([1, 2, 3, 1, 2, 3], [3, 3])
    with pytest.raises(ValueError, match="sequences 0 and 1 have the same tokens and other experts"):
        RouterReplay(twice)
    ids = np.concatenate([twice.expert_ids_TLK[:3]] * 2)
    assert len(RouterReplay(replace(twice, expert_ids_TLK=ids)).choices(np.array([1, 2, 3]), "it")) == 3


def test_a_trace_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not say which tokens it is of, .* tools/record_routing.py"):
        RouterReplay(replace(trace_of(), text=None))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_experts": 8, "top_k": 2, "layers": [1, 3]}, "it is of 4 experts, and model.num_experts is 8"),
        ({"num_experts": 4, "top_k": 1, "layers": [1, 3]}, "it has 2 experts a token, and router.top_k is 1"),
        ({"num_experts": 4, "top_k": 2, "layers": [0, 1, 2]}, r"it has 2 MoE layers, 1, 3, and the model 3, 0, 1, 2"),
        ({"num_experts": 4, "top_k": 2, "layers": [0, 1]}, r"it has 2 MoE layers, 1, 3, and the model 2, 0, 1"),
    ],
)
def test_a_file_of_another_model_is_named_with_the_setting(tmp_path: Path, model: dict, message: str) -> None:  # type: ignore[type-arg]
    write_trace(tmp_path / "r.npz", trace_of())
    with pytest.raises(ValueError, match=rf"^router.replay={tmp_path}/r.npz: {message}"):
        read_replay(tmp_path / "r.npz", "router.replay", **model)


def test_a_file_that_is_cut_off_or_not_there_is_named(tmp_path: Path) -> None:
    write_trace(tmp_path / "r.npz", trace_of())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "r.npz").read_bytes()[:-40])
    for name in ("cut.npz", "none.npz"):
        with pytest.raises(ValueError, match=rf"^router.replay={tmp_path}/{name}"):
            read_replay(tmp_path / name, "router.replay", num_experts=4, top_k=2, layers=[1, 3])


# what a trace says of its text


def test_a_file_gives_back_the_text(tmp_path: Path) -> None:
    text = TracedText(
        TOKENS.astype(np.uint16),
        np.arange(12, dtype=np.int32),
        np.ones(12, np.int32),
        np.linspace(-3, 0, 12, dtype=np.float32),
        TOKENS > 3,
    )
    write_trace(tmp_path / "a.npz", replace(trace_of(), text=text))
    found = read_trace(tmp_path / "a.npz").text
    assert found is not None
    for key, array in text.arrays().items():
        assert np.array_equal(found.arrays()[key], array) and found.arrays()[key].dtype == array.dtype
    write_trace(tmp_path / "b.npz", trace_of())
    found = read_trace(tmp_path / "b.npz").text
    assert found is not None and list(found.arrays()) == ["tokens"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TracedText(TOKENS[:-1]), r"tokens must be integers \[12\], not int64 \[11\]"),
        (TracedText(TOKENS * 1.0), r"tokens must be integers \[12\], not float64"),
        (TracedText(TOKENS - 1), "tokens must be at least 0, but one is -1"),
        (TracedText(TOKENS, documents_T=TOKENS[:3]), r"documents must be integers \[12\], not int64 \[3\]"),
        (TracedText(TOKENS, logprobs_T=TOKENS), r"logprobs must be floats \[12\], not int64"),
        (TracedText(TOKENS, known_T=TOKENS), r"known must be bool \[12\], not int64"),
        (TracedText(TOKENS, logprobs_T=TOKENS * 1.0), r"at most 0, but that behind token 1 is 7"),
    ],
)  # fmt: skip
def test_a_text_that_does_not_fit_is_refused(text: TracedText, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(trace_of(), text=text)


def test_a_trace_that_is_cut_joined_or_changed_has_no_text() -> None:
    trace = trace_of()
    assert all(part.text is None for part in (*halves(trace), joined([trace, trace]), rerouted_evenly(trace, 0.5, 1)))
