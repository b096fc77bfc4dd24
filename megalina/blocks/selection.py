"""Which experts of a densely trained model a token uses where it is served: `infer.select` (DS-MoE, Pan et al. 2024)."""

import math
from dataclasses import dataclass
from typing import Literal, cast

from megalina.blocks.routers import kind_of, visited
from megalina.config import InferConfig, RouterConfig

Rule = Literal["top_k", "threshold", "threshold_top_k"]
RULES: tuple[Rule, ...] = ("top_k", "threshold", "threshold_top_k")
AS_TRAINED = ("none", "dense")
THRESHOLD = InferConfig().select_threshold


@dataclass(frozen=True, slots=True)
class Selection:
    """`top_k`: the `k` most probable experts; `threshold`: those whose probability is above `threshold` / E, at least one;
    `threshold_top_k`: as many of the most probable ones as are above it on average over the tokens at hand, rounded half up, at
    least one."""

    rule: Rule
    k: int = 0
    threshold: float = 0.0


def selection_of(infer: InferConfig, router: RouterConfig, num_experts: int) -> Selection | None:
    """None: experts as the model was trained.  ValueError for what can't be, or would do nothing."""
    select, k, threshold = infer.select, infer.select_k, infer.select_threshold
    if select not in (*AS_TRAINED, *RULES):
        raise ValueError(f"infer.select is {select!r}: choose one of {', '.join((*AS_TRAINED, *RULES))}")
    if select != "none" and not kind_of(router).is_dense:
        raise ValueError(
            f"infer.select={select} is for models that were trained with router=dense, and this one has router={router.kind}, "
            "which selects by itself: leave infer.select at none"
        )
    if k and select != "top_k":
        raise ValueError(f"infer.select_k={k} does nothing with infer.select={select}, only with top_k: leave it at 0")
    if threshold != THRESHOLD and select not in ("threshold", "threshold_top_k"):
        raise ValueError(
            f"infer.select_threshold={threshold:g} does nothing with infer.select={select}, only with threshold or "
            f"threshold_top_k: leave it at {THRESHOLD:g}"
        )
    if not (math.isfinite(threshold) and 0 <= threshold < num_experts):
        raise ValueError(
            f"infer.select_threshold={threshold}: an expert is used where its probability is above so many even shares, so it "
            f"must be from 0 to below {num_experts} experts"
        )
    if not 0 <= k <= num_experts:
        raise ValueError(f"infer.select_k={k}: choose 1 to {num_experts} experts, or 0 for router.top_k ({router.top_k})")
    if select == "threshold_top_k" and infer.batch_invariant:
        raise ValueError(
            "infer.select=threshold_top_k counts the experts of all tokens at hand, and infer.batch_invariant=true forbids that: "
            "choose infer.select=threshold or top_k"
        )
    return None if select in AS_TRAINED else Selection(cast(Rule, select), k or router.top_k, threshold)


def served_top_k(selection: Selection | None, router: RouterConfig, num_experts: int) -> int:
    """Experts that a token uses; router.top_k where a threshold says how many."""
    return selection.k if selection is not None else visited(router, num_experts)
