"""A routing recorder: what the routers of a model decide while it runs, token by token.

It hangs on the routers themselves, so what runs them (the plain model, a program on several ranks) need not know of
it, and a model that nobody watches does nothing more.

With `ahead` it also asks each router one MoE layer before its time, on the hidden state that the layer there has read: what an
engine does for a look-ahead predictor, by the same calls.

Shapes: T tokens, L MoE layers, K choices a token, best first: by falling weight, of equal weights as the router has them; D model
width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.routers import kind_of
from megalina.model.gpt import GPT, Layer
from megalina.model.routers import Router, Routing
from megalina.model.tokens import ALL, RouterTokens
from megalina.placement.routing_trace import RoutingTrace, traced
from megalina.placement.traced_text import TracedText

ROWS_AT_ONCE = 256  # tokens whose logits, [T, V], exist at a time


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """What was decided of some tokens, padding left out."""

    place_T2: NDArray[np.int64]  # number of the sequence, index within it
    expert_ids_TLK: NDArray[np.int32]  # best first; the number of experts where capacity has taken a choice away
    weights_TLK: NDArray[np.float16]
    ahead_ids_TLK: NDArray[np.int32] | None = None  # see `megalina.placement.ahead_ids`; None where nobody was asked
    layers: tuple[int, ...] = ()  # which MoE layers they are of, counted from 0; in a pipeline those of some stages


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The first own tokens of a micro-batch, or of a part of one."""

    tokens: RouterTokens  # held, so that its id stays its own
    place_T2: Tensor
    valid_T: Tensor
    chosen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # MoE layer -> experts and weights, [T, K]
    ahead: dict[int, Tensor] = field(default_factory=dict)  # MoE layer -> experts that the layer before heard of, [T, K]


class RoutingRecorder:
    """Keeps the first `max_tokens` tokens that the routers here see, each in all layers.

    `ahead`: asks ahead too, which takes a norm and a router more a layer; only where tensor parallelism cuts no tokens."""

    def __init__(self, max_tokens: int, *, ahead: bool = False):
        if max_tokens < 1:
            raise ValueError(f"a recorder of {max_tokens} tokens: it needs at least 1")
        self.room, self.ahead = max_tokens, ahead  # room: tokens still to come
        self._read: dict[int, Tensor] = {}  # MoE layer -> the hidden state [T, D] that its norm is reading
        self._asking = False  # ahead: what the hooks see then is no decision
        self._parts: dict[int, _Part] = {}

    @contextmanager
    def watching(self, gpt: GPT) -> Iterator[None]:
        """What `gpt` decides inside is recorded.  ValueError for experts that choose tokens (their number isn't a
        token's), and where all get all tokens."""
        if kind_of(gpt.router).experts_choose:
            raise ValueError(
                f"router.kind={gpt.router.kind}: experts choose tokens there, so a token has no choices to be recorded"
            )
        if kind_of(gpt.router).is_dense:
            raise ValueError(
                f"router.kind={gpt.router.kind}: all experts get all tokens, so there is nothing to be recorded; an "
                "evaluation with infer.select=top_k records what it serves with"
            )
        if not gpt.served_moe_layers:
            raise ValueError("the model has no MoE layer, so there is no routing to be recorded")
        layers = {n: gpt.layers[layer] for n, layer in enumerate(gpt.served_moe_layers) if layer in gpt.layers}
        hooks = [
            layer.router.register_forward_hook(partial(self._see, number, layers.get(number + 1)))
            for number, layer in layers.items()
        ]
        if self.ahead:
            hooks += [layer.mlp_norm.register_forward_pre_hook(partial(self._reads, n)) for n, layer in layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._read.clear()

    def decisions(self) -> Decisions:
        """All that was recorded, in the order in which it was seen; waits for the device."""
        if not self._parts:
            raise ValueError("nothing was recorded: the model did not run")
        parts = self._parts.values()
        valid_T = torch.cat([part.valid_T for part in parts])
        place_T2 = torch.cat([part.place_T2 for part in parts])[valid_T]
        ids_TLK, weights_TLK = (
            torch.cat([torch.stack([part.chosen[number][i] for number in sorted(part.chosen)], 1) for part in parts])[valid_T]
            for i in (0, 1)
        )
        ahead_TLK = None
        if self.ahead:
            ahead = [torch.stack([part.ahead[number] for number in sorted(part.ahead)], 1) for part in parts]
            ahead_TLK = torch.cat(ahead)[valid_T].cpu().numpy()
        layers = tuple(sorted(next(iter(parts)).chosen))
        return Decisions(place_T2.cpu().numpy(), ids_TLK.cpu().numpy(), weights_TLK.cpu().numpy(), ahead_TLK, layers)

    def _reads(self, number: int, norm: nn.Module, arguments: tuple[Tensor]) -> None:
        if not self._asking:
            self._read[number] = arguments[0]

    def _see(self, number: int, following: Layer | None, router: Router, arguments: tuple[Any, ...], routing: Routing) -> None:
        """`arguments` are those of `Router.forward`; `following`: the next MoE layer."""
        if self._asking:
            return
        tokens, own = arguments[1], arguments[3]
        part = self._parts.get(id(tokens))
        if part is None:
            keep = slice(min(self.room, len(routing.expert_TK)))
            if keep.stop == 0:
                return
            self.room -= keep.stop
            place_T2 = torch.stack([tokens.sample_A[own][keep], tokens.position_A[own][keep]], 1)
            part = self._parts[id(tokens)] = _Part(tokens, place_T2, tokens.valid_A[own][keep])
        if number not in part.chosen:  # else its activations are computed again, for backward
            count = len(part.valid_T)
            part.chosen[number] = ids_TK, _ = _best_first(routing, count)
            if self.ahead:
                if number == 0:
                    part.ahead[0] = torch.full_like(ids_TK, router.num_experts)
                if following is not None:
                    part.ahead[number + 1] = self._asked(following, self._read[number], tokens, count)

    def _asked(self, layer: Layer, h_TD: Tensor, tokens: RouterTokens, count: int) -> Tensor:
        """[T, K], of the first `count` tokens: what the layer's router would choose from what the layer before reads."""
        assert len(h_TD) == len(tokens.token_A), "tensor parallelism has cut the tokens"
        self._asking = True
        try:
            logits_TE = layer.moe.scores(h_TD)[1]
            return _best_first(layer.router(logits_TE, tokens, logits_TE, ALL), count)[0]
        finally:
            self._asking = False


def _best_first(routing: Routing, count: int) -> tuple[Tensor, Tensor]:
    """Experts and weights [T, K] of the first `count` tokens."""
    weight_TK = routing.weight_TK.detach()[:count]
    order_TK = weight_TK.argsort(dim=1, descending=True, stable=True)
    return routing.expert_TK[:count].gather(1, order_TK).int(), weight_TK.gather(1, order_TK).half()


def over_stages(of_stages: Sequence[Decisions]) -> Decisions:
    """What the ranks of a pipeline with the same tokens have recorded, each in layers of its own, of the tokens that all of them
    have."""
    if len(of_stages) == 1:
        return of_stages[0]
    keys = [part.place_T2[:, 0] << 32 | part.place_T2[:, 1] for part in of_stages]
    common = reduce(np.intersect1d, keys)
    rows = [np.argsort(key)[np.searchsorted(np.sort(key), common)] for key in keys]
    layers = [layer for part in of_stages for layer in part.layers]
    order = np.argsort(layers)

    def whole(of_all: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([values[row] for values, row in zip(of_all, rows, strict=True)], axis=1)[:, order]

    ids_TLK, weights_TLK = whole([part.expert_ids_TLK for part in of_stages]), whole([part.weights_TLK for part in of_stages])
    return Decisions(of_stages[0].place_T2[rows[0]], ids_TLK, weights_TLK, layers=tuple(sorted(layers)))


def trace_of(decisions: Sequence[Decisions], gpt: GPT, *, max_tokens: int, name: str) -> RoutingTrace:
    """The last `max_tokens` tokens, by their sequence's number and their place in it; a sample is what there is of a sequence.
    Ahead ids only where all have them.

    ValueError where capacity has taken choices away: a trace has all of a token's."""
    place_T2 = np.concatenate([part.place_T2 for part in decisions])
    last_T = _in_order(place_T2)[-max_tokens:]
    ids_TLK = np.concatenate([part.expert_ids_TLK for part in decisions])[last_T]
    num_experts = gpt.config.num_experts
    if missing := int((ids_TLK == num_experts).sum()):
        raise ValueError(f"capacity has taken away {missing} of {ids_TLK.size} choices: record with router.capacity_factor=0")
    ahead = [part.ahead_ids_TLK for part in decisions if part.ahead_ids_TLK is not None]
    ahead_TLK = np.concatenate(ahead)[last_T].astype(np.min_scalar_type(num_experts)) if len(ahead) == len(decisions) else None
    samples_S, lengths_S = np.unique(place_T2[last_T, 0], return_counts=True)
    return traced(
        ids_TLK.astype(np.min_scalar_type(num_experts - 1)),
        num_experts,
        weights_TLK=np.concatenate([part.weights_TLK for part in decisions])[last_T],
        sample_lengths_S=lengths_S,
        layers=gpt.served_moe_layers,
        name=name,
        ahead_ids_TLK=ahead_TLK,
        samples_S=samples_S,
    )


def record_routing(
    gpt: GPT,
    batches: Iterable[Batch],
    *,
    max_tokens: int,
    name: str,
    logprobs: bool = False,
    each_batch: Callable[[int], None] = lambda tokens: None,
) -> RoutingTrace:
    """The trace of the first `max_tokens` tokens of the batches, or of all of them, with what routers say ahead and the text;
    sequences must have numbers of their own.

    `logprobs`: with what the model gives the token behind each; `each_batch` is called with the number of tokens so far.
    ValueError for a model that has no such decisions."""
    gpt.eval()
    recorder = RoutingRecorder(max_tokens, ahead=True)
    texts: list[dict[str, Tensor]] = []
    with recorder.watching(gpt), torch.inference_mode():
        for batch in batches:
            before = recorder.room
            n_TD, _ = gpt.hidden(batch)
            facts = _facts(batch) | ({"logprobs": label_logprobs(gpt, n_TD, batch)} if logprobs else {})
            keep = torch.arange(batch.tokens_BS.numel(), device=n_TD.device) < before - recorder.room
            texts.append({key: value[keep & batch.valid_BS.flatten()] for key, value in facts.items()})
            each_batch(max_tokens - recorder.room)
            if recorder.room == 0:
                break
    decisions = recorder.decisions()
    trace = trace_of([decisions], gpt, max_tokens=max_tokens, name=name)
    order_T = _in_order(decisions.place_T2)
    whole = {key: torch.cat([text[key] for text in texts]).cpu().numpy()[order_T] for key in texts[0]}
    return replace(trace, text=_text_of(whole, gpt.vocab_size, np.concatenate([np.arange(n) for n in trace.sample_lengths_S])))


def label_logprobs(gpt: GPT, n_TD: Tensor, batch: Batch) -> Tensor:
    """float32 [T], in nats: of each token's label, NaN where it doesn't count.  `n_TD`: as `GPT.hidden` gives them."""
    label_T, out = batch.labels_BS.flatten(), []
    for rows in range(0, len(n_TD), ROWS_AT_ONCE):
        part = slice(rows, rows + ROWS_AT_ONCE)
        log_TV = gpt.logits(n_TD[part])[:, : gpt.vocab_size].float().log_softmax(1)
        out.append(log_TV.gather(1, label_T[part, None]).squeeze(1))
    return torch.cat(out).masked_fill(~batch.loss_mask_BS.flatten(), float("nan"))


def _facts(batch: Batch) -> dict[str, Tensor]:
    """int64 [T] each."""
    documents_BS = torch.zeros_like(batch.tokens_BS) if batch.document_BS is None else batch.document_BS
    facts = {"tokens": batch.tokens_BS, "positions": batch.position_BS, "documents": documents_BS}
    return {key: value_BS.flatten() for key, value_BS in facts.items()}


def _text_of(facts: dict[str, NDArray[Any]], vocab_size: int, index_T: NDArray[np.int64]) -> TracedText:
    """In small types; without what goes without saying.  `index_T`: of each token within its sample."""
    positions_T, documents_T = facts["positions"], facts["documents"]
    return TracedText(
        facts["tokens"].astype(np.min_scalar_type(vocab_size - 1)),
        None if np.array_equal(positions_T, index_T) else positions_T.astype(np.int32),
        documents_T.astype(np.int32) if documents_T.any() else None,
        facts.get("logprobs"),
    )


def _in_order(place_T2: NDArray[np.int64]) -> NDArray[np.int64]:
    """By number of the sequence and place in it."""
    return np.lexsort((place_T2[:, 1], place_T2[:, 0]))
