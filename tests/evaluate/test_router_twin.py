"""A trainer held against a server: equal twins differ in nothing, and where they differ the numbers are those of a loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megalina.batch import Batch
from megalina.config import ModelConfig, RouterConfig
from megalina.data.replayed import with_choices
from megalina.evaluate import router_twin
from megalina.evaluate.router_twin import batches_of, compare, read
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.model.routing_recorder import record_routing
from megalina.placement.router_replay import RouterReplay
from megalina.placement.routing_trace import RoutingTrace

WORDS, LENGTH, SEQUENCES = 40, 10, 5


def model(dtype: torch.dtype = torch.float32, *, router: RouterConfig | None = None, seed: int = 3) -> GPT:
    config = ModelConfig(
        num_layers=3, dense_layers_first=1, d_model=16, num_heads=2, num_kv_heads=2, num_experts=6, d_ff=8, init_std=0.3
    )
    gpt = GPT(config, router or RouterConfig(), vocab_size=WORDS, max_positions=LENGTH, seed=seed)
    initialize(gpt, seed=seed, dtype=dtype)
    return gpt.eval()


def text() -> list[Batch]:
    """Sequences one by one, of several documents, some shorter."""
    random = torch.Generator().manual_seed(0)
    batches = []
    for number in range(SEQUENCES):
        batch = Batch.whole(torch.randint(0, WORDS, (1, LENGTH), generator=random))
        documents = (torch.arange(LENGTH) >= 4).long()[None]
        valid = (torch.arange(LENGTH) < LENGTH - number)[None]
        batches.append(
            replace(
                batch,
                valid_BS=valid,
                loss_mask_BS=batch.loss_mask_BS & valid.roll(-1, 1) & valid,
                position_BS=torch.arange(LENGTH)[None] - 4 * documents,
                document_BS=documents,
                sample_B=torch.tensor([number + 7]),
            )
        )
    return batches


def recorded(gpt: GPT, *, logprobs: bool = True) -> RoutingTrace:
    return record_routing(gpt, text(), max_tokens=10_000, name="server", logprobs=logprobs)


def test_a_trace_is_read_as_it_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_twin, "BATCH_TOKENS", 25)
    gpt = model()
    trace = recorded(gpt)
    assert trace.text is not None and trace.text.positions_T is not None and trace.text.documents_T is not None
    batches = list(batches_of(trace))
    assert [len(batch.tokens_BS) for batch, _ in batches] == [2, 3]  # of up to 25 tokens with their padding
    found = [read(gpt, batch) for batch, _ in batches]
    ids = torch.cat([torch.stack(of.own_LNK, 1) for of in found])
    assert torch.equal(ids.sort(2).values, torch.from_numpy(trace.expert_ids_TLK.astype(np.int64)).sort(2).values)
    told = torch.cat([told_N for _, told_N in batches if told_N is not None])
    torch.testing.assert_close(torch.cat([of.logprob_N for of in found]), told, equal_nan=True, rtol=0, atol=1e-5)


def test_equal_twins_differ_in_nothing() -> None:
    gpt = model()
    found = compare(gpt, recorded(gpt), server=gpt)
    assert (found.tokens, found.tokens_in_some_layer, found.server_tokens) == (0, 0, 0)
    assert (found.num_tokens, found.num_sequences, found.num_scored) == (40, 5, 35)
    assert all(layer.tokens_replayed == layer.divergence == 0 for layer in found.layers)
    assert found.own.logprob_max is not None and found.own.logprob_max < 1e-5 and found.own.divergence == 0
    assert found.own == found.replayed and found.server_loss == pytest.approx(found.own.loss, abs=1e-5)


def test_unequal_twins_differ_as_a_loop_says() -> None:
    """The server has other weights; everything is counted token by token."""
    server, trainer = model(seed=3), model(seed=3)
    with torch.no_grad():
        for p in trainer.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trace = recorded(server)
    found = compare(trainer, trace, server=server)
    assert 0 < found.tokens < 1 and [layer.layer for layer in found.layers] == [1, 2]
    replay, places = RouterReplay(trace), 0
    other = np.zeros((trace.num_tokens, 2), bool)
    missed, apart, nats, divergence = np.zeros(2), [[], []], [0.0, 0.0], [0.0, 0.0]  # type: ignore[var-annotated]
    for batch in text():
        of_server = read(server, batch)
        for which, given in enumerate((batch, with_choices(batch, replay, 3))):
            of = read(trainer, given)
            logits_p, logits_q = server.logits(of_server.n_ND).detach(), trainer.logits(of.n_ND).detach()
            for n in range(len(of.logprob_N)):
                p, q = logits_p[n, :WORDS].double().softmax(0).tolist(), logits_q[n, :WORDS].double().softmax(0).tolist()
                divergence[which] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                if not of.logprob_N[n].isnan():
                    apart[which].append(abs(float(of.logprob_N[n] - of_server.logprob_N[n])))
                    nats[which] -= float(of.logprob_N[n])
                if which == 0:
                    for place in range(2):
                        lost = set(trace.expert_ids_TLK[places + n, place].tolist()) - set(of.own_LNK[place][n].tolist())
                        other[places + n, place], missed[place] = bool(lost), missed[place] + len(lost)
        places += len(of.logprob_N)
    for place, layer in enumerate(found.layers):
        assert layer.tokens == pytest.approx(other[:, place].mean()) and layer.choices == pytest.approx(missed[place] / 80)
    assert found.tokens_in_some_layer == pytest.approx(other.any(1).mean())
    for which, prediction in enumerate((found.own, found.replayed)):
        assert prediction.loss == pytest.approx(nats[which] / 35, rel=1e-5)
        assert prediction.logprob_mean == pytest.approx(np.mean(apart[which]), rel=1e-4)
        assert prediction.logprob_max == pytest.approx(max(apart[which]), rel=1e-4)
        assert prediction.divergence == pytest.approx(divergence[which] / 40, rel=1e-4)
    # all that comes before the first router is the same with replay and without
    assert found.layers[0].tokens_replayed == found.layers[0].tokens


def test_what_differs_in_choices_alone_is_closed_by_replay() -> None:
    """Twins with other selection biases, which are in no weight: the first layer's moves what the second reads."""
    router = RouterConfig(kind="sigmoid", bias_update_rate=0.01)
    server, trainer = model(router=router), model(router=router)
    bias_E = trainer.layers[1].router.bias_E
    assert bias_E is not None
    bias_E.copy_(torch.linspace(-0.5, 0.5, 6))
    found = compare(trainer, recorded(server), server=server)
    first, second = found.layers
    assert first.tokens == first.tokens_replayed > 0.3 and first.divergence == 0
    assert second.tokens > 0 == second.tokens_replayed
    assert second.divergence is not None and second.divergence > 1e-4 and abs(second.divergence_replayed or 0.0) < 1e-9
    assert (found.own.logprob_max or 0.0) > 1e-2 and (found.replayed.logprob_max or 0.0) < 1e-5
    assert abs(found.replayed.divergence or 0.0) < 1e-9 < 1e-4 < (found.own.divergence or 0.0)


def test_a_server_that_is_known_by_its_choices_alone_has_no_distributions() -> None:
    found = compare(model(), recorded(model(), logprobs=False))
    assert found.own.logprob_mean is None and found.server_loss is None and found.server_tokens is None
    assert found.own.divergence is None and found.layers[0].divergence is None and found.own.loss > 0


def test_tokens_whose_choices_nobody_knows_are_in_no_share() -> None:
    server, trainer = model(seed=3), model(seed=4)
    trace = recorded(server)
    assert trace.text is not None
    known_T = np.arange(trace.num_tokens) % 3 > 0
    whole, some = compare(trainer, trace), compare(trainer, replace(trace, text=replace(trace.text, known_T=known_T)))
    assert (some.num_tokens, some.num_routed, whole.num_routed) == (40, int(known_T.sum()), 40)
    own = [read(trainer, batch).own_LNK[0] for batch, _ in batches_of(trace)]
    apart = torch.cat(own).sort(1).values.numpy() != np.sort(trace.expert_ids_TLK[:, 0], axis=1)
    assert some.layers[0].tokens == pytest.approx(apart.any(1)[known_T].mean())
    assert some.replayed.loss != whole.replayed.loss and some.own.loss == pytest.approx(whole.own.loss)


def test_a_file_that_the_model_cannot_read_is_refused() -> None:
    gpt, trace = model(), recorded(model())
    assert trace.text is not None
    large = trace.text.tokens_T.astype(np.int64)
    large[3] = WORDS
    with pytest.raises(ValueError, match="has the token id 40, and the model has 40 ids"):
        compare(gpt, replace(trace, text=replace(trace.text, tokens_T=large)))
    with pytest.raises(ValueError, match="it has 2 experts a token, and router.top_k is 1"):
        compare(model(router=RouterConfig(top_k=1)), trace)
    with pytest.raises(ValueError, match="a sequence of 40 tokens, and the model reads 10"):
        compare(gpt, replace(trace, sample_lengths_S=np.array([40]), samples_S=None))
    with pytest.raises(ValueError, match="router=expert_choice: tokens don't choose experts there"):
        compare(model(router=RouterConfig(kind="expert_choice")), trace)
    with pytest.raises(ValueError, match="does not say which tokens"):
        compare(gpt, replace(trace, text=None))
