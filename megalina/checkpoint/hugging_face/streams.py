"""The residual stream of both models, behind each block: where they part, and so which block is another function there.

Shapes: T tokens, D width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.model.block_functions import Seen
from megalina.model.gpt import GPT

BAR = 1e-5  # of a stream's largest number: float32 rounds to less


def our_streams(gpt: GPT, batch: Batch) -> dict[str, Tensor]:
    """By the block that has written last, [T, D]."""
    with torch.no_grad():
        x_TD = gpt.embedder.placed(gpt.embedder.looked_up(batch), batch)
        streams, seen = {"the embedding": x_TD}, Seen()
        for i in range(gpt.config.num_layers):
            layer = gpt.layers[i]
            for name in layer.stream:
                x_TD = layer.functions[name].forward(x_TD, batch, seen)
                streams[f"{'experts' if name == 'moe' else name} of layer {i}"] = x_TD
    return streams


def watched_streams(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """What each norm of the stream of a transformers model is given, by and by, [T, D]; and the hooks."""
    streams: list[Tensor] = []

    def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        streams.append(arguments[0].detach().flatten(0, -2))

    ends = ("input_layernorm", "post_attention_layernorm", "model.norm")
    norms = [module for name, module in model.named_modules() if name.endswith(ends)]
    return streams, [module.register_forward_pre_hook(see) for module in norms]


def first_apart(ours: dict[str, Tensor], theirs: Sequence[Tensor]) -> str:
    """The block behind which the streams differ first by more than rounding; "" where they never do, or can't be compared."""
    if len(ours) != len(theirs):
        return ""
    for (name, a_TD), b_TD in zip(ours.items(), theirs, strict=True):
        if not float((a_TD - b_TD).abs().max()) <= BAR * float(b_TD.abs().max()):  # or no number
            return name
    return ""
