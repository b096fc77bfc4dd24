"""Generation: a model on one device writes on from a prompt, a token at a time, with a KV cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.model.gpt import GPT
from megalina.model.layers import KeyValues

SEEDS = (-(2**63), 2**64 - 1)  # that torch takes


def generate(
    gpt: GPT,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    max_positions: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
    num_ids: int | None = None,
) -> Iterator[int]:
    """The tokens after `prompt`, as they come; ends after `max_tokens`, at `stop_token`, or at `max_positions` in all.

    `num_ids`: of the tokenizer, where the model has more.
    `temperature` 0 takes the likeliest token.  `top_p`: only the likeliest tokens that together have this probability.
    The same seed gives the same text.  ValueError where generation would not be what training was: a router that looks
    at later tokens.
    """
    if not prompt:
        raise ValueError("the prompt has no token; give at least one (the end-of-document token starts a new document)")
    if len(prompt) >= max_positions:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the model reads at most {max_positions} (max_positions); shorten it"
        )
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: choose 0 (likeliest token) or a positive number")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}: choose more than 0 and at most 1")
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise ValueError(f"seed is {seed}: choose a number from {SEEDS[0]} to {SEEDS[1]} (64 bits)")
    refuse_looking_ahead(gpt)
    random = torch.Generator().manual_seed(seed)
    past = [KeyValues() for _ in gpt.layers]
    tokens, position = list(prompt), 0
    limit = min(gpt.vocab_size, num_ids or gpt.vocab_size)
    gpt.eval()
    for _ in range(min(max_tokens, max_positions - len(prompt))):
        with torch.inference_mode():
            n_TD, _ = gpt.hidden(_batch(tokens, position, gpt.embedding.device), past)
            logits_V = gpt.logits(n_TD[-1:])[0, :limit].double().cpu()
        position += len(tokens)
        chosen = choose(logits_V, temperature, top_p, random)
        yield chosen
        if chosen == stop_token:
            return
        tokens = [chosen]


def refuse_looking_ahead(gpt: GPT) -> None:
    """ValueError if a token's routing depends on later tokens, which generation doesn't have."""
    for i, layer in enumerate(gpt.layers):
        if layer.is_moe and layer.router.looks_ahead:
            raise ValueError(
                f"layer {i} routes with {layer.router.kind}, which looks at later tokens of the group: such a model can't "
                "generate as it was trained; train with a token-choice router (router=topk) to generate"
            )


def _batch(tokens: Sequence[int], position: int, device: torch.device) -> Batch:
    token_BS = torch.tensor([tokens], device=device)
    everything = torch.ones_like(token_BS, dtype=torch.bool)
    position_BS = torch.arange(position, position + len(tokens), device=device).unsqueeze(0)
    return Batch(token_BS, token_BS, everything, everything, position_BS, None, torch.zeros(1, dtype=torch.int64, device=device))


def choose(logits_V: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """The next token: the likeliest one at temperature 0, else drawn from the likeliest that together have `top_p`.

    ValueError for logits that are not finite."""
    if not logits_V.isfinite().all():
        raise ValueError("the model's logits are not finite: it has diverged, take an earlier checkpoint")
    if temperature == 0.0:
        return int(logits_V.argmax())
    wide_V = logits_V.double()  # the smallest temperature is 0 in anything narrower
    probability_V = ((wide_V - wide_V.max()) / temperature).softmax(0)  # a tiny temperature sends the others to -inf, none to inf
    if top_p < 1.0:
        sorted_V, word_V = probability_V.sort(descending=True, stable=True)
        above_V = sorted_V.cumsum(0) - sorted_V >= top_p  # what is likelier has top_p already
        probability_V = torch.zeros_like(probability_V).scatter(0, word_V, sorted_V.masked_fill(above_V, 0.0))
    return int(torch.multinomial(probability_V, 1, generator=random))
