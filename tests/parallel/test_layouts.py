"""The star test: every layout gives the numbers of one process, in float64.

Losses, every gradient and the norm of the first step, and the weights after SGD steps to 1e-12; losses over AdamW steps
to 1e-10, since Adam amplifies rounding.  `make test` covers all pairs of choices, `make test-full` the product of layouts,
ZeRO, accumulation and routers.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist

from tests.parallel.layouts import SEQUENCES, Case, Outcome, on_ranks, one_process
from tests.parallel.ranks import run_on_ranks

MODELS = {
    "plain": {},
    "dense first, shared experts": {"dense_layers_first": 1, "shared_d_ff": 12},
    "GPT-2": {"tie_embeddings": False, "positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu"},
    "modern": {"qk_norm": True, "num_kv_heads": 4, "num_heads": 8, "head_dim": 8, "tie_embeddings": False},
    "dropout": {"dropout": 0.2, "bias": True, "activation": "relu", "dense_layers_first": 1, "shared_d_ff": 12},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk raw": {"renormalize": False, "group": "micro_batch"},
    "global": {"group": "global"},
    "capacity": {"capacity_factor": 0.8},
    "capacity by probability": {"capacity_factor": 0.8, "drop": "probability", "group": "micro_batch"},
    "sigmoid": {"kind": "sigmoid", "bias_update_rate": 0.01},
    "group limited": {
        "kind": "group_limited",
        "num_groups": 2,
        "groups_per_token": 1,
        "bias_update_rate": 0.01,
        "capacity_factor": 1.0,
    },
    "expert choice": {"kind": "expert_choice"},
    "noisy": {"kind": "noisy_topk", "noise_std": 0.5},
    "hash": {"kind": "hash"},
}
TOLERANCE = {"sgd": 1e-12, "adamw": 1e-10}
LAYOUTS = {1: [(1, 1, True)], 2: [(1, 2, True), (1, 1, True), (2, 1, True), (2, 1, False)]}  # tp, ep, sequence
LAYOUTS[4] = [(1, 4, True), (1, 2, True), (1, 1, True), (2, 2, True), (2, 2, False), (2, 1, True), (4, 1, True), (4, 1, False)]
CHOICES = {
    "zero": [(0, 0.0), (1, 0.0), (1, 0.002), (0, 0.002)],  # ZeRO-1, size of a gradient piece in MiB
    "micro_batch": [2, 1],
    "recompute": ["none", "selective", "full"],
    "optimizer": ["sgd", "adamw"],
    "model": list(MODELS),
    "router": list(ROUTERS),
}


def case_of(world: int, layout: tuple[int, int, bool], chosen: dict[str, Any]) -> Case:
    tp, ep, sequence = layout
    zero, piece_mb = chosen["zero"]
    # statistics of all ranks can't be exact with accumulation: one micro-batch a rank
    micro_batch = SEQUENCES // (world // tp) if chosen["router"] == "global" else chosen["micro_batch"]
    return Case(
        world, tp, ep, sequence, zero, micro_batch, chosen["recompute"], piece_mb, chosen["optimizer"],
        tuple(MODELS[chosen["model"]].items()), tuple(ROUTERS[chosen["router"]].items()),
    )  # fmt: skip


def full_product(world: int) -> list[Case]:
    """Every layout x ZeRO and pieces x accumulation x router (dropless and with capacity); the other choices take turns."""
    crossed = ("zero", "micro_batch", "router")
    turns = {k: itertools.cycle(choices) for k, choices in CHOICES.items() if k not in crossed}
    product = itertools.product(LAYOUTS[world], *(CHOICES[k] for k in crossed))
    cases = []
    for layout, *chosen in product:
        rest = {k: next(turn) for k, turn in turns.items()}
        cases.append(case_of(world, layout, dict(zip(crossed, chosen, strict=True)) | rest))
    return list(dict.fromkeys(cases))


def pairwise(world: int) -> list[Case]:
    """Greedy: rows are added until every pair of choices occurs together somewhere."""
    options = [LAYOUTS[world], *CHOICES.values()]
    missing = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(options)), 2)
        for a, b in itertools.product(options[i], options[j])
    }
    out = []
    while missing:
        row: dict[int, Any] = dict(min(missing, key=repr))
        for i, choices in enumerate(options):
            if i not in row:
                row[i] = max(choices, key=lambda a: sum(_pair((i, a), (j, b)) in missing for j, b in row.items()))
        missing -= {_pair(a, b) for a, b in itertools.combinations(sorted(row.items(), key=lambda x: x[0]), 2)}
        out.append(case_of(world, row[0], dict(zip(CHOICES, (row[i + 1] for i in range(len(CHOICES))), strict=True))))
    return list(dict.fromkeys(out))


def _pair(a: tuple[int, Any], b: tuple[int, Any]) -> tuple[tuple[int, Any], tuple[int, Any]]:
    return (a, b) if a[0] < b[0] else (b, a)


def differences(cases: Sequence[Case]) -> list[str]:
    """On each rank: a line for every case that differs from one process."""
    references = _references(cases)
    out = []
    for case in cases:
        errors = on_ranks(case, references[case.reference])
        limit = TOLERANCE[case.optimizer]
        checked = {
            k: v
            for k, v in errors.items()
            if case.optimizer == "sgd" or k.startswith("loss") or k.endswith(" 0") or "gradient" in k
        }
        wrong = {k: v for k, v in checked.items() if not v < (limit if k.startswith(("loss", "weight")) else 1e-12)}
        if wrong:
            out.append(f"{case}: {wrong}")
    return out


def _references(cases: Sequence[Case]) -> dict[Case, Outcome]:
    """Each rank computes its share of the oracles, all get all."""
    unique = list(dict.fromkeys(c.reference for c in cases))
    if not dist.is_initialized():
        return {c: one_process(c) for c in unique}
    mine = {c: one_process(c) for c in unique[dist.get_rank() :: dist.get_world_size()]}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return {c: outcome for part in everybody for c, outcome in part.items()}


def test_one_rank_equals_one_process() -> None:
    assert differences(pairwise(1)) == []


def test_ranks_without_a_single_token_take_part() -> None:
    router = (("kind", "hash"), ("top_k", 1))
    cases = [Case(4, tp, ep, sequence, zero=1, router=router, one_word=True) for tp, ep, sequence in LAYOUTS[4] if ep > 1]
    assert run_on_ranks(4, differences, cases) == [[]] * 4


@pytest.mark.parametrize("world", [2, 4])
def test_every_pair_of_choices_equals_one_process(world: int) -> None:
    cases = pairwise(world)
    assert len(cases) >= 30
    assert run_on_ranks(world, differences, cases) == [[]] * world


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_product_of_layouts_and_routers_equals_one_process(world: int) -> None:
    cases = full_product(world)
    found = differences(cases) if world == 1 else [line for rank in run_on_ranks(world, differences, cases) for line in rank]
    assert found == []
