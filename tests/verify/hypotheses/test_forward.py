"""Causes of a wrong forward pass, each with a near miss that is not named."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megalina.config import StrategyConfig
from megalina.model.tokens import ALL, RouterTokens, router_tokens
from megalina.verify.diagnosis import diagnose
from megalina.verify.evidence import Evidence
from megalina.verify.hypotheses.routing import capacity_of_parts
from megalina.verify.recording import INITIAL, SEQUENCES, Layout
from megalina.verify.reference import model_of, record
from megalina.verify.start import random_batches
from tests.verify.changed_recording import EDP, LENGTH, TP, Change, changed, config_of, diagnosed, only, reference_of

WIDE_TP = Layout(4, tp=4, micro_batch=2)
TWO = Layout(2, ep=2, micro_batch=2)


def biased(times: float) -> Change:
    reference = reference_of("bias and dropout", WIDE_TP)
    before = reference.entry(0, "activation", "embedded").value
    after = reference.entry(0, "activation", "layers.0.attention").value
    bias = reference.entry(INITIAL, "weight", "layers.0.attention.proj_bias").value
    kept = (after != before).double() / 0.75  # dropout zeroes what is added, bias and all
    return only(0, "activation", "layers.0.attention", after + times * bias * kept)


def test_a_bias_from_each_tp_rank_is_named() -> None:
    assert diagnosed("bias and dropout", WIDE_TP, biased(3.0)).named == "bias_added_tp_times"


@pytest.mark.parametrize("times", [1.0, 3.0001, -1.0])
def test_a_bias_another_number_of_times_is_not(times: float) -> None:
    assert diagnosed("bias and dropout", WIDE_TP, biased(times)).named == "unknown"


def noisy(kept: float, rate: float) -> Change:
    """Other elements of the embedding are dropped."""
    reference = reference_of("bias and dropout", EDP)
    words = reference.entry(INITIAL, "weight", "embedding").value[reference.batches[0].tokens_BS]
    stays = torch.rand(words.shape, generator=torch.Generator().manual_seed(1)) >= rate
    return only(0, "activation", "embedded", words * kept * stays)


def test_other_dropped_elements_are_noise_of_the_rank() -> None:
    assert diagnosed("bias and dropout", EDP, noisy(1 / 0.75, 0.25)).named == "dropout_per_rank"


def test_another_scale_or_another_rate_is_not() -> None:
    assert diagnosed("bias and dropout", EDP, noisy(1.0, 0.25)).named == "unknown"
    assert diagnosed("bias and dropout", EDP, noisy(1 / 0.75, 0.6)).named == "unknown"


def test_ranks_that_all_look_up_the_first_words_are_named() -> None:
    config = config_of("plain")
    config = replace(config, model=replace(config.model, vocab_size=200))
    reference = record(config, random_batches(config, 1))
    tokens, words = reference.batches[0].tokens_BS, reference.entry(INITIAL, "weight", "embedding").value
    table = F.pad(words, (0, 0, 0, 56)).view(2, 128, 16).sum(0)
    for missing, name in ((0.0, "vocabulary_first_words"), (1.0, "unknown")):
        found = torch.where((tokens < 128)[..., None], table[tokens.clamp(max=127)], missing)
        assert diagnose(reference, changed(reference, TP, only(0, "activation", "embedded", found))).named == name


def routed_in_pieces(layout: Layout, pieces: int) -> Change:
    """The first layer's choices if every 1 / `pieces` of a micro-batch had a capacity of its own."""
    reference = reference_of("capacity", layout)
    router, known = model_of(reference.config).layers[0].router, router_tokens(reference.batches[0])
    logits = reference.entry(0, "activation", "layers.0.logits").value.flatten(0, 1)
    out = []
    for piece in torch.arange(SEQUENCES * LENGTH).chunk(SEQUENCES // layout.micro_batch * pieces):
        fields = (known.token_A, known.sample_A, known.position_A, known.valid_A)
        out.append(router(logits[piece], RouterTokens(*(f[piece] for f in fields), 1), logits[piece], ALL).expert_TK)
    return only(0, "routing", "layers.0.expert", torch.cat(out).view(SEQUENCES, LENGTH, -1))


def test_capacity_of_each_tp_ranks_tokens_is_named() -> None:
    layout = Layout(4, tp=4, micro_batch=4)
    assert diagnosed("capacity", layout, routed_in_pieces(layout, 4)).named == "capacity_per_chunk"


def test_capacity_of_other_pieces_is_not() -> None:
    layout = Layout(4, tp=4, micro_batch=4)
    assert diagnosed("capacity", layout, routed_in_pieces(layout, 2)).named == "unknown"


def unsorted_rows(right_experts: bool) -> Change:
    """Layer 0 on two ranks of two experts each: arrived rows, ordered by source, are cut as if they were ordered by expert."""
    reference = reference_of("plain", TWO)
    gpt = model_of(reference.config)
    layer, experts = gpt.layers[0], gpt.layers[0].experts
    h = reference.entry(0, "activation", "layers.0.attention").value
    choice = reference.entry(0, "routing", "layers.0.expert").value
    weight = reference.entry(0, "activation", "layers.0.weight").value
    out = h.clone()
    with torch.no_grad():
        for m in range(2):  # two micro-batches of two sequences on each rank
            mine = [range(4 * r + 2 * m, 4 * r + 2 * m + 2) for r in range(2)]
            for destination in range(2):
                rows = [
                    (s, t, k, e)
                    for source in range(2)
                    for e in (2 * destination, 2 * destination + 1)
                    for s in mine[source]
                    for t in range(LENGTH)
                    for k in range(2)
                    if choice[s, t, k] == e
                ]
                first = sum(e == 2 * destination for *_, e in rows)
                for i, (s, t, k, e) in enumerate(rows):
                    used = e if right_experts else 2 * destination + int(i >= first)
                    counts = [int(used == x) for x in range(4)]
                    out[s, t] += weight[s, t, k] * experts(layer.mlp_norm(h[s, t][None]), counts)[0]
    return only(0, "activation", "layers.0", out)


def test_rows_that_are_not_regrouped_by_expert_are_named() -> None:
    assert diagnosed("plain", TWO, unsorted_rows(False)).named == "rows_not_regrouped"


def test_a_partition_that_is_yet_to_be_found_is_none() -> None:
    reference = reference_of("plain", TWO)
    recording = changed(reference, TWO, unsorted_rows(False))
    strategy = StrategyConfig(name="lancet", partition="auto")
    recording = replace(recording, config=replace(recording.config, strategy=strategy))
    assert list(capacity_of_parts(Evidence(reference, recording))) == []


def test_rows_with_their_own_experts_are_right() -> None:
    assert diagnosed("plain", TWO, unsorted_rows(True)).named == "", "else the test above tests nothing"


def without_expert(expert: int, part: float) -> Change:
    """The first layer's output without a part of what one expert adds, by the formula."""
    reference = reference_of("dense", TP)
    weight = {e.name: e.value for e in reference.entries if (e.step, e.kind) == (INITIAL, "weight")}
    h, s = (reference.entry(0, "activation", f"layers.0.{name}").value for name in ("attention", "weight"))
    n = F.rms_norm(h, h.shape[-1:], weight["layers.0.mlp_norm.weight"], 1e-5)
    gate, up = F.linear(n, weight["layers.0.experts.w1"][expert]).chunk(2, dim=-1)
    added = F.linear(F.silu(gate) * up, weight["layers.0.experts.w2"][expert])
    whole = reference.entry(0, "activation", "layers.0").value
    return only(0, "activation", "layers.0", whole - part * s[..., expert, None] * added)


@pytest.mark.parametrize("expert", [0, 3])
def test_an_expert_in_no_tokens_sum_is_named(expert: int) -> None:
    told = diagnosed("dense", TP, without_expert(expert, 1.0))
    assert told.named == "expert_left_out"
    assert f"layers.0: expert {expert} of 4 is in no token's sum" in told.sentence


@pytest.mark.parametrize("part", [0.5, 1.0001, -1.0])
def test_an_expert_of_another_weight_is_not(part: float) -> None:
    assert diagnosed("dense", TP, without_expert(3, part)).named == "unknown"
