"""Routing by a loop over tokens, written the plainest way, in float64; and the tokens.

Shapes: B sequences, S tokens a sequence, A = B x S tokens, E experts.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from megalina.config import RouterConfig
from megalina.model.noise import normal, uniform
from megalina.model.tokens import RouterTokens

B, S, E = 4, 6, 6
A = B * S


def make_tokens(valid_A: Tensor | None = None, sequences: int = B, length: int = S) -> RouterTokens:
    count = sequences * length
    random = torch.Generator().manual_seed(3)
    return RouterTokens(
        token_A=torch.randint(0, 1000, (count,), generator=random),
        sample_A=torch.arange(40, 40 + sequences).repeat_interleave(length),
        position_A=torch.arange(length).repeat(sequences),
        valid_A=torch.ones(count, dtype=torch.bool) if valid_A is None else valid_A,
        num_sequences=sequences,
    )


def some_padding() -> Tensor:
    valid_A = torch.rand(A, generator=torch.Generator().manual_seed(5)) < 0.75
    valid_A[S : 2 * S] = False  # a sequence of nothing but padding
    return valid_A


def best(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def slow_route(config: RouterConfig, logits_AE: Tensor, tokens: RouterTokens, bias: list[float], training: bool) -> dict:
    """Every token, group and expert in turn; `pairs` maps (token, expert) to a differentiable weight."""
    k = config.top_k
    noisy = logits_AE
    if training and config.noise_std:
        noise = normal(7, 2, "router", tokens.sample_A, tokens.position_A, E)
        noisy = logits_AE + config.noise_std * noise
    token_hash = uniform(0, 2, "hash", tokens.token_A, torch.zeros(A, dtype=torch.int64), E).tolist()
    valid = [a for a in range(A) if tokens.valid_A[a]]
    group_of = {a: a // S if config.group == "sequence" else 0 for a in valid}
    members: dict[int, list[int]] = {g: [a for a in valid if group_of[a] == g] for g in set(group_of.values())}
    sigmoid = config.kind in ("sigmoid", "group_limited")
    score = {a: torch.sigmoid(noisy[a]) if sigmoid else torch.exp(noisy[a]) / torch.exp(noisy[a]).sum() for a in valid}

    def limit(group: list[int], factor: float) -> int:
        return math.ceil(Fraction(str(factor)) * len(group) * k / E)

    chosen: dict[int, list[int]] = {}
    for a in valid:
        biased = [s + b for s, b in zip(score[a].tolist(), bias, strict=True)]
        if config.kind == "hash":
            chosen[a] = best(token_hash[a], k)
        elif config.kind in ("group_limited", "group_limited_softmax"):
            size, count = E // config.num_groups, 2 if config.kind == "group_limited" else 1
            worth = [sum(sorted(biased[g * size : (g + 1) * size])[-count:]) for g in range(config.num_groups)]
            groups = best(worth, config.groups_per_token)
            chosen[a] = best([biased[e] if e // size in groups else -math.inf for e in range(E)], k)
        elif config.kind != "expert_choice":
            chosen[a] = best(biased, k)
    if config.kind == "expert_choice":
        chosen = {a: [] for a in valid}
        for group in members.values():
            for e in range(E):
                ranked = sorted(group, key=lambda a: (-score[a][e].item(), a))
                for a in ranked[: limit(group, config.capacity_factor or 1.0)]:
                    chosen[a].append(e)

    kept = {(a, e) for a in valid for e in chosen[a]}
    if config.capacity_factor and config.kind != "expert_choice":
        for group in members.values():
            for e in range(E):
                queue = [a for a in group if e in chosen[a]]
                if config.drop == "probability" and config.kind != "hash":
                    queue.sort(key=lambda a: (-score[a][e].item(), a))
                kept -= {(a, e) for a in queue[limit(group, config.capacity_factor) :]}

    pairs = {}
    for a, e in kept:
        if config.kind == "hash":
            weight = torch.tensor(1.0 / k, dtype=torch.float64)
        else:
            total = sum(score[a][c] for c in chosen[a]) if config.renormalize else 1.0
            weight = score[a][e] / total
        pairs[a, e] = weight * config.scale

    zero = torch.zeros((), dtype=torch.float64)
    balance, z, prob_E = zero, zero, torch.zeros(E, dtype=torch.float64)
    counted = config.kind not in ("hash", "expert_choice")
    if counted:
        prob_E = sum((score[a] / score[a].sum() for a in valid), prob_E)
    if counted and config.group != "global":
        for group in members.values():
            n = len(group)
            for e in range(E):
                fraction = sum(e in chosen[a] for a in group) / n
                mean_prob = sum(score[a][e] / score[a].sum() for a in group) / n
                balance = balance + n * E / k * fraction * mean_prob
    if config.kind != "hash":
        z = sum((torch.log(torch.exp(logits_AE[a]).sum()) ** 2 for a in valid), zero)
    counts = [sum(e in chosen[a] for a in valid) for e in range(E)]
    return {
        "pairs": pairs,
        "balance": balance,
        "z": z,
        "prob_E": prob_E,
        "chosen": counts,
        "dropped": sum(counts) - len(kept),
        "order": chosen,
    }
