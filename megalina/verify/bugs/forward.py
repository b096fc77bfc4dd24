"""Bugs in the forward pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.config import PretrainConfig, RouterConfig
from megalina.model.routers import GroupLimited, GroupSoFar, Router, Routing
from megalina.model.selection import best_groups, groups_of_best, highest
from megalina.model.tokens import ALL, RouterTokens
from megalina.parallel.trainable import Trainable
from megalina.step.passes import decides
from megalina.step.program import Instruction
from megalina.verify.bugs.change import Function, around


def bias_added_tp_times(trainable: Trainable, config: PretrainConfig) -> None:
    more = trainable.mesh.tp.size - 1

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name not in ("attention_residual", "mlp_residual"):
            return function
        layer = trainable.gpt.layers[instruction.layer]
        bias = layer.attention.proj_bias if instruction.name == "attention_residual" else layer.mlp.b2
        if bias is None:
            return function
        return lambda x, added, batch: function(x, added + more * bias, batch)

    around(trainable, of)


def capacity_per_chunk(trainable: Trainable, config: PretrainConfig) -> None:
    for layer in trainable.gpt.moe_layers:
        router = trainable.gpt.layers[layer].router
        router.forward = _own_capacity(router)  # type: ignore[method-assign]


def _own_capacity(router: Router) -> Function:
    """A router to which the own tokens are all there are."""

    def forward(logits_TE: Tensor, tokens: RouterTokens, logits_AE: Tensor, own: slice) -> Routing:
        here = RouterTokens(tokens.token_A[own], tokens.sample_A[own], tokens.position_A[own], tokens.valid_A[own], 1)
        return Router.forward(router, logits_TE, here, logits_AE[own], ALL)

    return forward


def capacity_not_passed(trainable: Trainable, config: PretrainConfig) -> None:
    def of(instruction: Instruction, function: Function) -> Function:
        if not decides(instruction):
            return function

        def forgetful(*arguments: Any) -> Any:
            forgotten = (
                GroupSoFar(a.tokens, torch.zeros_like(a.chosen_E)) if isinstance(a, GroupSoFar) else a for a in arguments
            )
            return function(*forgotten)

        return forgetful

    around(trainable, of)


def group_rule_of_other_family(trainable: Trainable, config: PretrainConfig) -> None:
    """DeepSeek-V3's worth of a group of experts where DeepSeek-V2's is meant, and the other way round."""
    for layer in trainable.gpt.moe_layers:
        router = trainable.gpt.layers[layer].router
        rule = groups_of_best if isinstance(router, GroupLimited) else best_groups
        router.choose = partial(_by_rule, rule, config.router)  # type: ignore[method-assign]


def _by_rule(rule: Function, router: RouterConfig, tokens: RouterTokens, score_AE: Tensor) -> Tensor:
    return highest(rule(score_AE, router.num_groups, router.groups_per_token), router.top_k)


def expert_left_out(trainable: Trainable, config: PretrainConfig) -> None:
    """Nobody computes the last expert of each layer."""

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name != "experts":
            return function

        def without(got_ND: Tensor, weight_NE: Tensor) -> Tensor:
            there_E = torch.arange(weight_NE.shape[1], device=weight_NE.device) < weight_NE.shape[1] - 1
            return function(got_ND, weight_NE * there_E)

        return without

    around(trainable, of)


def rows_not_regrouped(trainable: Trainable, config: PretrainConfig) -> None:
    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name != "experts" or instruction.phase == "W":
            return function
        experts = trainable.gpt.layers[instruction.layer].experts
        return lambda got, counts: experts(got, counts.sizes(instruction.chunk).count_e)

    around(trainable, of)


def vocabulary_first_words(trainable: Trainable, config: PretrainConfig) -> None:
    gpt = trainable.gpt

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name == "embed":
            return lambda batch: gpt.embedder.looked_up(batch, 0)
        return (lambda n, batch: gpt.output.stat(n, batch, 0)) if instruction.name == "logits" else function

    around(trainable, of)


def dropout_per_rank(trainable: Trainable, config: PretrainConfig) -> None:
    trainable.gpt.seed += 1 + trainable.mesh.world.rank
    for layer in trainable.gpt.layers:
        layer.seed += 1 + trainable.mesh.world.rank
