"""Shards: which part of the model each rank holds, and in which bucket each parameter's gradient travels."""

import torch
from torch import nn

from megalina.config import ModelConfig, RouterConfig
from megalina.mesh import Mesh
from megalina.model.gpt import GPT
from megalina.model.init import Cut, Spec, initialise, spec_of
from megalina.parameters import is_moe_layer, padded_vocab_size
from megalina.step.forward import Shape


def cut_of(mesh: Mesh) -> Cut:
    return Cut({"tp": (mesh.tp.rank, mesh.tp.size), "ep": (mesh.ep.rank, mesh.ep.size)})


def build_shard(
    model: ModelConfig,
    router: RouterConfig,
    mesh: Mesh,
    *,
    vocab_size: int,
    max_positions: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> GPT:
    """This rank's part of the model, with initial values that don't depend on the layout."""
    padded = padded_vocab_size(vocab_size, mesh.tp.size)
    gpt = GPT(model, router, vocab_size=vocab_size, max_positions=max_positions, seed=seed, padded_vocab=padded)
    initialise(gpt, seed=seed, dtype=dtype, device=device, cut=cut_of(mesh))
    return gpt


def shape_of(model: ModelConfig, router: RouterConfig, *, tp: int, sequence: bool) -> Shape:
    """What a program must know of the model and the layout."""
    moe = tuple(is_moe_layer(model, i) for i in range(model.num_layers))
    # Experts that choose take as many tokens in each layer; of the share of the tokens that a rank has with tp, other numbers.
    equal_counts = router.kind == "expert_choice" and tp == 1 and any(moe)
    return Shape(
        moe=moe,
        shared_experts=model.shared_d_ff > 0,
        tied=model.tie_embeddings,
        tp=tp > 1,
        sequence=sequence,
        global_balance=router.group == "global" and any(moe),
        micro_batch_groups=router.group == "micro_batch",
        equal_counts=equal_counts,
        selection_bias=router.bias_update_rate > 0 and any(moe),
    )


def parameter_groups(gpt: nn.Module, shape: Shape) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Group -> its parameters by name, in the order in which backward is done with them (last layer first).

    Group names are those that the instructions of a program use.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, p in reversed(list(gpt.named_parameters())):
        groups.setdefault(_group(name, spec_of(p), shape), []).append((name, p))
    return groups


def axis_of_group(group: str) -> str:
    """The axis of the mesh along which a group's gradients are summed: all ranks that hold copies of it."""
    kind = group.split(".")[0]
    return {"experts": "copies", "copied": "world", "ends": "world"}.get(kind, "dp")


def _group(name: str, spec: Spec, shape: Shape) -> str:
    if name == "embedding":
        return "embedding"
    if name == "head":
        return shape.head
    if not name.startswith("layers."):
        return shape.ends
    layer = int(name.split(".")[1])
    if "ep" in spec.sharded:
        return f"experts.{layer}"
    return shape.dense(layer) if "tp" in spec.sharded else shape.copied(layer)
