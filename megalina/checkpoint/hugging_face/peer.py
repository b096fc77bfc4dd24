"""The peer: transformers' own model of a Hugging Face folder, in float32, asked for what ours is asked for.

Needs the extra `hf`.  Gradients are written as a checkpoint of their own, so they come back by the keys of the files, however the
model holds its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalina.checkpoint.hugging_face.source import Source
from megalina.checkpoint.hugging_face.streams import watched_streams

INSTALL = "pip install 'megalina[hf]'"


@dataclass(frozen=True, slots=True)
class Answers:
    """Of a model, on tokens [B, S]; V words, T = B x S tokens, K choices of a token."""

    logits_BSV: Tensor
    loss: float  # mean cross entropy of tokens 1 to S - 1 of each sequence, in nats
    gradients: Mapping[str, Tensor]  # of the loss, by Hugging Face key
    choice_LTK: list[Tensor]  # int64, of each MoE layer in order, experts rising
    streams: Sequence[Tensor] = ()  # as `watched_streams` has them


def check_installed() -> None:
    """ValueError where transformers isn't there."""
    if find_spec("transformers") is None:
        raise ValueError(f"prove holds the model against transformers, which isn't installed: {INSTALL}")


def ask_transformers(folder: Path, token_BS: Tensor, scratch: Path) -> Answers:
    """`scratch`: a folder for the gradients, which is made."""
    check_installed()
    transformers = import_module("transformers")  # by name: type checkers would read all of it

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", local_files_only=True
        ).eval()
        if hasattr(model.config, "output_router_logits"):
            model.config.output_router_logits = False  # with them the loss has a balance loss in it
        model.get_input_embeddings().padding_idx = None  # whose row gets no gradient, though it is learned like any other
        choices, hooks = _watched(model)
        streams, more_hooks = watched_streams(model)
        out = model(input_ids=token_BS, labels=token_BS, use_cache=False)
        for hook in hooks + more_hooks:
            hook.remove()
        out.loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        model.save_pretrained(scratch)
    finally:
        transformers.logging.set_verbosity(before)
    source = Source(scratch)
    gradients = {key: source.tensor(key).clone() for key in source.listing}
    return Answers(out.logits.detach(), float(out.loss.detach()), gradients, choices, streams)


def _watched(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """What the experts of each layer are given, by and by; all of transformers' families hand them the choices [T, K]."""
    choices: list[Tensor] = []

    def see(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor) and value.dtype == torch.int64]
        choices.append(given[0].detach().view(-1, given[0].shape[-1]).sort(dim=1).values)

    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    return choices, [module.register_forward_pre_hook(see, with_kwargs=True) for module in experts]
