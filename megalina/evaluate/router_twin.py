"""A router twin: two readers of the same tokens, a server whose routing was recorded and a trainer, held against each other, and
what is left of their difference where the trainer replays the server's choices.

The server is known by its trace alone, or its model is here too: then distributions are compared, not only choices.

Shapes: B sequences, S tokens a sequence, T = B x S tokens, of which N are no padding, E experts, K experts a token, D width,
V words, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.routers import kind_of
from megalina.data.replayed import with_choices
from megalina.model.gpt import GPT
from megalina.model.routers import Router, Routing
from megalina.model.routing_recorder import ROWS_AT_ONCE, label_logprobs
from megalina.placement.router_replay import RouterReplay
from megalina.placement.routing_trace import RoutingTrace

BATCH_TOKENS = 4096  # that go through a model at a time, at least one sequence


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """Of one MoE layer.  Shares are of tokens or of choices; divergences are Kullback-Leibler's from the server's distribution
    over experts to the trainer's, in nats a token; None where the server's model isn't here."""

    layer: int  # of the model
    tokens: float  # whose set of experts is another
    choices: float  # of the server that the trainer doesn't make
    tokens_replayed: float  # whose own set is another although all layers before have replayed the server's
    divergence: float | None
    divergence_replayed: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the trainer says of the tokens that follow, beside what the server has said."""

    loss: float  # nats a token
    logprob_mean: float | None  # absolute difference of log-probabilities; None where the server's aren't known
    logprob_max: float | None
    divergence: (
        float | None
    )  # Kullback-Leibler's from the server's next-token distribution to the trainer's; None: no model of it


@dataclass(frozen=True, slots=True)
class Comparison:
    num_tokens: int
    num_routed: int  # tokens whose choices by the server are known: of these are shares
    num_sequences: int
    num_scored: int  # tokens whose successor is known
    layers: list[LayerDifference]
    tokens_in_some_layer: float  # share of tokens whose set of experts is another in a layer or more
    own: Prediction  # the trainer as it chooses
    replayed: Prediction
    server_loss: float | None
    server_tokens: float | None  # of (token, layer): those in which the server's model chooses otherwise than its trace says

    @property
    def tokens(self) -> float:
        """Share of all (token, layer) whose set of experts is another."""
        return sum(layer.tokens for layer in self.layers) / len(self.layers)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens": self.tokens}


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What a model made of a batch, padding left out."""

    own_LNK: list[Tensor]  # what each layer's router would choose
    log_LNE: list[Tensor]  # float32, its distribution over experts
    logprob_N: Tensor  # float64, of the token behind each; NaN where none counts
    n_ND: Tensor  # from which its next-token distribution follows


@dataclass(slots=True)
class _Sums:
    """Over the batches so far."""

    layers: int
    tokens: int = 0
    routed: int = 0  # of which the server's choices are known
    scored: int = 0
    compared: int = 0  # of the scored ones, those whose log-probability the server has told
    some_layer: int = 0
    server_nats: float = 0.0
    nats: list[float] = field(default_factory=lambda: [0.0, 0.0])  # as it chooses, replayed
    apart: list[float] = field(default_factory=lambda: [0.0, 0.0])
    furthest: list[float] = field(default_factory=lambda: [0.0, 0.0])
    divergence: list[float] = field(default_factory=lambda: [0.0, 0.0])
    of_layers: dict[str, Any] = field(default_factory=dict)  # name -> [L]

    def add(self, name: str, layer: int, value: float) -> None:
        self.of_layers.setdefault(name, np.zeros(self.layers))[layer] += value


def compare(trainer: GPT, trace: RoutingTrace, *, server: GPT | None = None) -> Comparison:
    """`server`: the model that the trace is of, if it is here.

    ValueError where the trace has no tokens, is of another model, or has tokens or sequences that the model can't read."""
    replay = RouterReplay(trace)
    _check(trainer, replay)
    if server is not None:
        _check(server, replay)
        if server.vocab_size != trainer.vocab_size:
            raise ValueError(
                f"the server has {server.vocab_size} ids and the trainer {trainer.vocab_size}: they must be of one model"
            )
    layers, top_k = trainer.served_moe_layers, trace.top_k
    sums = _Sums(len(layers))
    for batch, told_N in batches_of(trace):
        given = with_choices(batch, replay, trainer.config.num_layers)
        valid_T = batch.valid_BS.flatten()
        assert given.replay_BSLK is not None
        given_TLK = given.replay_BSLK.flatten(0, 1)[valid_T].long()
        known_N = given_TLK[:, layers[0], 0] >= 0
        own, replayed = read(trainer, batch), read(trainer, given)
        other = None if server is None else read(server, batch)
        differs_NL = torch.zeros(len(given_TLK), len(layers), dtype=torch.bool)
        for place, layer in enumerate(layers):
            given_NK = given_TLK[known_N, layer]
            missed_N = _missed(given_NK, own.own_LNK[place][known_N])
            differs_NL[known_N, place] = missed_N > 0
            sums.add("tokens", place, int((missed_N > 0).sum()))
            sums.add("choices", place, int(missed_N.sum()))
            sums.add("tokens_replayed", place, int((_missed(given_NK, replayed.own_LNK[place][known_N]) > 0).sum()))
            if other is not None:
                sums.add("server_tokens", place, int((_missed(given_NK, other.own_LNK[place][known_N]) > 0).sum()))
                for name, of in (("divergence", own), ("divergence_replayed", replayed)):
                    sums.add(name, place, _divergence(other.log_LNE[place], of.log_LNE[place]))
        sums.some_layer += int(differs_NL.any(1).sum())
        sums.tokens += len(given_TLK)
        sums.routed += int(known_N.sum())
        server_N = told_N if other is None else other.logprob_N
        scored_N = ~own.logprob_N.isnan()
        sums.scored += int(scored_N.sum())
        compared_N = scored_N if server_N is None else scored_N & ~server_N.isnan()
        if server_N is not None:
            sums.compared += int(compared_N.sum())
            sums.server_nats -= float(server_N[compared_N].sum())
        for i, of in enumerate((own, replayed)):
            sums.nats[i] -= float(of.logprob_N[scored_N].sum())
            if server_N is not None and compared_N.any():
                apart_N = (of.logprob_N - server_N)[compared_N].abs()
                sums.apart[i] += float(apart_N.sum())
                sums.furthest[i] = max(sums.furthest[i], float(apart_N.max()))
            if server is not None and other is not None:
                sums.divergence[i] += _next_token_divergence(server, other, trainer, of)
    return _result(sums, layers, top_k, len(trace.sample_lengths_S), has_model=server is not None)


def batches_of(trace: RoutingTrace) -> Iterator[tuple[Batch, Tensor | None]]:
    """The sequences of a trace as the model reads them, padded behind; with them, float64 [N], what its reader gave the token
    behind each."""
    text = trace.text
    assert text is not None
    lengths = trace.sample_lengths_S.astype(np.int64)
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        count = 1
        while first + count < len(lengths) and int(lengths[first : first + count + 1].max()) * (count + 1) <= BATCH_TOKENS:
            count += 1
        own = lengths[first : first + count]
        width = int(own.max())
        span = slice(int(ends[first] - own[0]), int(ends[first + count - 1]))
        valid_BS = np.arange(width) < own[:, None]

        def filled(values_N: Any, valid_BS: Any = valid_BS) -> Tensor:
            out = np.zeros(valid_BS.shape, np.int64)
            out[valid_BS] = values_N
            return torch.from_numpy(out)

        tokens_BS = filled(text.tokens_T[span])
        valid = torch.from_numpy(valid_BS)
        labels_BS = tokens_BS.roll(-1, 1)
        has_label = torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)
        positions_BS = torch.arange(width).expand(count, -1).clone()
        yield (
            Batch(
                tokens_BS=tokens_BS,
                labels_BS=labels_BS,
                loss_mask_BS=has_label,
                valid_BS=valid,
                position_BS=positions_BS if text.positions_T is None else filled(text.positions_T[span]),
                document_BS=None if text.documents_T is None else filled(text.documents_T[span]),
                sample_B=torch.arange(first, first + count),
            ),
            None if text.logprobs_T is None else torch.from_numpy(text.logprobs_T[span].astype(np.float64)),
        )
        first += count


def read(gpt: GPT, batch: Batch) -> Read:
    """What the model makes of a batch; where this gives choices, its layers use them."""
    device = gpt.embedding.device
    valid_T = batch.valid_BS.flatten()
    own: list[Tensor] = []
    logs: list[Tensor] = []

    def see(router: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
        assert isinstance(router, Router) and routing.wanted_TK is not None
        own.append(routing.wanted_TK.cpu()[valid_T])
        logs.append(router.log_scores(arguments[0]).float().log_softmax(1).cpu()[valid_T])

    hooks = [gpt.layers[layer].router.register_forward_hook(see) for layer in gpt.served_moe_layers]
    there = batch.to(device)
    gpt.eval()
    try:
        with torch.inference_mode():
            n_TD, _ = gpt.hidden(there)
            logprob_T = label_logprobs(gpt, n_TD, there)
    finally:
        for hook in hooks:
            hook.remove()
    return Read(own, logs, logprob_T.double().cpu()[valid_T], n_TD[valid_T.to(device)])


def _check(gpt: GPT, replay: RouterReplay) -> None:
    trace, text, kind = replay.trace, replay.trace.text, kind_of(gpt.router)
    if kind.experts_choose or kind.is_dense:
        raise ValueError(f"router={gpt.router.kind}: tokens don't choose experts there, so there is nothing to compare")
    replay.check(num_experts=gpt.config.num_experts, top_k=gpt.router.top_k, layers=gpt.served_moe_layers)
    assert text is not None
    if (largest := int(text.tokens_T.max())) >= gpt.vocab_size:
        raise ValueError(f"trace {trace.name} has the token id {largest}, and the model has {gpt.vocab_size} ids")
    longest, most = int(trace.sample_lengths_S.max()), gpt.blocks.whole.max_positions
    if longest > most:
        raise ValueError(f"trace {trace.name} has a sequence of {longest} tokens, and the model reads {most}")


def _missed(given_NK: Tensor, own_NK: Tensor) -> Tensor:
    """int64 [N]: experts of the first set that aren't in the second."""
    return (given_NK[:, :, None] != own_NK[:, None, :]).all(2).sum(1)


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over rows of Kullback-Leibler's divergence from p to q, in nats."""
    p, q = log_p.double(), log_q.double()
    return float((p.exp() * (p - q)).sum())


def _next_token_divergence(server: GPT, of_server: Read, trainer: GPT, of_trainer: Read) -> float:
    """Sum over tokens; logits exist a few rows at a time."""
    total = 0.0
    with torch.inference_mode():
        for row in range(0, len(of_server.n_ND), ROWS_AT_ONCE):
            part = slice(row, row + ROWS_AT_ONCE)
            log_p, log_q = (
                gpt.logits(of.n_ND[part])[:, : gpt.vocab_size].float().log_softmax(1).cpu()
                for gpt, of in ((server, of_server), (trainer, of_trainer))
            )
            total += _divergence(log_p, log_q)
    return total


def _result(sums: _Sums, layers: list[int], top_k: int, num_sequences: int, *, has_model: bool) -> Comparison:
    tokens, routed, compared = sums.tokens, max(sums.routed, 1), sums.compared

    def of_layer(name: str, place: int, number: int) -> float:
        return float(sums.of_layers[name][place]) / number

    def prediction(i: int) -> Prediction:
        return Prediction(
            loss=sums.nats[i] / max(sums.scored, 1),
            logprob_mean=sums.apart[i] / compared if compared else None,
            logprob_max=sums.furthest[i] if compared else None,
            divergence=sums.divergence[i] / tokens if has_model else None,
        )

    return Comparison(
        num_tokens=tokens,
        num_routed=sums.routed,
        num_sequences=num_sequences,
        num_scored=sums.scored,
        layers=[
            LayerDifference(
                layer=layer,
                tokens=of_layer("tokens", place, routed),
                choices=of_layer("choices", place, routed * top_k),
                tokens_replayed=of_layer("tokens_replayed", place, routed),
                divergence=of_layer("divergence", place, tokens) if has_model else None,
                divergence_replayed=of_layer("divergence_replayed", place, tokens) if has_model else None,
            )
            for place, layer in enumerate(layers)
        ],
        tokens_in_some_layer=sums.some_layer / routed,
        own=prediction(0),
        replayed=prediction(1),
        server_loss=sums.server_nats / compared if compared else None,
        server_tokens=float(sums.of_layers["server_tokens"].sum()) / (routed * len(layers)) if has_model else None,
    )
