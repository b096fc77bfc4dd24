"""A router: sends each token to a few experts and says how much each of their outputs counts.

T own tokens, A all tokens of the micro-batch (T = A / (cp x tp)), D model width, E experts,
K columns of a routing, G groups of tokens that share capacity and balance, S tokens a sequence.

With tensor and context parallelism each rank owns a part of the micro-batch's tokens.  What depends on several tokens (capacity,
expert choice, the counts in the balance loss) is decided from all tokens' logits without gradient, alike on each rank;
gradients flow through the own tokens' logits alone.  So parts give exactly what the whole gives.

Choices may be given (`Batch.replay_BSLK`): then tokens go where these say, with the weights that the router's own scores give to
the given experts, through which gradients flow as ever.  All else, losses and statistics, is of the router's own choices.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalina.blocks.routers import kind_of
from megalina.config import RouterConfig
from megalina.model.balance import balance_loss
from megalina.model.capacity_bound import bounded, delta_of, nearness
from megalina.model.late_gradients import Later
from megalina.model.linear import wide_linear
from megalina.model.locality import locality_loss
from megalina.model.mutual_information import mutual_information_loss
from megalina.model.noise import normal
from megalina.model.selection import best_groups, capacity, groups_of_best, hashed, highest, taken_by_experts, within_capacity
from megalina.model.tokens import Groups, OwnTokens, RouterTokens
from megalina.reference import load


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
    chosen_E: Tensor  # int64, own tokens' choices before drops; the router's own ones where others are replayed
    dropped: Tensor  # int64 scalar, own tokens' assignments lost to capacity
    # int64, before drops, and the router's own where others are replayed; num_experts: padding; None for expert_choice
    wanted_TK: Tensor | None = None
    locality: Tensor | None = None  # scalar: own part of the sum over sequences of tokens x loss; None without the loss
    information: Tensor | None = None  # scalar: own part of the sum over groups of tokens x loss; None without the loss
    so_far: GroupSoFar | None = None  # with these tokens; None unless they are part of a group
    prob_TE: Tensor | None = None  # of the own tokens; None for expert_choice, hash ...
    valid_T: Tensor | None = None  # ... and 1 for those that are not padding, in its type

    @property
    def prob_E(self) -> Tensor:
        """Sum over own valid tokens of the probabilities, of which a balance loss over more tokens than these is made; 0 for
        expert_choice, hash."""
        if self.prob_TE is None or self.valid_T is None:
            return self.z.new_zeros(len(self.chosen_E))
        return self.valid_T @ self.prob_TE


class Router(nn.Module):
    """Routes tokens to experts.  A kind says how tokens choose (`scores`, `choose`) and how much each choice counts (`weights`),
    and what holds for an expert that gets no token.

    Equal scores go to the lower expert id, equal places in a queue to the earlier token.  Whatever the kind, an idle expert is
    legal: the routing simply never names it.
    """

    weight: nn.Parameter | None  # [E, D], or as the kind's `gate_shape` says; None where a kind has no gate
    bias: nn.Parameter | None  # [E], learned; None without router.bias
    has_scores: ClassVar[bool] = True  # False: fixed choices; nothing is learned, and nothing need be balanced
    bias_E: Tensor | None  # float32, added to the scores for the selection; None where bias_update_rate is 0
    delta: Tensor | None  # float64 [1], a cosine, which capacity follows; negative: not known yet; None without capacity_bound

    def __init__(self, config: RouterConfig, *, num_experts: int, layer: int, seed: int, width: int = 0) -> None:
        """`width`: of the tokens; a capacity bound needs it."""
        super().__init__()
        self.config, self.num_experts, self.layer, self.seed, self.width = config, num_experts, layer, seed, width
        self.top_k = config.top_k
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        bias_E = torch.zeros(num_experts, dtype=torch.float32) if config.bias_update_rate > 0 else None
        self.register_buffer("bias_E", bias_E)
        bound = config.capacity_bound != "none"
        self.register_buffer("delta", torch.full((1,), -1.0, dtype=torch.float64) if bound else None)

    # what a kind may say otherwise
    def noisy(self, logits_AE: Tensor, tokens: RouterTokens) -> Tensor | None:
        """[A, E]: what is added to the logits in training; None: nothing."""
        return None

    def probabilities(self, logits_AE: Tensor) -> Tensor:
        """[A, E]: what the router thinks of each expert, between 0 and 1, selection bias and renormalization left out."""
        return logits_AE.softmax(dim=1)

    def scores(self, logits_AE: Tensor) -> Tensor:
        """[A, E]: the highest are chosen; without gradient."""
        return logits_AE

    def choose(self, tokens: RouterTokens, score_AE: Tensor) -> Tensor:
        """[A, K]: the experts each token wants, padding and capacity not yet considered."""
        return highest(score_AE, self.top_k)

    def log_scores(self, logits_TE: Tensor) -> Tensor:
        """[T, E]: weights and the balance loss' probabilities are softmaxes of these."""
        return logits_TE

    def weights(self, log_TE: Tensor, prob_TE: Tensor, best_TK: Tensor) -> Tensor:
        """[T, K]: how much each choice counts, before scaling."""
        if self.config.renormalize:
            return log_TE.gather(1, best_TK).softmax(dim=1)
        return prob_TE.gather(1, best_TK)

    def cosines(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        """[T, E]: between each token and each expert's row; of kinds that have rows (`has_rows`)."""
        assert self.weight is not None
        return logits_TE / lengths(x_TD, logits_TE.dtype)[:, None] / lengths(self.weight, logits_TE.dtype)

    # for all kinds
    @property
    def looks_ahead(self) -> bool:
        """True: a token's routing depends on later tokens, so this routing is not what generation would do."""
        return self.config.has_capacity and self.config.drop == "probability"

    def logits(self, x_TD: Tensor, later: Later | None = None) -> Tensor:
        """[T, E], float32 or wider, whatever the dtype of the hidden state; zeros without a gate.  `later`: as in `linear`."""
        if self.weight is None:
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            return x_TD.new_zeros((x_TD.shape[0], self.num_experts), dtype=dtype)
        return wide_linear(x_TD, self.weight, self.bias, later=later)

    def forward(
        self, logits_TE: Tensor, tokens: RouterTokens, logits_AE: Tensor, own: OwnTokens, so_far: GroupSoFar | None = None
    ) -> Routing:
        """`logits_AE`: all tokens' logits, no gradient flows into them; `own`: where the T own tokens are among them.

        `so_far`: `tokens` are the next part of a group=micro_batch and are routed as in the whole of it: capacity is the whole
        group's, and queues go on where the part before left them (capacity passing; Jiang et al., "Lancet", 2024, section
        2.3).  The balance loss, which takes all parts, is left to the caller.
        """
        whole = so_far is None or (self.config.group == "micro_batch" and not self.looks_ahead)
        assert whole, "this routing takes its whole group"
        if tokens.replay_ALK is not None and (type(self).routed is not Router.routed or self.config.has_capacity):
            raise ValueError(
                f"router={self.config.kind} can't replay choices: it must let tokens choose, and have no capacity; leave out "
                "router.replay and router.replay_validation"
            )
        logits_AE = logits_AE.detach()
        if tokens.may_have_padding:
            # It may hold anything, also numbers that aren't finite: 0 x nan in a backward pass would spread.
            logits_TE = logits_TE.masked_fill(tokens.padding_A1[own], 0.0)
        clean_TE = logits_TE
        noise_AE = self.noisy(logits_AE, tokens) if self.training else None
        if noise_AE is not None:
            logits_AE = logits_AE + noise_AE
            logits_TE = logits_TE + noise_AE[own]
        return self.routed(logits_TE, tokens, logits_AE, own, clean_TE, so_far)

    @torch.no_grad()
    def update_bias(self, chosen_E: Tensor) -> None:
        """After a step, from the counts over all ranks: the bias of an expert below the mean rises, above it falls.

        Sources: Wang et al., "Auxiliary-loss-free load balancing strategy for mixture-of-experts" (2024), by sign; LongCat-Flash
        technical report (2025), section 2.1.1, in proportion to what an expert lacks of its share of the choices.
        """
        assert self.bias_E is not None, "no selection bias: router.bias_update_rate is 0"
        self.bias_E.add_(bias_step(chosen_E, self.config).to(self.bias_E.dtype), alpha=self.config.bias_update_rate)

    @torch.no_grad()
    def nearness(self, x_TD: Tensor, logits_TE: Tensor, routing: Routing) -> Tensor:
        """int64 [NEARNESS_BINS]: how near the own tokens are to the rows of the experts they want; [0] without a bound."""
        if self.delta is None:
            return routing.chosen_E.new_zeros(0)
        wanted_TK = routing.wanted_TK
        assert wanted_TK is not None
        there_TK = wanted_TK < self.num_experts
        return nearness(self.cosines(x_TD, logits_TE).gather(1, wanted_TK.masked_fill(~there_TK, 0)), there_TK)

    @torch.no_grad()
    def update_delta(self, count_B: Tensor) -> None:
        """After a step, from how near its tokens were over all micro-batches and ranks: the first step's delta is taken, later
        ones move it."""
        assert self.delta is not None, "no delta: router.capacity_bound is none"
        found = delta_of(count_B, self.config)
        if found is not None:
            kept = self.config.capacity_ema or 1.0
            self.delta.copy_(torch.where(self.delta < 0, found, kept * self.delta + (1 - kept) * found))

    def capacities(self, tokens_G: Tensor) -> Tensor:
        """int64 [G]: of an expert, in tokens of each group."""
        config = self.config
        most_G = capacity(tokens_G, config.capacity_factor, self.top_k, self.num_experts) if config.capacity_factor else tokens_G
        if self.delta is None:
            return most_G
        return bounded(most_G, self.delta, width=self.width, num_experts=self.num_experts, least=config.capacity_min)

    def given(self, tokens: RouterTokens) -> Tensor | None:
        """int64 [A, K]: the experts to which this layer's tokens go whatever it would choose, -1: it chooses; None: for all."""
        replay_ALK = tokens.replay_ALK
        if replay_ALK is None or self.layer >= replay_ALK.shape[1]:  # of multi-token prediction: served models have no such layer
            return None
        return replay_ALK[:, self.layer].long()

    def routed(
        self,
        logits_TE: Tensor,
        tokens: RouterTokens,
        logits_AE: Tensor,
        own: OwnTokens,
        clean_TE: Tensor,
        before: GroupSoFar | None,
    ) -> Routing:
        """Tokens choose experts."""
        config, num_experts = self.config, self.num_experts
        groups = tokens.by_sequence if config.group == "sequence" else tokens.together
        score_AE = self.scores(logits_AE)
        best_AK = self.choose(tokens, score_AE if self.bias_E is None else score_AE + self.bias_E)
        queues = groups.number + tokens.may_have_padding  # padding queues apart
        queue_AK = best_AK if queues == 1 else torch.add(best_AK, groups.group_A[:, None], alpha=num_experts)
        chosen_GE = _count(queue_AK, queues * num_experts).view(queues, num_experts)[: groups.number]  # without padding
        expert_AK = best_AK
        if tokens.may_have_padding:
            expert_AK = best_AK.masked_fill(tokens.padding_A1, num_experts)
        before_TK = expert_AK[own]
        dropped = chosen_GE.new_zeros(())
        if config.has_capacity:
            capacity_G = self.capacities(groups.tokens_G if before is None else before.tokens.view(1))
            capacity_Q = F.pad(capacity_G, (0, queues - groups.number)).repeat_interleave(
                num_experts, output_size=queues * num_experts
            )
            if before is not None:
                capacity_Q[:num_experts] -= before.chosen_E  # below zero where the queue is longer than the capacity already
            priority_AK = self.probabilities(logits_AE).gather(1, best_AK) if config.drop == "probability" else None
            kept_N = within_capacity(queue_AK.view(-1), capacity_Q, None if priority_AK is None else priority_AK.view(-1))
            expert_AK = expert_AK.masked_fill(~kept_N.view_as(expert_AK), num_experts)
            dropped = (before_TK != expert_AK[own]).sum()
        if (given_AK := self.given(tokens)) is not None:
            best_AK = torch.where(given_AK >= 0, given_AK, best_AK)
            expert_AK = best_AK.masked_fill(tokens.padding_A1, num_experts) if tokens.may_have_padding else best_AK
        expert_TK = expert_AK[own]
        all_tokens = len(logits_TE) == len(logits_AE)
        chosen_E = chosen_GE.sum(dim=0) if all_tokens else _count(before_TK, num_experts + 1)[:num_experts]
        nobody_TK = expert_TK == num_experts if tokens.may_have_padding or config.has_capacity else None
        so_far = None if before is None else GroupSoFar(before.tokens, before.chosen_E + chosen_GE[0])
        zero = logits_TE.new_zeros(())
        if not self.has_scores:
            weight_TK = logits_TE.new_full(expert_TK.shape, config.scale / self.top_k)
            weight_TK = weight_TK if nobody_TK is None else weight_TK.masked_fill_(nobody_TK, 0.0)
            return Routing(expert_TK, weight_TK, zero, zero, chosen_E, dropped, before_TK, so_far=so_far)

        log_TE = self.log_scores(logits_TE)
        prob_TE = log_TE.softmax(dim=1)
        weight_TK = self.weights(log_TE, prob_TE, best_AK[own])
        weight_TK = weight_TK if config.scale == 1.0 else weight_TK * config.scale
        weight_TK = weight_TK if nobody_TK is None else weight_TK.masked_fill(nobody_TK, 0.0)
        balance, held_TE = zero, prob_TE if config.balance_loss else prob_TE.detach()
        if config.group != "global" and so_far is None:
            balance = balance_loss(held_TE, groups.group_A[own], chosen_GE, groups.tokens_G, self.top_k)
        locality = None
        if config.locality_loss:
            prob_AE = self.log_scores(logits_AE).softmax(dim=1)
            locality = locality_loss(prob_TE, prob_AE, tokens, own, config.locality_nodes)
        information = None
        if config.mutual_information_loss:
            log_AE = self.log_scores(logits_AE).log_softmax(dim=1)
            information = mutual_information_loss(log_TE.log_softmax(dim=1), log_AE, groups, own)
        z, valid_T = z_loss(clean_TE, tokens, own, config.z_loss), tokens.counted(prob_TE.dtype)[own]
        return Routing(
            expert_TK, weight_TK, balance, z, chosen_E, dropped, before_TK, locality, information, so_far, held_TE, valid_T
        )


class TopK(Router):
    """Softmax over all experts, then the best top_k.  An idle expert's weights get a zero gradient; the router can bring it back:
    its probability is in every softmax, and the balance loss, where its weight is positive, lowers the others' probabilities."""


class Sigmoid(Router):
    """Sigmoid scores; the best top_k of score + bias, weights from scores without bias (DeepSeek-V3).  The bias of an idle expert
    rises by bias_update_rate a step, so it is chosen again sooner or later (at rate 0: as topk, and without renormalization only
    the balance loss reaches its score)."""

    def probabilities(self, logits_AE: Tensor) -> Tensor:
        return logits_AE.sigmoid()

    def scores(self, logits_AE: Tensor) -> Tensor:
        return logits_AE.sigmoid()

    def log_scores(self, logits_TE: Tensor) -> Tensor:
        """Logarithms of sigmoids: sigmoid / sum of sigmoids without 0 / 0."""
        return F.logsigmoid(logits_TE)

    def weights(self, log_TE: Tensor, prob_TE: Tensor, best_TK: Tensor) -> Tensor:
        chosen_TK = log_TE.gather(1, best_TK)
        return chosen_TK.softmax(dim=1) if self.config.renormalize else chosen_TK.exp()


class GroupLimited(Sigmoid):
    """As sigmoid, within the best groups_per_token groups of experts.  An idle expert's bias also lifts its group."""

    def choose(self, tokens: RouterTokens, score_AE: Tensor) -> Tensor:
        return highest(best_groups(score_AE, self.config.num_groups, self.config.groups_per_token), self.top_k)


class GroupLimitedSoftmax(Router):
    """As topk, within the groups_per_token groups of experts that have the most probable ones (DeepSeek-V2).  An idle expert is
    helped as with topk, once its group is chosen."""

    def scores(self, logits_AE: Tensor) -> Tensor:
        return logits_AE.softmax(dim=1)

    def choose(self, tokens: RouterTokens, score_AE: Tensor) -> Tensor:
        return highest(groups_of_best(score_AE, self.config.num_groups, self.config.groups_per_token), self.top_k)


class NoisyTopK(Router):
    """As topk, with Gaussian noise on the logits in training: an expert close to the best is tried now and then; one far behind
    (many times noise_std) is helped by the balance loss alone."""

    def noisy(self, logits_AE: Tensor, tokens: RouterTokens) -> Tensor | None:
        if not self.config.noise_std:
            return None
        noise_AE = normal(self.seed, self.layer, "router", tokens.sample_A, tokens.position_A, self.num_experts)
        return noise_AE.mul_(self.config.noise_std).to(logits_AE.dtype)


class Hash(Router):
    """Fixed by token id.  An expert is idle if none of its tokens occurs; nothing changes that."""

    has_scores = False

    def choose(self, tokens: RouterTokens, score_AE: Tensor) -> Tensor:
        return hashed(tokens.token_A, self.layer, self.top_k, self.num_experts)


class ExpertChoice(Router):
    """Each expert takes ceil(c x tokens x top_k / experts) tokens of its group (c: capacity_factor, or 1), so no expert is idle
    unless a group has no valid token; but a token may get no expert.  Looks at later tokens."""

    @property
    def looks_ahead(self) -> bool:
        return True

    def routed(
        self,
        logits_TE: Tensor,
        tokens: RouterTokens,
        logits_AE: Tensor,
        own: OwnTokens,
        clean_TE: Tensor,
        before: GroupSoFar | None,
    ) -> Routing:
        config, num_experts = self.config, self.num_experts
        groups = tokens.by_sequence if config.group == "sequence" else tokens.together
        room_BS1 = tokens.once(_room, groups, config.capacity_factor or 1.0, self.top_k, num_experts)
        score_BSE = self.probabilities(logits_AE).view(*room_BS1.shape[:2], num_experts)
        padding_BS1 = tokens.padding_A1.view(room_BS1.shape) if tokens.may_have_padding else None
        taken_AE = taken_by_experts(score_BSE, padding_BS1, room_BS1).view(-1, num_experts)
        columns = max(1, int(taken_AE.sum(dim=1).max()))  # over all tokens: each rank's routing is equally wide
        taken_TE, ids_E = taken_AE[own], torch.arange(num_experts, device=taken_AE.device)
        # The experts that took the token in order of their id, then `num_experts` as often as needed.
        expert_TK = torch.where(taken_TE, ids_E, num_experts).topk(columns, dim=1, largest=False).values
        nobody_TK = expert_TK == num_experts
        index_TK = expert_TK.masked_fill(nobody_TK, 0)
        if config.renormalize:
            # A very low logit rather than -inf: a token that no expert took would have nothing to normalize by.
            low = torch.finfo(logits_TE.dtype).min
            weight_TK = logits_TE.gather(1, index_TK).masked_fill(nobody_TK, low).softmax(dim=1)
        else:
            weight_TK = logits_TE.softmax(dim=1).gather(1, index_TK)
        weight_TK = (weight_TK if config.scale == 1.0 else weight_TK * config.scale).masked_fill(nobody_TK, 0.0)
        chosen_E = taken_TE.sum(dim=0)
        zero, z = logits_TE.new_zeros(()), z_loss(logits_TE, tokens, own, config.z_loss)
        return Routing(expert_TK, weight_TK, zero, z, chosen_E, chosen_E.new_zeros(()))


def _room(tokens: RouterTokens, groups: Groups, factor: float, top_k: int, num_experts: int) -> Tensor:
    """bool [B, S, 1]: of the tokens in the order in which an expert likes them, those that it takes."""
    capacity_B = capacity(groups.tokens_G, factor, top_k, num_experts)
    place_S1 = torch.arange(len(tokens.valid_A) // groups.number, device=capacity_B.device)[:, None]
    return place_S1 < capacity_B[:, None, None]


def router_class(config: RouterConfig) -> type[Router]:
    """The torch class of `router.kind`.  ValueError for a kind that isn't there."""
    kind = kind_of(config)
    found = load(kind.functions)
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise ValueError(f"{kind.functions} is no Router: derive it from megalina.model.routers.Router")
    return found


def bias_step(chosen_E: Tensor, config: RouterConfig) -> Tensor:
    """float64 [E]: what a step's choices do to the selection biases, before the rate.  A function of whole numbers, so it has the
    same bits in every layout."""
    chosen_E = chosen_E.to(torch.float64)
    if config.bias_update == "proportional":
        return 1.0 / len(chosen_E) - chosen_E / chosen_E.sum() if chosen_E.any() else torch.zeros_like(chosen_E)
    sign_E = (chosen_E.mean() - chosen_E).sign()
    return sign_E - sign_E.mean() if config.bias_centered else sign_E


def lengths(rows_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """[N], never zero: of row vectors."""
    return torch.linalg.vector_norm(rows_ND, dim=1, dtype=dtype).clamp(min=torch.finfo(dtype).tiny)


def _count(index: Tensor, num_bins: int) -> Tensor:
    """[num_bins] int64.  On a GPU `torch.bincount` would make the host wait for the largest index."""
    index = index.reshape(-1)
    if index.is_cpu:
        return torch.bincount(index, minlength=num_bins)
    return torch.zeros(num_bins, dtype=torch.int64, device=index.device).scatter_add_(0, index, torch.ones_like(index))


def z_loss(logits_TE: Tensor, tokens: RouterTokens, own: OwnTokens, weight: float) -> Tensor:
    """Sum over own valid tokens of logsumexp(logits)^2: the router z-loss of ST-MoE (Zoph et al. 2022), not yet averaged.  With
    weight 0 it is a number to report and has no backward pass."""
    log_T = (logits_TE if weight else logits_TE.detach()).logsumexp(dim=1)
    valid_T = tokens.counted(log_T.dtype)[own] if tokens.may_have_padding else None
    return torch.dot(log_T, log_T if valid_T is None else log_T * valid_T)
