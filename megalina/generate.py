"""Generation: a model on one device writes on from a prompt, a token at a time, with a KV cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.model.gpt import GPT

SEEDS = (-(2**63), 2**64 - 1)  # that torch takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a text is written on.  The same seed gives the same text.  ValueError for numbers that can't be."""

    max_tokens: int  # that are written
    max_positions: int  # in all, the prompt among them
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    seed: int = 0
    stop_token: int | None = None  # the text ends with it
    num_ids: int | None = None  # of the tokenizer, where the model has more

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: choose 0 (likeliest token) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: choose more than 0 and at most 1")
        if not SEEDS[0] <= self.seed <= SEEDS[1]:
            raise ValueError(f"seed is {self.seed}: choose a number from {SEEDS[0]} to {SEEDS[1]} (64 bits)")

    def limit(self, vocab_size: int) -> int:
        """Of the model's words, the first so many are written."""
        return min(vocab_size, self.num_ids or vocab_size)


def generate(gpt: GPT, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """The tokens after `prompt`, as they come.

    ValueError for a prompt without a token or without room behind it, and where generation would not be what training was: a
    router that looks at later tokens."""
    if not prompt:
        raise ValueError("the prompt has no token; give at least one (the end-of-document token starts a new document)")
    most = sampling.max_positions
    if len(prompt) >= most:
        raise ValueError(f"the prompt has {len(prompt)} tokens, but the model reads at most {most} (max_positions); shorten it")
    refuse_looking_ahead(gpt)
    random = torch.Generator().manual_seed(sampling.seed)
    length = min(sampling.max_tokens, most - len(prompt))
    past = gpt.key_values(len(prompt) + length - 1)  # the last token is not read
    tokens, position = list(prompt), 0
    limit = sampling.limit(gpt.vocab_size)
    gpt.eval()
    for _ in range(length):
        with torch.inference_mode():
            n_TD, _ = gpt.hidden(_batch(tokens, position, gpt.embedding.device), past)
            logits_V = gpt.logits(n_TD[-1:])[0, :limit].double().cpu()
        position += len(tokens)
        chosen = choose(logits_V, sampling.temperature, sampling.top_p, random)
        yield chosen
        if chosen == sampling.stop_token:
            return
        tokens = [chosen]


def refuse_looking_ahead(gpt: GPT) -> None:
    """ValueError if a token's result depends on tokens which generation doesn't have: later ones where a router looks at them,
    and earlier ones, of which the keys and values of attention alone are kept."""
    for i, layer in enumerate(gpt.layers):
        for functions in layer.functions.values():
            if functions.block.mixes_tokens:
                raise ValueError(
                    f"layer {i} has the block {functions.block.name}, which mixes tokens (mixes_tokens): of earlier tokens, "
                    "generation keeps the keys and values of attention alone; such a model can be trained and evaluated"
                )
        if layer.is_moe and layer.router.looks_ahead:
            raise ValueError(
                f"layer {i} routes with {layer.router.config.kind}, which looks at later tokens of the group: such a model can't "
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
