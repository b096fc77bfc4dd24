"""Mixture of attention heads: the sum over experts written out, with and without the keys and values of earlier tokens."""

from dataclasses import replace

import pytest
import torch

from megalina.batch import Batch
from megalina.compose import compose
from megalina.model.attention import KeyValues
from megalina.validate import check_config
from tests.serve.small_engine import batch_of, small_gpt, tokens_of


def test_a_layer_is_the_sum_over_experts_of_their_heads() -> None:
    """Equations 7 and 8: each expert has queries and outputs of its own, all share keys and values."""
    gpt, experts = small_gpt(num_layers=1, num_heads=4, num_kv_heads=2, attention_experts=2, positions="learned"), 2
    batch = batch_of(tokens_of(0, sequences=1))
    layer, length = gpt.layers[0], batch.tokens_BS.shape[1]
    x_TD = torch.randn(length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        n_TD, a, out_TD = layer.attention_norm(x_TD), layer.attention, x_TD.clone()
        assert a.router is not None
        prob_TN = (n_TD @ a.router.T).softmax(1)
        later_SS = torch.ones(length, length).triu(1).bool()
        for head in range(4):
            own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            scores_SS = (n_TD @ a.q[own].T) @ (n_TD @ a.k[shared].T).T / 8**0.5
            mixed_Sd = scores_SS.masked_fill(later_SS, float("-inf")).softmax(1) @ (n_TD @ a.v[shared].T)
            out_TD += prob_TN[:, head // (4 // experts), None] * (mixed_Sd @ a.proj[:, own].T)
        torch.testing.assert_close(layer.attend(x_TD, batch), out_TD)


def test_tokens_one_by_one_are_all_at_once() -> None:
    gpt = small_gpt(attention_experts=4)
    batch = batch_of(tokens_of(0, sequences=1))
    past = [KeyValues() for _ in gpt.layers]
    with torch.inference_mode():
        whole = gpt.hidden(batch)[0]
        for i in range(batch.tokens_BS.shape[1]):
            at = slice(i, i + 1)
            fields = {
                name: getattr(batch, name)[:, at]
                for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "valid_BS", "position_BS")
            }
            one: Batch = replace(batch, **fields)
            torch.testing.assert_close(gpt.hidden(one, past)[0][0], whole[i])


@pytest.mark.parametrize("number", [1, 3])
def test_experts_that_make_no_even_groups_of_heads_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=rf"model.attention_experts \({number}\) must be 2 or more and divide model.num_heads"):
        check_config(compose(["model=tiny", f"model.attention_experts={number}"]), 1)
