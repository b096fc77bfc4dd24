"""What is recorded is what the routers choose, worked out here from their weights alone, expert by expert, token by token."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.config import ModelConfig, RouterConfig
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.model.routing_recorder import RoutingRecorder, record_routing, trace_of

WORDS, LENGTH = 50, 12
MODEL = {"num_layers": 3, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "num_experts": 5, "d_ff": 8, "init_std": 0.3}


def small(router: RouterConfig | None = None, **model: Any) -> GPT:
    config = ModelConfig(**{**MODEL, **model})
    gpt = GPT(config, router or RouterConfig(), vocab_size=WORDS, max_positions=LENGTH, seed=3)
    initialize(gpt, seed=3, dtype=torch.float64)
    return gpt


def batch_of(first: int, count: int, valid: int = LENGTH) -> Batch:
    """Sequences `first`, ..., of which each has `valid` tokens."""
    words = [torch.randint(0, WORDS, (LENGTH,), generator=torch.Generator().manual_seed(first + i)) for i in range(count)]
    token_BS = torch.stack(words)
    valid_BS = (torch.arange(LENGTH) < valid).expand(count, -1)
    position_BS = torch.arange(LENGTH).expand(count, -1)
    return Batch(token_BS, token_BS, valid_BS, valid_BS, position_BS, None, torch.arange(first, first + count))


def chosen_by_hand(gpt: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """Experts [T, L, K], best first, and their renormalised softmax weights, of a model whose router is topk."""
    return by_hand(gpt, batch)[:2]


def by_hand(gpt: GPT, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """As `chosen_by_hand`; then the experts that each layer's router would choose of what the MoE layer before reads."""
    top_k, ids, weights, ahead = gpt.router.top_k, [], [], []
    h_before_TD = None
    gpt.eval()
    with torch.no_grad():
        x_TD = gpt.embedder.embed(batch)
        for layer in gpt.layers:
            h_TD = layer.attend(x_TD, batch)
            if not layer.is_moe:
                x_TD = layer.feed(h_TD, batch)
                continue
            assert layer.router.weight is not None
            if h_before_TD is None:
                ahead.append(torch.full((len(h_TD), top_k), layer.num_experts))
            else:
                ahead.append((layer.mlp_norm(h_before_TD) @ layer.router.weight.T).argsort(1, descending=True)[:, :top_k])
            h_before_TD = h_TD
            n_TD = layer.mlp_norm(h_TD)
            prob_TE = (n_TD @ layer.router.weight.T).softmax(1)
            best_TK = prob_TE.argsort(1, descending=True)[:, :top_k]
            best_weight_TK = prob_TE.gather(1, best_TK)
            best_weight_TK = best_weight_TK / best_weight_TK.sum(1, keepdim=True)
            every_ETD = layer.experts(n_TD.repeat(layer.num_experts, 1), [len(n_TD)] * layer.num_experts)
            every_ETD = every_ETD.view(layer.num_experts, *n_TD.shape)
            x_TD = h_TD.clone()
            for k in range(top_k):
                x_TD += best_weight_TK[:, k : k + 1] * every_ETD[best_TK[:, k], torch.arange(len(n_TD))]
            ids.append(best_TK)
            weights.append(best_weight_TK)
    return torch.stack(ids, 1), torch.stack(weights, 1), torch.stack(ahead, 1)


@pytest.mark.parametrize("model", [{}, {"moe_every": 2, "num_layers": 4}], ids=["all MoE", "every other layer dense"])
def test_choices_are_those_of_the_routers_on_the_same_tokens(model: dict[str, Any]) -> None:
    gpt = small(**model)
    trace = record_routing(gpt, [batch_of(0, 2), batch_of(2, 3)], max_tokens=1000, name="all")
    ids, weights, ahead = by_hand(gpt, batch_of(0, 5))
    assert np.array_equal(trace.expert_ids_TLK, ids.numpy())
    assert trace.ahead_ids_TLK is not None and trace.ahead_ids_TLK.dtype == np.uint8
    assert np.array_equal(trace.ahead_ids_TLK, ahead.numpy()) and 0 < (ahead == ids)[:, 1:].float().mean() < 1
    assert trace.expert_ids_TLK.dtype == np.uint8 and trace.weights_TLK is not None and trace.weights_TLK.dtype == np.float16
    assert np.abs(trace.weights_TLK - weights.numpy()).max() < 1e-3
    assert trace.sample_lengths_S.tolist() == [LENGTH] * 5
    assert (trace.layers, trace.num_experts, trace.name) == (tuple(gpt.moe_layers), 5, "all")
    assert len(np.unique(ids)) == 5  # else the test says little


def test_a_bias_chooses_but_the_best_choice_is_the_one_of_largest_weight() -> None:
    gpt = small(RouterConfig(kind="sigmoid", bias_update_rate=0.1))
    for layer in gpt.layers:
        layer.router.bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0]))  # always chosen, and first in the router's own order
    trace = record_routing(gpt, [batch_of(0, 4)], max_tokens=1000, name="biased")
    assert (trace.expert_ids_TLK == 4).any(2).all()
    assert 0.1 < (trace.expert_ids_TLK[..., 0] == 4).mean() < 0.9
    weights = trace.weights_TLK
    assert weights is not None and (weights[..., 0] >= weights[..., 1]).all()


def test_so_many_tokens_and_no_more() -> None:
    gpt, ran = small(), []
    seen: list[int] = []

    def some() -> Any:
        for first in range(0, 100, 2):
            ran.append(first)
            yield batch_of(first, 2)

    trace = record_routing(gpt, some(), max_tokens=55, name="few", each_batch=seen.append)
    assert (trace.num_tokens, trace.sample_lengths_S.tolist()) == (55, [LENGTH] * 4 + [7])
    assert (ran, seen) == ([0, 2, 4], [24, 48, 55])
    whole = record_routing(gpt, [batch_of(0, 6)], max_tokens=1000, name="whole")
    assert np.array_equal(trace.expert_ids_TLK, whole.expert_ids_TLK[:55])
    assert trace.ahead_ids_TLK is not None and whole.ahead_ids_TLK is not None
    assert np.array_equal(trace.ahead_ids_TLK, whole.ahead_ids_TLK[:55])
    with pytest.raises(ValueError, match="recorder of 0 tokens"):
        record_routing(gpt, [batch_of(0, 2)], max_tokens=0, name="none")


def test_padding_is_no_token() -> None:
    trace = record_routing(small(), [batch_of(0, 2, valid=5)], max_tokens=1000, name="padded")
    assert trace.sample_lengths_S.tolist() == [5, 5] and trace.ahead_ids_TLK is not None
    assert (trace.ahead_ids_TLK[:, 1:] < 5).all()  # what is nobody's has been left out


def test_tokens_are_in_order_whoever_saw_them_first_and_the_last_ones_are_kept() -> None:
    gpt = small()
    whole = record_routing(gpt, [batch_of(0, 4)], max_tokens=1000, name="whole")
    found = []
    for first in (2, 0):
        recorder = RoutingRecorder(1000)
        with recorder.watching(gpt), torch.no_grad():
            gpt.hidden(batch_of(first, 2))
        found.append(recorder.decisions())
    joined = trace_of(found, gpt, max_tokens=1000, name="t")
    assert np.array_equal(joined.expert_ids_TLK, whole.expert_ids_TLK) and joined.ahead_ids_TLK is None  # nobody was asked
    last = trace_of(found, gpt, max_tokens=30, name="t")
    assert np.array_equal(last.expert_ids_TLK, whole.expert_ids_TLK[-30:]) and last.sample_lengths_S.tolist() == [6, 12, 12]


def test_nothing_hangs_on_a_model_that_nobody_watches() -> None:
    gpt = small()
    recorder = RoutingRecorder(5)
    with pytest.raises(RuntimeError), recorder.watching(gpt):
        assert all(len(layer.router._forward_hooks) == 1 for layer in gpt.layers)
        raise RuntimeError
    record_routing(gpt, [batch_of(0, 1)], max_tokens=5, name="asked ahead")
    assert not any(layer.router._forward_hooks or layer.mlp_norm._forward_pre_hooks for layer in gpt.layers)
    with pytest.raises(ValueError, match="the model did not run"):
        recorder.decisions()


def test_what_has_no_choices_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="experts choose tokens"):
        record_routing(small(RouterConfig(kind="expert_choice")), [batch_of(0, 2)], max_tokens=9, name="")
    with pytest.raises(ValueError, match="no MoE layer"):
        record_routing(small(dense_layers_first=3), [batch_of(0, 2)], max_tokens=9, name="")
    tight = small(RouterConfig(capacity_factor=0.5))
    with pytest.raises(ValueError, match=r"capacity has taken away \d+ of 144 choices"):
        record_routing(tight, [batch_of(0, 2)], max_tokens=1000, name="")
