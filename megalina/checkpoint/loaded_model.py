"""A loaded model: the weights of a checkpoint of any layout, on one device, without a process group."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megalina.blocks.routers import kind_of
from megalina.checkpoint.files import MODEL, read_values, tokenizer_path
from megalina.comm.slice import Box, Part
from megalina.config import ModelConfig, RouterConfig
from megalina.model.gpt import GPT
from megalina.model.init import allocate, spec_of

EXPERT_TENSORS = ("w1", "w2", "b1", "b2")  # with biases all four


@dataclass(frozen=True, slots=True)
class LoadedModel:
    gpt: GPT
    max_positions: int
    tokenizer_path: str  # "" where the data had none
    step: int


def load_model(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, experts: bool = True
) -> LoadedModel:
    """The model of a checkpoint folder, for evaluation or generation: capacity is not enforced (it would drop tokens by
    what else is in the batch), no noise is added, and layers of multi-token prediction are left out.  Without `experts` it has
    no weights of theirs, see `read_experts`.  ValueError if the folder holds no checkpoint, or a damaged file."""
    values = read_values(path)
    config = values["config"]
    max_positions = config["model"]["max_positions"] or config["train"]["seq_len"]
    router = RouterConfig(**config["router"])
    if not kind_of(router).experts_choose:
        router = replace(router, capacity_factor=0.0, capacity_bound="none")
    gpt = GPT(
        replace(ModelConfig(**config["model"]), mtp_layers=0),
        router,
        vocab_size=values["vocab_size"],
        max_positions=max_positions,
        seed=config["train"]["seed"],
    )
    if not experts:
        for layer in gpt.moe_layers:
            gpt.layers[layer].experts.release()
    from megalina.checkpoint.stored import read_into

    allocate(gpt, dtype=dtype, device=device)
    parts = {MODEL + name: _whole(p.detach().view(spec_of(p).shape)) for name, p in gpt.named_parameters()}
    read_into(path, parts | {MODEL + name: _whole(value) for name, value in gpt.router_state().items()})
    gpt.eval()
    return LoadedModel(gpt, max_positions, tokenizer_path(path, values), values["step"])


def _whole(tensor: Tensor) -> Part:
    return Part(tuple(tensor.shape), tensor.dtype, [Box((0,) * tensor.dim(), tensor)])


def read_experts(path: Path, gpt: GPT, layer: int) -> dict[str, Tensor]:
    """The weights of all experts of one layer, [E, ...] by name, as the checkpoint of `gpt` has them."""
    from megalina.checkpoint.stored import read_tensors

    names = EXPERT_TENSORS if gpt.config.bias else EXPERT_TENSORS[:2]
    found = read_tensors(path, [f"{MODEL}layers.{layer}.experts.{name}" for name in names])
    return {name: found[f"{MODEL}layers.{layer}.experts.{name}"] for name in names}
