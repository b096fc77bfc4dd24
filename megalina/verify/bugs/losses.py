"""Bugs in losses and in what they are divided by."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.model.balance import balance_loss
from megalina.model.mtp import MtpHead, ahead
from megalina.model.mutual_information import mutual_information_loss
from megalina.model.routers import Router, Routing
from megalina.model.tokens import ALL, Groups, RouterTokens
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction
from megalina.verify.bugs.change import Function, after, around, seeds


def padding_counted(trainable: Trainable, config: PretrainConfig) -> None:
    def counted(out: Tensor, *batches: Any) -> Tensor:
        padding = torch.stack([(~b.valid_BS).sum() for b in batches]).sum()
        out[:2] += padding
        return out

    after(trainable, "sizes", counted)


def balance_loss_per_rank(trainable: Trainable, config: PretrainConfig) -> None:
    if config.router.group == "global":
        own: list[Tensor] = []

        def of(instruction: Instruction, function: Function) -> Function:
            if instruction.name == "loads":

                def noted(*a: Any) -> Any:
                    own[:] = [function(*a)]
                    return own[0]

                return noted
            return (lambda *a: function(*a[:-1], own[0])) if instruction.name == "balance" else function

        around(trainable, of)
        return
    for layer in trainable.gpt.moe_layers:
        router = trainable.gpt.layers[layer].router
        router.forward = _own_balance(router)  # type: ignore[method-assign]


def _own_balance(router: Router) -> Function:
    """A router whose balance loss knows the own tokens' choices alone."""

    def forward(logits_TE: Tensor, tokens: RouterTokens, logits_AE: Tensor, own: slice) -> Routing:
        routing: Routing = Router.forward(router, logits_TE, tokens, logits_AE, own)
        groups = tokens.num_sequences if router.config.group == "sequence" else 1
        valid_T = tokens.valid_A[own]
        group_T = (torch.arange(len(tokens.valid_A)) // (len(tokens.valid_A) // groups))[own].to(valid_T.device)
        group_T = group_T.where(valid_T, groups)
        counts_GE = torch.zeros(groups + 1, router.num_experts + 1, dtype=torch.int64, device=valid_T.device)
        counts_GE.index_put_((group_T[:, None], routing.expert_TK), torch.ones_like(routing.expert_TK), accumulate=True)
        tokens_G = torch.bincount(group_T, minlength=groups + 1)[:groups]
        balance = balance_loss(router.log_scores(logits_TE).softmax(1), group_T, counts_GE[:groups, :-1], tokens_G, router.top_k)
        return replace(routing, balance=balance)

    return forward


def mutual_information_per_rank(trainable: Trainable, config: PretrainConfig) -> None:
    for layer in trainable.gpt.moe_layers:
        router = trainable.gpt.layers[layer].router
        router.forward = _own_information(router)  # type: ignore[method-assign]


def _own_information(router: Router) -> Function:
    """A router whose mutual information loss knows the own tokens alone."""

    def forward(logits_TE: Tensor, tokens: RouterTokens, logits_AE: Tensor, own: slice) -> Routing:
        routing: Routing = Router.forward(router, logits_TE, tokens, logits_AE, own)
        groups = tokens.by_sequence if router.config.group == "sequence" else tokens.together
        group_T = groups.group_A[own]
        here = Groups(groups.number, torch.bincount(group_T, minlength=groups.number + 1)[: groups.number], group_T)
        log_TE = router.log_scores(logits_TE.masked_fill(~tokens.valid_A[own, None], 0.0)).log_softmax(1)
        return replace(routing, information=mutual_information_loss(log_TE, log_TE.detach(), here, ALL))

    return forward


def mtp_across_documents(trainable: Trainable, config: PretrainConfig) -> None:
    for layer in trainable.gpt.mtp_layers:
        end = layer.functions["mtp_head"]
        assert isinstance(end, MtpHead)
        end.targets = partial(_of_any_document, end.depth)  # type: ignore[method-assign]


def _of_any_document(depth: int, batch: Batch) -> Batch:
    return ahead(replace(batch, document_BS=None), depth)


def mtp_loss_divided_twice(trainable: Trainable, config: PretrainConfig) -> None:
    seeds(trainable, lambda loss, part: 1 / trainable.mesh.dp.size if loss == "mtp_loss" else 1.0)


def load_counted_again(trainable: Trainable, config: PretrainConfig) -> None:
    """Routers count by themselves, whenever they run."""
    counted: dict[int, list[Tensor]] = {}
    places: dict[tuple[str, int, str], int] = {}  # of the load among what an instruction gives

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.phase == "F" and (found := [i for i, v in enumerate(instruction.writes) if v.startswith("#load.")]):
            places[instruction.key] = found[0]
        if instruction.name == "measure":
            return partial(_with_loads, instruction.reads, counted, function)
        if instruction.key not in places or instruction.phase not in "FB":
            return function

        def noted(*arguments: Any) -> Any:
            out = function(*arguments)
            counted.setdefault(instruction.layer, []).append(out[places[instruction.key]])
            return out

        return noted

    around(trainable, of)


def _with_loads(names: tuple[str, ...], counted: dict[int, list[Tensor]], measure: Function, *values: Any) -> Any:
    """`measure` of other loads: all that were counted in a layer for its first part, none for the others."""
    changed = list(values)
    for i, name in enumerate(names):
        if name.startswith("#load."):
            changed[i] = sum(counted.pop(int(name.split(".")[1]), []), torch.zeros_like(values[i]))
    return measure(*changed)


def home_of_rank(trainable: Trainable, config: PretrainConfig) -> None:
    for layer in trainable.gpt.moe_layers:
        router = trainable.gpt.layers[layer].router
        router.forward = _at_home_on(router, trainable.mesh.dp.rank)  # type: ignore[method-assign]


def _at_home_on(router: Router, node: int) -> Function:
    """A router to which all sequences are at home on one node."""

    def forward(logits_TE: Tensor, tokens: RouterTokens, *rest: Any) -> Routing:
        here = replace(tokens, sample_A=torch.full_like(tokens.sample_A, node))
        return Router.forward(router, logits_TE, here, *rest)

    return forward
