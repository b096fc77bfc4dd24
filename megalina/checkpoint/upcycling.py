"""Upcycling: a dense checkpoint becomes one of a mixture of experts (Komatsuzaki et al., "Sparse upcycling", 2023).

Each MLP of a layer that is to be MoE becomes the experts of that layer, which are copies of it; routers are zero, so all experts
count as much, and as long as a token's weights sum to one, the first loss is the dense model's."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalina.checkpoint.checkpoints import check_same
from megalina.checkpoint.files import MODEL
from megalina.checkpoint.hugging_face.carried import carry_from
from megalina.checkpoint.hugging_face.linked import our_shapes, settings_of
from megalina.checkpoint.hugging_face.progress import Progress, check_room
from megalina.checkpoint.stored import Stored
from megalina.checkpoint.streaming_writer import row_boxes, write_rows
from megalina.comm.slice import Box
from megalina.config import PretrainConfig, TrainConfig
from megalina.families.family import Settings
from megalina.model.init import drawn
from megalina.validate import check_config

BOX_BYTES, FILE_BYTES, BOX_OVERHEAD = 64 << 20, 4 << 30, 4096
KINDS = ("topk", "noisy_topk", "sigmoid", "group_limited")  # routers whose zero weights count all experts alike


def upcycle(
    dense: Path,
    target: Path,
    *,
    model: Mapping[str, Any],
    router: Mapping[str, Any],
    noise: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Settings:
    """Write the checkpoint `target`, without optimizer state, from the dense checkpoint `dense`; returns its model.

    `model`, `router`: settings in which it differs from the dense one, such as {"num_experts": 8} and {"top_k": 2}; layers are
    MoE as `dense_layers_first` and `moe_every` say (not given: all).  An expert is as wide as the MLP.  `noise`: every number of
    an expert's matrices is multiplied by 1 + noise x a normal number, and the router's are noise x init_std x normal ones; both
    follow from `seed`.  With noise the first loss is near the dense one's, no longer equal.

    ValueError where `dense` has experts already, a setting is of another model, or weights of a token don't sum to one."""
    stored = Stored(dense)
    before = settings_of(stored.values["config"], stored.values["vocab_size"])
    if any(before.moe):
        raise ValueError(f"{dense} has MoE layers already ({sum(before.moe)} of {len(before.moe)}): give a dense checkpoint")
    d_ff = before.dense_d_ff
    given = {"dense_layers_first": 0, "moe_every": 1, "d_ff": d_ff, "dense_d_ff": d_ff, **model}
    after = Settings(replace(before.model, **given), replace(before.router, **router))
    _check(before, after)
    train = TrainConfig(**stored.values["config"]["train"])
    config = PretrainConfig(model=after.model, router=after.router, train=TrainConfig(dtype=train.dtype, seq_len=train.seq_len))
    check_config(config, 1)
    shapes = our_shapes(after)
    kept = {name: shape for name, shape in our_shapes(before).items() if name in shapes}
    there = {name.removeprefix(MODEL): shape for name, (shape, _) in stored.listing.items() if name.startswith(MODEL)}
    check_same(dense, {name: there[name] for name in kept if name in there}, kept)
    listing = {MODEL + name: (shapes[name], _dtype(stored, name)) for name in sorted(shapes)}
    boxes = list(row_boxes(listing, BOX_BYTES))
    num_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in listing.values())
    check_room(target, num_bytes + BOX_OVERHEAD * len(boxes))
    line = Progress(f"upcycle {dense.name}", num_bytes) if progress else None
    held: dict[str, Tensor] = {}

    def mlp(layer: str, name: str) -> Tensor:
        """One of the MLP's tensors, as an expert has it."""
        full = f"{MODEL}{layer}.mlp.{name}"
        if full not in held:
            held.clear()
            held[full] = stored.tensor(full).reshape(shapes[f"{layer}.experts.{name}"][1:])
        return held[full]

    def fetch(full: str, box: Box) -> Tensor:
        name = full.removeprefix(MODEL)
        dtype = listing[full][1]
        layer, _, own = name.partition(".experts.")
        if own:
            first, count = box.offsets[0], box.data.shape[0]
            out = torch.stack([_noisy(mlp(layer, own), noise, seed, name, first + i) for i in range(count)])
        elif ".router." in name:
            out = torch.zeros(box.data.shape, dtype=dtype)
            if name.endswith("weight") and noise:
                rows = slice(box.offsets[0], box.offsets[0] + len(out))
                out += drawn(name, shapes[name], noise * after.model.init_std, seed)[rows].to(dtype)
        else:
            out = stored.box(full, box.offsets, tuple(box.data.shape), dtype)
        if line is not None:
            line.add(out.nbytes)
        return out

    values: dict[str, Any] = {key: stored.values[key] for key in ("vocab_size", "tokenizer_path")}
    values |= {"step": 0, "config": asdict(config), "upcycled": {"noise": noise, "seed": seed}}
    write_rows(target, values, listing, fetch, box_bytes=BOX_BYTES, file_bytes=FILE_BYTES, beside=carry_from(dense))
    if line is not None:
        line.end()
    return after


def _check(before: Settings, after: Settings) -> None:
    model, router = after.model, after.router
    new = ("num_experts", "d_ff", "dense_layers_first", "moe_every", "dense_d_ff", "name", "dropout", "init_std")
    for name, value in asdict(model).items():
        if name not in new and value != getattr(before.model, name):
            raise ValueError(f"model.{name}={value}, and the dense model has {getattr(before.model, name)}: leave it out")
    if model.d_ff != before.dense_d_ff or after.dense_d_ff != before.dense_d_ff:
        raise ValueError(
            f"model.d_ff={model.d_ff}, model.dense_d_ff={after.dense_d_ff}: experts and dense layers are as wide as the dense "
            f"model's MLPs, {before.dense_d_ff}: leave both out"
        )
    if not any(after.moe):
        raise ValueError("no layer would be MoE: set model.dense_layers_first and model.moe_every otherwise")
    if router.kind not in KINDS:
        raise ValueError(f"router.kind={router.kind}: upcycling is for {', '.join(KINDS)}")
    sigmoid = router.kind in ("sigmoid", "group_limited")
    total = router.scale * (1.0 if router.renormalize else router.top_k * (0.5 if sigmoid else 1 / model.num_experts))
    if abs(total - 1) > 1e-9:
        now = f"router.renormalize={str(router.renormalize).lower()}, router.scale={router.scale:g}"
        raise ValueError(
            f"the weights of a token's experts would sum to {total:g} at first ({now}): set router.renormalize=true and "
            f"router.scale=1, or router.scale={router.scale / total:g}"
        )


def _dtype(stored: Stored, name: str) -> torch.dtype:
    layer, expert, own = name.partition(".experts.")
    if expert:
        return stored.listing[f"{MODEL}{layer}.mlp.{own}"][1]
    if name.endswith((".bias_E", ".delta")):
        return torch.float32 if name.endswith("bias_E") else torch.float64
    layer, is_router, _ = name.partition(".router.")
    return stored.listing[f"{MODEL}{layer}.mlp.w1" if is_router else MODEL + name][1]


def _noisy(weight: Tensor, noise: float, seed: int, name: str, expert: int) -> Tensor:
    if not noise:
        return weight.clone()
    return weight * (1 + drawn(f"{name}.{expert}", tuple(weight.shape), noise, seed)).to(weight.dtype)
