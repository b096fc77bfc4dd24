"""An opened model: a checkpoint's weights on one device, asked for logits, routing or text.

    import megalina

    model = megalina.open_checkpoint("runs/first")
    logits_BSV = model.logits(torch.tensor([[5, 6, 7]]))

Shapes: B sequences, S tokens a sequence, V words, K experts a token.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.routers import kind_of
from megalina.checkpoint.files import newest_checkpoint
from megalina.checkpoint.loaded_model import LoadedModel, load_model
from megalina.data.replayed import with_choices
from megalina.data.tokenizer import Tokenizer, open_tokenizer
from megalina.generate import Sampling, generate
from megalina.model.routers import Router, Routing
from megalina.model.routing_recorder import record_routing
from megalina.placement.router_replay import RouterReplay
from megalina.placement.routing_trace import RoutingTrace


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """What the router of one MoE layer decided."""

    expert_BSK: Tensor  # int64, in the order of the router's scores, best first; the number of experts where a column is unused
    weight_BSK: Tensor  # float32, how much each counts


class OpenedModel:
    """On one process, without a process group.  Capacity is not enforced and nothing is dropped out: a token's result depends on
    the tokens before it in its sequence alone, unless the router looks ahead."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    @property
    def vocab_size(self) -> int:
        return self._loaded.gpt.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence."""
        return self._loaded.max_positions

    @property
    def num_experts(self) -> int:
        """Of a MoE layer."""
        return self._loaded.gpt.config.num_experts

    @property
    def moe_layers(self) -> list[int]:
        return self._loaded.gpt.moe_layers

    @property
    def step(self) -> int:
        """Of the training run, when the checkpoint was written; 0: imported."""
        return self._loaded.step

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """ValueError where the checkpoint names none, or it isn't where it was."""
        if not self._loaded.tokenizer_path:
            raise ValueError("the checkpoint names no tokenizer: open one with megalina.data.tokenizer.open_tokenizer")
        return open_tokenizer(self._loaded.tokenizer_path)

    def logits(self, tokens: Tensor, *, replay: RoutingTrace | None = None) -> Tensor:
        """Of the token after each position.  `tokens`: int64 [B, S]; returns float32 [B, S, V] on the CPU.  `replay`: what
        `record` has said of these tokens, or a file of it: they go to those experts.

        ValueError for tokens of another shape or type, ids beyond the vocabulary, and sequences longer than `max_positions`; and
        where `replay` is of another model, or of other tokens."""
        batch = self._batch(tokens, replay)
        with torch.inference_mode():
            logits_TV = self._loaded.gpt.logits(self._loaded.gpt.hidden(batch)[0])[:, : self.vocab_size]
        return logits_TV.view(*tokens.shape, -1).float().cpu().clone()

    def routing(self, tokens: Tensor) -> dict[int, LayerRouting]:
        """Which experts each token goes to, by MoE layer.  `tokens`: int64 [B, S].

        ValueError as `logits`, and for a model without MoE layers, or in which all tokens go to all experts."""
        batch, gpt = self._batch(tokens), self._loaded.gpt
        if not gpt.moe_layers or kind_of(gpt.router).is_dense:
            raise ValueError("no token is routed in this model: it has no MoE layer, or all tokens go to all experts")
        seen: dict[int, LayerRouting] = {}

        def see(router: nn.Module, _: tuple[Any, ...], routing: Routing) -> None:
            assert isinstance(router, Router)
            experts, weights = (
                value_TK.view(*tokens.shape, -1).cpu().clone() for value_TK in (routing.expert_TK, routing.weight_TK.float())
            )
            seen[router.layer] = LayerRouting(experts, weights)

        hooks = [gpt.layers[layer].router.register_forward_hook(see) for layer in gpt.moe_layers]
        try:
            with torch.inference_mode():
                gpt.hidden(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def record(self, tokens: Tensor, *, logprobs: bool = False) -> RoutingTrace:
        """As `routing`, for a file (`megalina.placement.routing_trace.write_trace`) that routers replay: with tokens and
        what the model gives the token after each (`logprobs`).  ValueError as `routing`, and where experts choose tokens."""
        batch, gpt = self._batch(tokens), self._loaded.gpt
        return record_routing(gpt, [batch], max_tokens=tokens.numel(), name=f"step {self.step}", logprobs=logprobs)

    def generate(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_token: int | None = None,
    ) -> list[int]:
        """The tokens after `prompt`, as many as `max_tokens` and `max_positions` allow, with a cache of keys and values;
        `temperature` 0: always the likeliest; `stop_token`: the last one, if it comes.

        ValueError for a prompt without tokens, too long or with ids beyond the vocabulary, numbers that can't be, and models that
        look at later tokens."""
        self._batch(torch.tensor([prompt], dtype=torch.int64))
        sampling = Sampling(
            max_tokens=max_tokens,
            max_positions=self.max_positions,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_token=stop_token,
        )
        return list(generate(self._loaded.gpt, prompt, sampling))

    def _batch(self, tokens: Tensor, replay: RoutingTrace | None = None) -> Batch:
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}: int64 [sequences, tokens] is needed, one at least")
        if tokens.shape[1] > self.max_positions:
            raise ValueError(f"sequences have {tokens.shape[1]} tokens, and the model reads at most {self.max_positions}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token ids are from {low} to {high}, and the model has those from 0 to {self.vocab_size - 1}")
        batch, gpt = Batch.whole(tokens.cpu()), self._loaded.gpt
        if replay is not None:
            found = RouterReplay(replay)
            found.check(num_experts=gpt.config.num_experts, top_k=gpt.router.top_k, layers=gpt.served_moe_layers)
            batch = with_choices(batch, found, gpt.config.num_layers)
        return batch.to(gpt.embedding.device)


def open_checkpoint(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> OpenedModel:
    """The model of a checkpoint folder, or of the newest checkpoint of a run folder, whatever layout wrote it.

    ValueError where there is no checkpoint, or a file is damaged."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is None:
            raise ValueError(f"{folder} has no checkpoint yet")
        folder = newest
    return OpenedModel(load_model(folder, device=device, dtype=dtype))
