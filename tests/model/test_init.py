"""Initial values are a function of seed and name: any cut is a part of the whole.

Shapes: E experts, D width, V words with padding.
"""

from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from megalina.blocks.parameter import Parameter
from megalina.config import ModelConfig, RouterConfig, padded_vocab_size
from megalina.model.gpt import GPT
from megalina.model.init import Cut, initialize, local_shape, parameter, spec_of

WORDS, PADDED = 300, 512
MODELS = {
    "tied": ModelConfig(d_model=32, d_ff=16),
    "everything": ModelConfig(
        d_model=32, d_ff=16, num_layers=3, dense_layers_first=1, shared_d_ff=8, bias=True, norm="layernorm", positions="learned",
        tie_embeddings=False, qk_norm="head",
    ),
}  # fmt: skip


NOWHERE = Cut()


def built(name: str, cut: Cut = NOWHERE, *, seed: int = 3, padded: int = PADDED, dtype: torch.dtype = torch.float32) -> GPT:
    gpt = GPT(MODELS[name], RouterConfig(kind="sigmoid"), vocab_size=WORDS, max_positions=24, seed=seed, padded_vocab=padded)
    initialize(gpt, seed=seed, dtype=dtype, cut=cut)
    return gpt


def whole_of(name: str) -> dict[str, Tensor]:
    return {n: p.detach().view(spec_of(p).shape) for n, p in built(name).named_parameters()}


def all_cuts(tp: int, ep: int) -> Iterator[Cut]:
    for t in range(tp):
        for e in range(ep):
            yield Cut({"tp": (t, tp), "ep": (e, ep)})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)])
def test_the_parts_of_all_ranks_tile_each_whole_parameter(name: str, tp: int, ep: int) -> None:
    whole = whole_of(name)
    seen = {n: torch.full_like(v, float("nan")) for n, v in whole.items()}
    for cut in all_cuts(tp, ep):
        for n, p in built(name, cut).named_parameters():
            assert p.numel() * tp ** ("tp" in spec_of(p).sharded) * ep ** ("ep" in spec_of(p).sharded) == whole[n].numel()
            part = p.detach().view(local_shape(p))
            assert torch.equal(part, cut.local(whole[n], spec_of(p))), n
            cut.local(seen[n], spec_of(p)).copy_(part)
    assert [n for n in whole if not torch.equal(seen[n], whole[n])] == []


def test_padding_of_the_vocabulary_is_zero_and_changes_no_word() -> None:
    padded, plain = built("everything"), built("everything", padded=WORDS)
    for n in ("embedding", "head"):
        long_VD, short_VD = getattr(padded, n), getattr(plain, n)
        assert long_VD.shape == (PADDED, 32) and torch.equal(long_VD[:WORDS], short_VD) and not long_VD[WORDS:].any()


def test_every_parameter_has_values_of_its_own_that_the_seed_decides() -> None:
    first, again, other = (dict(built("everything", seed=s).named_parameters()) for s in (3, 3, 4))
    drawn = [n for n, p in first.items() if spec_of(p).std]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(not torch.equal(first[n], other[n]) for n in drawn)
    beginnings = [tuple((first[n].flatten()[:4] / spec_of(first[n]).std).tolist()) for n in drawn]
    assert len(set(beginnings)) == len(drawn) > 20
    w1 = first["layers.1.experts.w1"]
    assert len({tuple(expert.flatten()[:4].tolist()) for expert in w1}) == len(w1) == 4


def test_spreads_are_those_of_the_configuration_and_outputs_are_scaled_by_depth() -> None:
    config = ModelConfig(d_model=64, d_ff=128, num_layers=8, init_std=0.05, bias=True)
    gpt = GPT(config, RouterConfig(), vocab_size=2000, max_positions=8, seed=0)
    initialize(gpt, seed=0, dtype=torch.float64)
    scaled = 0.05 / 4
    for n, p in gpt.named_parameters():
        if "bias" in n or n.rpartition(".")[2] in ("b1", "b2"):
            assert not p.any(), n
        elif "norm" in n:
            assert (p == 1).all(), n
        else:
            std = scaled if n.rpartition(".")[2] in ("proj", "w2") else 0.05
            assert p.std().item() == pytest.approx(std, rel=5 / p.numel() ** 0.5), n
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, n


def test_lower_precision_is_the_rounded_float32_value() -> None:
    wide, narrow = (
        dict(built("everything").named_parameters()),
        dict(built("everything", dtype=torch.bfloat16).named_parameters()),
    )
    assert all(torch.equal(wide[n].bfloat16(), narrow[n]) for n in wide)


def test_matrices_decay_and_norms_biases_and_positions_do_not() -> None:
    decayed = {n.rpartition(".")[2] for n, p in built("everything").named_parameters() if spec_of(p).decay}
    others = {n.rpartition(".")[2] for n, p in built("everything").named_parameters() if not spec_of(p).decay}
    assert decayed == {"embedding", "head", "q", "k", "v", "proj", "w1", "w2", "weight"}
    assert others == {"weight", "bias", "q_bias", "k_bias", "v_bias", "proj_bias", "b1", "b2", "positions"}
    assert {n for n, p in built("everything").named_parameters() if n.endswith("router.weight") and not spec_of(p).decay} == set()


def test_a_model_has_no_memory_before_it_is_initialized() -> None:
    gpt = GPT(MODELS["everything"], RouterConfig(), vocab_size=WORDS, max_positions=24, seed=0)
    assert all(p.is_meta for p in gpt.parameters())
    assert {f.name for f in fields(spec_of(gpt.embedding))} >= {"shape", "std", "sharded", "decay", "rows"}


def test_a_buffer_without_values_is_an_error() -> None:
    class Hollow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = parameter(Parameter("weight", (2, 2), 1.0))
            self.register_buffer("table", torch.empty(3, device="meta"))

    with pytest.raises(RuntimeError, match="table has no values"):
        initialize(Hollow(), seed=0, dtype=torch.float32)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_padded_vocabulary_can_be_cut_evenly(tp: int) -> None:
    for words in (1, 127, 128, 300, 50257):
        padded = padded_vocab_size(words, tp)
        assert padded % (128 * tp) == 0 and words <= padded < words + 128 * tp
