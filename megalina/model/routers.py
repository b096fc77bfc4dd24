"""A router: sends each token to a few experts and says how much each of their outputs counts.

T own tokens, A all tokens of the micro-batch (T = A / tp, the own ones are a slice), D model width, E experts,
K columns of a routing, G groups of tokens that share capacity and balance, S tokens a sequence.

With tensor parallelism each rank owns a slice of the micro-batch.  What depends on several tokens (capacity, expert
choice, the counts in the balance loss) is decided from all tokens' logits without gradient, alike on each rank;
gradients flow through the own tokens' logits alone.  So slices give exactly what the whole gives.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalina.config import RouterConfig, choices_of
from megalina.model.balance import balance_loss
from megalina.model.capacity import capacity, within_capacity
from megalina.model.noise import normal
from megalina.model.selection import best_groups, hashed, highest, taken_by_experts


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of tokens that share capacity and balance."""

    number: int  # G
    tokens_G: Tensor  # int64, valid tokens
    group_A: Tensor  # int64, each token's; padding is a group of its own, G


@dataclass(frozen=True)
class RouterTokens:
    """The micro-batch's tokens, sequence after sequence, the same on each rank of a tensor-parallel group."""

    token_A: Tensor  # int64, token id
    sample_A: Tensor  # int64, number of the sequence since the start of training
    position_A: Tensor  # int64, index within the sequence, 0 .. S-1, never starting anew
    valid_A: Tensor  # bool, False: padding
    num_sequences: int  # A = num_sequences x S
    may_have_padding: bool = True  # False: all are valid, and nothing need be masked

    @cached_property
    def by_sequence(self) -> Groups:
        return self._in_groups(self.num_sequences)

    @cached_property
    def together(self) -> Groups:
        return self._in_groups(1)

    def _in_groups(self, number: int) -> Groups:
        tokens_G = self.valid_A.view(number, -1).sum(dim=1)
        group_A = torch.arange(len(self.valid_A), device=self.valid_A.device) // (len(self.valid_A) // number)
        return Groups(number, tokens_G, group_A.masked_fill_(~self.valid_A, number))


@dataclass(frozen=True, slots=True)
class GroupSoFar:
    """What a group that is routed part by part, in the order of its tokens, knows before its next part."""

    tokens: Tensor  # int64 scalar, valid tokens of the whole group, parts to come among them
    chosen_E: Tensor  # int64, choices before drops in the parts so far: the places taken in each expert's queue


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the own tokens go, and the own tokens' part of the auxiliary losses."""

    expert_TK: Tensor  # int64; num_experts: nobody (padding, beyond capacity, unused column)
    weight_TK: Tensor  # at least float32, differentiable; exactly 0 where nobody
    balance: Tensor  # scalar: own part of the sum over groups of tokens x loss; 0 for global, expert_choice, hash, parts
    z: Tensor  # scalar: sum over own valid tokens of logsumexp(logits)^2 (ST-MoE); 0 for hash
    chosen_E: Tensor  # int64, own tokens' choices before drops
    dropped: Tensor  # int64 scalar, own tokens' assignments lost to capacity
    prob_E: Tensor  # sum over own valid tokens of the probabilities; 0 for expert_choice, hash
    so_far: GroupSoFar | None = None  # with these tokens; None unless they are part of a group


def check_router(config: RouterConfig, num_experts: int) -> None:
    """ValueError for settings that contradict each other or would do nothing."""
    for name, value in (("kind", config.kind), ("group", config.group), ("drop", config.drop)):
        if value not in (known := choices_of(RouterConfig, name)):
            raise ValueError(f"router.{name} is {value!r}: choose one of {', '.join(known)}")
    if not 1 <= config.top_k <= num_experts:
        raise ValueError(f"router.top_k is {config.top_k}: choose 1 to {num_experts}, the number of experts")
    if not 0.0 <= config.capacity_factor < float("inf"):
        raise ValueError(f"router.capacity_factor is {config.capacity_factor}: choose a positive number, or 0 for dropless")
    if config.group == "global" and (config.capacity_factor > 0 or config.kind == "expert_choice"):
        raise ValueError(
            f"router.group=global with router.kind={config.kind} and capacity_factor={config.capacity_factor}: capacity and "
            "expert choice would need every rank's tokens; choose group=sequence or micro_batch"
        )
    if config.bias_update_rate < 0 or (config.bias_update_rate > 0 and config.kind not in ("sigmoid", "group_limited")):
        raise ValueError(
            f"router.bias_update_rate is {config.bias_update_rate} with router.kind={config.kind}: the selection bias is "
            "for sigmoid and group_limited and its rate positive; choose 0"
        )
    if config.noise_std < 0 or (config.noise_std > 0 and config.kind != "noisy_topk"):
        raise ValueError(f"router.noise_std is {config.noise_std} with router.kind={config.kind}: choose 0 or kind=noisy_topk")
    if config.kind == "group_limited":
        groups, chosen = config.num_groups, config.groups_per_token
        if groups < 1 or num_experts % groups:
            raise ValueError(f"router.num_groups is {groups}: choose a divisor of {num_experts}, the number of experts")
        if not 1 <= chosen <= groups:
            raise ValueError(f"router.groups_per_token is {chosen}: choose 1 to {groups}, the number of groups")
        if chosen * (num_experts // groups) < config.top_k:
            raise ValueError(
                f"router.top_k is {config.top_k} but {chosen} groups hold {chosen * (num_experts // groups)} experts: "
                "raise groups_per_token or lower top_k"
            )


class Router(nn.Module):
    """Routes tokens to experts; `kind` says how, and what holds for an expert that gets no token.

    topk           softmax over all experts, then the best top_k.  An idle expert's weights get a zero gradient; the
                   router can bring it back: its probability is in every softmax, and the balance loss, where its
                   weight is positive, lowers the others' probabilities.
    sigmoid        sigmoid scores; the best top_k of score + bias, weights from scores without bias (DeepSeek-V3).
                   The bias of an idle expert rises by bias_update_rate a step, so it is chosen again sooner or later
                   (at rate 0: as topk, and without renormalisation only the balance loss reaches its score).
    group_limited  as sigmoid, within the best groups_per_token groups of experts.  An idle expert's bias also lifts
                   its group.
    noisy_topk     as topk, with Gaussian noise on the logits in training: an expert close to the best is tried now
                   and then; one far behind (many times noise_std) is helped by the balance loss alone.
    hash           fixed by token id.  An expert is idle if none of its tokens occurs; nothing changes that.
    expert_choice  each expert takes ceil(c x tokens x top_k / experts) tokens of its group (c: capacity_factor, or
                   1), so no expert is idle unless a group has no valid token; but a token may get no expert.  Looks
                   at later tokens.

    Equal scores go to the lower expert id, equal places in a queue to the earlier token.  Whatever the kind, an idle
    expert is legal: the routing simply never names it.
    """

    weight: nn.Parameter | None  # [E, D]; None for hash
    bias_E: Tensor | None  # float32, added to the scores for the selection; None where bias_update_rate is 0

    def __init__(self, config: RouterConfig, *, d_model: int, num_experts: int, layer: int, seed: int) -> None:
        super().__init__()
        check_router(config, num_experts)
        self.kind = config.kind
        self.top_k = config.top_k
        self.renormalize = config.renormalize
        self.scale = config.scale
        self.group = config.group
        self.capacity_factor = config.capacity_factor
        self.drop = config.drop
        self.bias_update_rate = config.bias_update_rate
        self.num_groups = config.num_groups
        self.groups_per_token = config.groups_per_token
        self.noise_std = config.noise_std
        self.num_experts = num_experts
        self.layer = layer
        self.seed = seed
        self.sigmoid = config.kind in ("sigmoid", "group_limited")
        if config.kind == "hash":
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(num_experts, d_model))
            nn.init.normal_(self.weight, std=0.02)
        bias_E = torch.zeros(num_experts, dtype=torch.float32) if config.bias_update_rate > 0 else None
        self.register_buffer("bias_E", bias_E)

    @property
    def looks_ahead(self) -> bool:
        """True: a token's routing depends on later tokens, so this routing is not what generation would do."""
        return self.kind == "expert_choice" or (self.capacity_factor > 0 and self.drop == "probability")

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E], float32 or wider, whatever the dtype of the hidden state; zeros for hash."""
        if self.weight is None:
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            return x_TD.new_zeros((x_TD.shape[0], self.num_experts), dtype=dtype)
        dtype = torch.promote_types(torch.promote_types(x_TD.dtype, self.weight.dtype), torch.float32)
        return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    def forward(
        self, logits_TE: Tensor, tokens: RouterTokens, logits_AE: Tensor, own: slice, so_far: GroupSoFar | None = None
    ) -> Routing:
        """`logits_AE`: all tokens' logits, no gradient flows into them; `own`: where the T own tokens are among them.

        `so_far`: `tokens` are the next part of a group=micro_batch and are routed as in the whole of it: capacity is the whole
        group's, and queues go on where the part before left them (capacity passing; Jiang et al., "Lancet", 2024, section
        2.3).  The balance loss, which takes all parts, is left to the caller.
        """
        assert so_far is None or (self.group == "micro_batch" and not self.looks_ahead), "this routing takes its whole group"
        logits_AE = logits_AE.detach()
        if tokens.may_have_padding:
            # It may hold anything, also numbers that aren't finite: 0 x nan in a backward pass would spread.
            logits_TE = logits_TE.masked_fill(~tokens.valid_A[own, None], 0.0)
        clean_TE = logits_TE
        if self.kind == "noisy_topk" and self.training and self.noise_std > 0:
            noise_AE = normal(self.seed, self.layer, "router", tokens.sample_A, tokens.position_A, self.num_experts)
            noise_AE = noise_AE.mul_(self.noise_std).to(logits_AE.dtype)
            logits_AE = logits_AE + noise_AE
            logits_TE = logits_TE + noise_AE[own]
        if self.kind == "expert_choice":
            return self._expert_choice(logits_TE, tokens, logits_AE, own)
        return self._token_choice(logits_TE, tokens, logits_AE, own, clean_TE, so_far)

    @torch.no_grad()
    def update_bias(self, chosen_E: Tensor) -> None:
        """After a step, from the counts over all ranks: the bias of an expert below the mean rises, above it falls.

        Source: Wang et al., "Auxiliary-loss-free load balancing strategy for mixture-of-experts" (2024).
        """
        assert self.bias_E is not None, "no selection bias: router.bias_update_rate is 0"
        chosen_E = chosen_E.to(torch.float64)
        self.bias_E.add_((chosen_E.mean() - chosen_E).sign().to(self.bias_E.dtype), alpha=self.bias_update_rate)

    def _token_choice(
        self,
        logits_TE: Tensor,
        tokens: RouterTokens,
        logits_AE: Tensor,
        own: slice,
        clean_TE: Tensor,
        before: GroupSoFar | None,
    ) -> Routing:
        num_experts = self.num_experts
        groups = tokens.by_sequence if self.group == "sequence" else tokens.together
        best_AK = self._choose(tokens, logits_AE)
        queue_AK = torch.add(best_AK, groups.group_A[:, None], alpha=num_experts)
        chosen_GE = _count(queue_AK, (groups.number + 1) * num_experts).view(-1, num_experts)[:-1]  # without padding
        expert_AK = best_AK
        if tokens.may_have_padding:
            expert_AK = best_AK.masked_fill(~tokens.valid_A[:, None], num_experts)
        before_TK = expert_AK[own]
        if self.capacity_factor > 0:
            tokens_G = groups.tokens_G if before is None else before.tokens.view(1)
            capacity_G = capacity(tokens_G, self.capacity_factor, self.top_k, num_experts)
            capacity_Q = F.pad(capacity_G, (0, 1)).repeat_interleave(num_experts, output_size=(groups.number + 1) * num_experts)
            if before is not None:
                capacity_Q[:num_experts] -= before.chosen_E  # below zero where the queue is longer than the capacity already
            priority_AK = self._priority(logits_AE).gather(1, best_AK) if self.drop == "probability" else None
            kept_N = within_capacity(queue_AK.view(-1), capacity_Q, None if priority_AK is None else priority_AK.view(-1))
            expert_AK = expert_AK.masked_fill(~kept_N.view_as(expert_AK), num_experts)
        expert_TK = expert_AK[own]
        everybody = len(logits_TE) == len(logits_AE)
        chosen_E = chosen_GE.sum(dim=0) if everybody else _count(before_TK, num_experts + 1)[:num_experts]
        dropped = (before_TK != expert_TK).sum()
        nobody_TK = expert_TK == num_experts if tokens.may_have_padding or self.capacity_factor > 0 else None
        so_far = None if before is None else GroupSoFar(before.tokens, before.chosen_E + chosen_GE[0])
        zero = logits_TE.new_zeros(())
        if self.kind == "hash":
            weight_TK = logits_TE.new_full(expert_TK.shape, self.scale / self.top_k)
            weight_TK = weight_TK if nobody_TK is None else weight_TK.masked_fill_(nobody_TK, 0.0)
            return Routing(expert_TK, weight_TK, zero, zero, chosen_E, dropped, logits_TE.new_zeros(num_experts), so_far)

        # Weights and probabilities are softmaxes of logarithms, also of sigmoids: sigmoid / sum of sigmoids without 0 / 0.
        log_TE = F.logsigmoid(logits_TE) if self.sigmoid else logits_TE
        prob_TE = log_TE.softmax(dim=1)
        weight_TK = self._weights(log_TE, prob_TE, best_AK[own])
        weight_TK = weight_TK if nobody_TK is None else weight_TK.masked_fill(nobody_TK, 0.0)
        valid_T = tokens.valid_A[own].to(prob_TE.dtype)
        balance = zero
        if self.group != "global" and so_far is None:
            balance = balance_loss(prob_TE, groups.group_A[own], chosen_GE, groups.tokens_G, self.top_k)
        return Routing(expert_TK, weight_TK, balance, _z(clean_TE, valid_T), chosen_E, dropped, valid_T @ prob_TE, so_far)

    def _choose(self, tokens: RouterTokens, logits_AE: Tensor) -> Tensor:
        """[A, K]: the experts each token wants, padding and capacity not yet considered."""
        if self.kind == "hash":
            return hashed(tokens.token_A, self.layer, self.top_k, self.num_experts)
        score_AE = self._priority(logits_AE) if self.sigmoid else logits_AE
        if self.bias_E is not None:
            score_AE = score_AE + self.bias_E
        if self.kind == "group_limited":
            score_AE = best_groups(score_AE, self.num_groups, self.groups_per_token)
        return highest(score_AE, self.top_k)

    def _priority(self, logits_AE: Tensor) -> Tensor:
        """[A, E]: what the router thinks of each expert, between 0 and 1, selection bias and renormalisation left out."""
        return logits_AE.sigmoid() if self.sigmoid else logits_AE.softmax(dim=1)

    def _weights(self, log_TE: Tensor, prob_TE: Tensor, best_TK: Tensor) -> Tensor:
        if self.renormalize:
            weight_TK = log_TE.gather(1, best_TK).softmax(dim=1)
        elif self.sigmoid:
            weight_TK = log_TE.gather(1, best_TK).exp()
        else:
            weight_TK = prob_TE.gather(1, best_TK)
        return weight_TK if self.scale == 1.0 else weight_TK * self.scale

    def _expert_choice(self, logits_TE: Tensor, tokens: RouterTokens, logits_AE: Tensor, own: slice) -> Routing:
        num_experts = self.num_experts
        groups = tokens.num_sequences if self.group == "sequence" else 1
        valid_BS = tokens.valid_A.view(groups, -1)
        capacity_B = capacity(valid_BS.sum(dim=1), self.capacity_factor or 1.0, self.top_k, num_experts)
        score_BSE = self._priority(logits_AE).view(*valid_BS.shape, num_experts)
        taken_AE = taken_by_experts(score_BSE, valid_BS, capacity_B).view(-1, num_experts)
        columns = max(1, int(taken_AE.sum(dim=1).max()))  # over all tokens: each rank's routing is equally wide
        ids_E = torch.arange(num_experts, device=taken_AE.device)
        # The experts that took the token in order of their id, then `num_experts` as often as needed.
        expert_TK = torch.where(taken_AE[own], ids_E, num_experts).topk(columns, dim=1, largest=False).values
        nobody_TK = expert_TK == num_experts
        index_TK = expert_TK.masked_fill(nobody_TK, 0)
        if self.renormalize:
            # A very low logit rather than -inf: a token that no expert took would have nothing to normalise by.
            low = torch.finfo(logits_TE.dtype).min
            weight_TK = logits_TE.gather(1, index_TK).masked_fill(nobody_TK, low).softmax(dim=1)
        else:
            weight_TK = logits_TE.softmax(dim=1).gather(1, index_TK)
        weight_TK = (weight_TK * self.scale).masked_fill(nobody_TK, 0.0)
        zero = logits_TE.new_zeros(())
        z = _z(logits_TE, tokens.valid_A[own].to(logits_TE.dtype))
        chosen_E = taken_AE[own].sum(dim=0)
        return Routing(expert_TK, weight_TK, zero, z, chosen_E, torch.zeros_like(chosen_E[0]), logits_TE.new_zeros(num_experts))


def _count(index: Tensor, num_bins: int) -> Tensor:
    """[num_bins] int64.  On a GPU `torch.bincount` would make the host wait for the largest index."""
    index = index.reshape(-1)
    if index.is_cpu:
        return torch.bincount(index, minlength=num_bins)
    return torch.zeros(num_bins, dtype=torch.int64, device=index.device).scatter_add_(0, index, torch.ones_like(index))


def _z(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Sum over valid tokens of logsumexp(logits)^2: the router z-loss of ST-MoE (Zoph et al. 2022), not yet averaged."""
    return torch.dot(logits_TE.logsumexp(dim=1).square(), valid_T)
