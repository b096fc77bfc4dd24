"""Balance over all ranks: parts add up to the textbook formula over all tokens."""

import pytest
import torch

from megalina.config import RouterConfig
from megalina.model.balance import global_balance
from megalina.model.tokens import RouterTokens
from tests.model.made_router import made_router


def test_the_ranks_parts_of_the_global_loss_add_up_to_the_formula_over_all_tokens() -> None:
    ranks, layers, count, num_experts, top_k = 3, 2, 20, 6, 2
    logits = torch.randn(layers, ranks, count, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(ranks, count, generator=torch.Generator().manual_seed(1)) < 0.8
    config = RouterConfig(group="global", top_k=top_k)
    prob, chosen = [], []
    for rank in range(ranks):
        rank_tokens = RouterTokens(*(torch.arange(count) for _ in range(3)), valid[rank], 2)
        routings = []
        for layer in range(layers):
            router = made_router(config, d_model=4, num_experts=num_experts, layer=layer, seed=0)
            routings.append(router(logits[layer, rank], rank_tokens, logits[layer, rank], slice(0, count)))
        assert all(r.balance == 0 for r in routings)
        prob.append(torch.stack([r.prob_E for r in routings]))
        chosen.append(torch.stack([r.chosen_E for r in routings]))
    total = int(valid.sum())
    parts = [global_balance(p, sum(chosen), total, top_k) for p in prob]

    expected = 0.0
    for layer in range(layers):
        probs = logits[layer][valid].softmax(dim=1)
        picks = logits[layer][valid].topk(top_k).indices
        fractions = [(picks == e).sum().item() / total for e in range(num_experts)]
        expected += num_experts / top_k * sum(f * probs[:, e].mean().item() for e, f in enumerate(fractions))
    assert sum(parts).item() == pytest.approx(total * expected, rel=1e-13)
    as_tensor = global_balance(prob[0], sum(chosen), torch.tensor(total), top_k)
    assert torch.equal(as_tensor, parts[0])


def test_a_batch_of_nothing_but_padding_has_no_global_loss() -> None:
    nothing = torch.zeros(2, 4)
    assert global_balance(nothing, nothing.to(torch.int64), 0, 2).item() == 0.0
