"""Made routing with paths: tokens have topics, and a topic likes other experts in each layer; so what earlier layers chose tells
what later ones will choose.  For models and scales of which there is no trace.

Two tasks take turns, batch by batch, each with topics of its own; a batch has its own mixture of its task's topics.  A topic's
liking of an expert is normal, partly the same for all topics or those of its task.  How far likings differ is found by bisection,
so that the busiest expert of a task gets `skew` times the mean.  The shares are set by DeepSeek-V2-Lite's traces (64 experts,
top-6; skew 4.4 and 5.6): batches of 1,024 tokens are 0.11 and 0.25 apart there within a task (L1 of shares), tasks 0.88; here, at
skew 5, 0.13 and 0.96.

Shapes: T tokens, L MoE layers, K choices a token, E experts, Z topics, P tokens of a topic in the pool that batches draw from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import RoutingTrace, traced
from placement_lab.serving.decisions import ServedBatch, shared_evenly

TASKS, TOPICS_OF_TASK, POOL = 2, 6, 512
COMMON, OF_TASK = 0.1, 0.6  # of an expert's liking (variance) that all topics have in common, and those of a task
CONCENTRATION = 60.0  # of a batch's mixture of topics: the higher, the more alike are a task's batches
HALVINGS = 14
NEAR = 0.03  # of the skew


@dataclass(frozen=True, slots=True, eq=False)
class TopicRouting:
    """Tokens of each topic, to draw from."""

    num_experts: int
    skew: float  # the busiest expert's rows over the mean expert's: median over layers, mean over tasks
    pool_ZPLK: Ids

    def batches(self, number: int, *, tokens: int, num_devices: int, seed: int, turns: bool = True) -> list[ServedBatch]:
        """Equal parts on all devices.  `turns`: the tasks take turns, batch by batch, the first task first; else all are its."""
        random = np.random.default_rng(seed)
        return [shared_evenly(self._drawn(random, b % TASKS if turns else 0, tokens), num_devices) for b in range(number)]

    def profile(self, *, tokens: int, seed: int) -> RoutingTrace:
        """Of both tasks, as many tokens of each."""
        random = np.random.default_rng(seed)
        ids_TLK = np.concatenate([self._drawn(random, task, tokens // TASKS) for task in range(TASKS)])
        return traced(ids_TLK, self.num_experts, sample_lengths_S=np.full(TASKS, tokens // TASKS), name="topics")

    def _drawn(self, random: np.random.Generator, task: int, tokens: int) -> Ids:
        mixture_Z = random.dirichlet(np.full(TOPICS_OF_TASK, CONCENTRATION / TOPICS_OF_TASK))
        topic_T = task * TOPICS_OF_TASK + random.choice(TOPICS_OF_TASK, tokens, p=mixture_Z)
        drawn: Ids = self.pool_ZPLK[topic_T, random.integers(0, self.pool_ZPLK.shape[1], tokens)]
        return drawn


def topic_routing(num_experts: int, top_k: int, num_layers: int, skew: float, *, seed: int = 0) -> TopicRouting:
    """ValueError for a skew that isn't there: above E / K, or below what chance alone gives."""
    most = num_experts / top_k
    if not 1 < skew < most:
        raise ValueError(f"skew {skew:g}: with {num_experts} experts and top-{top_k} it is above 1 and below {most:g}")
    random = np.random.default_rng(seed)
    topics = TASKS * TOPICS_OF_TASK
    common_LE = random.standard_normal((num_layers, num_experts))
    own_ZLE = random.standard_normal((topics, num_layers, num_experts))
    task_ZLE = random.standard_normal((TASKS, num_layers, num_experts)).repeat(TOPICS_OF_TASK, axis=0)
    parts = (COMMON, common_LE), (OF_TASK, task_ZLE), (1 - COMMON - OF_TASK, own_ZLE)
    liking_ZLE = sum(np.sqrt(share) * liking for share, liking in parts)
    chance_ZPLE = random.gumbel(size=(topics, POOL, num_layers, num_experts)).astype(np.float32)
    low, high = 0.0, 1.0
    while _skew(pool := _pool(liking_ZLE, chance_ZPLE, high, top_k), num_experts) < skew:
        if high > 64:
            raise ValueError(f"skew {skew:g} is not reached with {num_experts} experts and top-{top_k}: choose a smaller one")
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        strength = (low + high) / 2
        pool = _pool(liking_ZLE, chance_ZPLE, strength, top_k)
        found = _skew(pool, num_experts)
        if abs(found / skew - 1) < NEAR:
            return TopicRouting(num_experts, found, pool)
        low, high = (low, strength) if found > skew else (strength, high)
    raise ValueError(f"skew {skew:g}: chance alone gives {_skew(pool, num_experts):.3g} with {POOL} tokens a topic; choose more")


def _pool(liking_ZLE: NDArray[Any], chance_ZPLE: NDArray[Any], strength: float, top_k: int) -> Ids:
    """[Z, P, L, K]: choices without replacement in proportion to exp(strength x liking), the first drawn first."""
    scored_ZPLE = chance_ZPLE + (strength * liking_ZLE).astype(np.float32)[:, None]
    best = np.argpartition(-scored_ZPLE, top_k - 1, axis=3)[..., :top_k]
    order = np.argsort(-np.take_along_axis(scored_ZPLE, best, axis=3), axis=3)
    pool_ZPLK: Ids = np.take_along_axis(best, order, axis=3).astype(np.int32)
    return pool_ZPLK


def _skew(pool_ZPLK: Ids, num_experts: int) -> float:
    """Of whole tasks."""
    found: Sequence[float] = [
        float(np.median([_busiest(task[:, :, layer], num_experts) for layer in range(pool_ZPLK.shape[2])]))
        for task in np.split(pool_ZPLK, TASKS)
    ]
    return float(np.mean(found))


def _busiest(ids: Ids, num_experts: int) -> float:
    count_E = np.bincount(ids.ravel(), minlength=num_experts)
    return float(count_E.max() / count_E.mean())
