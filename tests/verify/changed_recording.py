"""Recordings changed by hand: a reference laid beside itself with some entries altered, as a layout's ranks would have them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from megalina.config import ModelConfig, OptimConfig, ParallelConfig, PretrainConfig, RouterConfig, TrainConfig
from megalina.verify.diagnosis import Diagnosis, diagnose
from megalina.verify.recording import SEQUENCES, Entry, Layout, Recording
from megalina.verify.reference import detail, record
from megalina.verify.start import random_batches

LENGTH = 8
Change = Callable[[Entry], Tensor | list[Tensor] | None]  # the whole, or what each rank has; None: as it is
CONFIGS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "plain": ({}, {}),
    "bias and dropout": ({"bias": True, "dropout": 0.25}, {}),
    "sinks, windows, normed together": ({"attention_sinks": True, "window": 3, "qk_norm": "projection"}, {}),
    "latent": (
        {"attention": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 4},
        {},
    ),
    "latent, sinks, windows": (
        {
            **{"attention": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 4},
            **{"attention_sinks": True, "window": 3},
        },
        {},
    ),
    "capacity": ({}, {"capacity_factor": 0.6, "group": "micro_batch"}),
    "global": ({}, {"group": "global"}),
    "replayed": ({}, {"renormalize": False, "replay": "drawn"}),
    "dense": (
        {},
        {
            **{"kind": "dense", "renormalize": False, "balance_loss": 0.0},
            **{"group": "micro_batch", "mutual_information_loss": 0.1},
        },
    ),
}


def config_of(name: str) -> PretrainConfig:
    model, router = CONFIGS[name]
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 4, "num_experts": 4, "d_ff": 8, "vocab_size": 60}
    return PretrainConfig(
        model=ModelConfig(**(sizes | model)),  # type: ignore[arg-type]
        router=RouterConfig(**({"balance_loss": 0.1, "z_loss": 0.01} | router)),  # type: ignore[arg-type]
        optim=OptimConfig(lr=0.01, weight_decay=0.1),
        train=TrainConfig(global_batch_size=SEQUENCES, micro_batch_size=2, seq_len=LENGTH, dtype="float64"),
    )


@cache
def reference_of(name: str, layout: Layout) -> Recording:
    config = config_of(name)
    config = replace(config, train=replace(config.train, micro_batch_size=layout.micro_batch))
    out = record(config, random_batches(config, 2))
    detail(out, layout)
    return out


def diagnosed(name: str, layout: Layout, change: Change) -> Diagnosis:
    """What is said of the reference with some entries changed, all ranks holding everything but other ranks' experts."""
    reference = reference_of(name, layout)
    return diagnose(reference, changed(reference, layout, change))


def changed(reference: Recording, layout: Layout, change: Change) -> Recording:
    entries = []
    for e in reference.entries:
        found = change(e)
        by_rank = found if isinstance(found, list) else [e.value if found is None else found] * layout.world
        if ".experts." in e.name:
            by_rank = [only_own_experts(v, layout, rank) for rank, v in enumerate(by_rank)]
        whole = by_rank[0]
        for v in by_rank[1:]:
            whole = torch.where(whole.isnan(), v, whole) if whole.is_floating_point() else whole
        entries.append(replace(e, value=whole, by_rank=by_rank if layout.world > 1 else None))
    parallel = ParallelConfig(tp=layout.tp, ep=layout.ep, sequence=layout.sequence, zero=layout.zero)
    return Recording(layout, replace(reference.config, parallel=parallel), reference.batches, entries)


def only_own_experts(whole: Tensor, layout: Layout, rank: int) -> Tensor:
    width = len(whole) // layout.ep
    own = slice(rank // layout.tp % layout.ep * width, (rank // layout.tp % layout.ep + 1) * width)
    out = torch.full_like(whole, float("nan"))
    out[own] = whole[own]
    return out


def first_step(kind: str, change: Callable[[Entry], Tensor | list[Tensor] | None]) -> Change:
    """A change of one kind of entry of the first step."""
    return lambda e: change(e) if (e.step, e.kind) == (0, kind) else None


def only(step: int, kind: str, name: str, value: Tensor | list[Tensor]) -> Change:
    return lambda e: value if (e.step, e.kind, e.name) == (step, kind, name) else None


EDP = Layout(4, tp=1, ep=2, micro_batch=1)  # edp 2, dp 4, 2 micro-batches
TP = Layout(4, tp=2, ep=2, micro_batch=1)  # dp 2, 4 micro-batches
WIDE = Layout(8, tp=2, ep=1, micro_batch=2)  # edp 4, tp 2
ZERO = Layout(4, tp=1, ep=2, zero=1, micro_batch=1)


def units_of(layout: Layout) -> dict[str, Tensor]:
    return reference_of("plain", layout).unit_gradients
