"""Shards: which part of the model each rank holds, and in which bucket each parameter's gradient travels."""

from collections.abc import Mapping

import torch
from torch import nn

from megalina.blocks.dispatch import ALL_ROWS, Dispatch
from megalina.config import ModelConfig, RouterConfig, padded_vocab_size
from megalina.mesh import Mesh
from megalina.model.gpt import GPT
from megalina.model.init import Cut, initialize, spec_of
from megalina.model.tokens import TokenShare
from megalina.step.forward import Shape
from megalina.step.pipeline.job import Held


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
    sequence: bool = True,
    digests: bool = False,
    expert_orders: Mapping[int, tuple[int, ...]] | None = None,
    held: Held | None = None,
    dispatch: Dispatch = ALL_ROWS,
) -> GPT:
    """This rank's part of the model, with initial values that don't depend on the layout.

    `sequence`: with tp activations between attention and MLP are cut along the tokens; `digests`: routing is digested;
    `expert_orders`: layer -> which expert lies in each place, of which each rank of ep holds a block; `held`: the layers, and
    what is outside of them, that are on this rank of a pipeline, None: all; `dispatch`: as of
    `Whole`."""
    gpt = GPT(
        model,
        router,
        vocab_size=vocab_size,
        max_positions=max_positions,
        seed=seed,
        padded_vocab=padded_vocab_size(vocab_size, mesh.tp.size),
        share=TokenShare(mesh.tp.size, mesh.tp.rank, cut=sequence, contexts=mesh.cp.size, context=mesh.cp.rank),
        first_expert=model.num_experts // mesh.ep.size * mesh.ep.rank,
        digests=digests,
        expert_orders=expert_orders,
        held=held,
        dispatch=dispatch,
    )
    initialize(gpt, seed=seed, dtype=dtype, device=device, cut=cut_of(mesh))
    return gpt


def parameter_groups(gpt: nn.Module, shape: Shape) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Group -> its parameters by name, in the order in which backward is done with them (last layer first).

    Group names are those that the instructions of a program use.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, p in reversed(list(gpt.named_parameters())):
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        groups.setdefault(spec_of(p).group(layer, tp=shape.tp, pipeline=shape.pipeline), []).append((name, p))
    return groups
