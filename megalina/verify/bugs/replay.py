"""Bugs in the replay of recorded routing."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megalina.config import PretrainConfig
from megalina.model.routers import GroupSoFar, Router, Routing
from megalina.model.tokens import RouterTokens
from megalina.parallel.trainable import Trainable


def replay_of_places(trainable: Trainable, config: PretrainConfig) -> None:
    """Numbers of experts are taken for places on the expert-parallel ranks: those of `parallel.placement`, or those of a server
    that deals experts out to its ranks in turns."""
    ranks, experts = config.parallel.ep, config.model.num_experts
    in_turns = [e for rank in range(ranks) for e in range(rank, experts, ranks)]
    for router in _routers(trainable):
        expert_E = torch.tensor(trainable.gpt.layers[router.layer].expert_order or in_turns)
        _change_given(router, partial(_of_places, expert_E))


def _of_places(expert_E: Tensor, given_AK: Tensor, tokens: RouterTokens) -> Tensor:
    return expert_E.to(given_AK.device)[given_AK.clamp(min=0)].where(given_AK >= 0, given_AK)


def replay_shifted(trainable: Trainable, config: PretrainConfig) -> None:
    """Each token gets the experts of the token before it, as if padding were in front where it is behind."""
    for router in _routers(trainable):
        _change_given(router, _shifted)


def _shifted(given_AK: Tensor, tokens: RouterTokens) -> Tensor:
    return given_AK.view(tokens.num_sequences, -1, given_AK.shape[1]).roll(1, dims=1).flatten(0, 1)


def replay_scores_zeroed(trainable: Trainable, config: PretrainConfig) -> None:
    """Weights are looked up among those of the router's own choices, where all others are zero."""
    for router in _routers(trainable):
        router.routed = partial(_of_own_choices, router.routed)  # type: ignore[method-assign]


def _of_own_choices(
    routed: Callable[..., Routing], logits_TE: Tensor, tokens: RouterTokens, *rest: Tensor | slice | GroupSoFar | None
) -> Routing:
    routing, own = routed(logits_TE, tokens, *rest), routed(logits_TE, replace(tokens, replay_ALK=None), *rest)
    is_own_TK = (routing.expert_TK[:, :, None] == own.expert_TK[:, None, :]).any(2)
    return replace(routing, weight_TK=routing.weight_TK * is_own_TK)


def _routers(trainable: Trainable) -> list[Router]:
    return [trainable.gpt.layers[layer].router for layer in trainable.gpt.moe_layers]


def _change_given(router: Router, change: Callable[[Tensor, RouterTokens], Tensor]) -> None:
    given = router.given

    def changed(tokens: RouterTokens) -> Tensor | None:
        given_AK = given(tokens)
        return None if given_AK is None else change(given_AK, tokens)

    router.given = changed  # type: ignore[method-assign]
