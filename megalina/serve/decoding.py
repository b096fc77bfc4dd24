"""Decoding: every rank's sequences are written on together, a token at a time, in lockstep over ranks.

Prompts of different lengths are padded in front; padding is a document of its own that nobody sees, and goes to no expert.  A
rank without a sequence takes part with one of padding.  What a sequence gets depends on its prompt and its seed alone.

Shapes: B sequences, S tokens of this pass, L tokens so far with padding, V words.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.generate import Sampling, choose, refuse_looking_ahead
from megalina.mesh import all_gather_object
from megalina.serve.engine import Engine

PADDING, TEXT = 0, 1  # documents


def write_on(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    each_pass: Callable[[int, int], None] = lambda passes, tokens: None,
    emulate: bool = False,
) -> list[list[int]]:
    """The tokens after each of this rank's prompts (there may be none); all ranks call it together, with equal settings.

    As `megalina.generate.generate`, whose errors it has, of each sequence.  `seeds`: one a sequence, in place of one for all.
    `each_pass(passes, tokens)`: after prefill and after
    each decoded token, with the number of tokens that this rank has just fed.  `emulate`: as `Engine.run`.
    """
    problem = _problem(engine, prompts, sampling.max_positions)
    if wrong := [text for text in all_gather_object(engine.mesh, problem) if text]:
        raise ValueError(wrong[0])
    own = list(prompts) or [[0]]
    alive = [bool(prompts)] * len(own)
    random = [torch.Generator().manual_seed(seed) for seed in (seeds or [sampling.seed] * len(own))]
    longest = max(map(len, own))
    padding = [longest - len(prompt) for prompt in own]
    token_BS = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, own, strict=True)])
    length, written, passes = 0, [list[int]() for _ in own], 0
    most = min(sampling.max_tokens, sampling.max_positions - min(map(len, own)))
    past = engine.gpt.key_values(longest + most - 1)  # the last token is not read
    limit = sampling.limit(engine.gpt.vocab_size)
    while True:
        batch = padded_batch(token_BS, padding, alive, length, engine.gpt.embedding.device)
        length += token_BS.shape[1]
        logits_BV = engine.logits(batch, past, emulate=emulate)[:, :limit].double().cpu()
        each_pass(passes, int(batch.valid_BS.sum()))
        passes += 1
        chosen = [0] * len(own)
        for b, logits_V in enumerate(logits_BV):
            if not alive[b]:
                continue
            chosen[b] = choose(logits_V, sampling.temperature, sampling.top_p, random[b])
            written[b].append(chosen[b])
            full = len(own[b]) + len(written[b]) >= sampling.max_positions or len(written[b]) >= sampling.max_tokens
            alive[b] = not full and chosen[b] != sampling.stop_token
        if not any(all_gather_object(engine.mesh, any(alive))):
            return written[: len(prompts)]
        token_BS = torch.tensor(chosen).unsqueeze(1)


def _problem(engine: Engine, prompts: Sequence[Sequence[int]], max_positions: int) -> str:
    try:
        refuse_looking_ahead(engine.gpt)
    except ValueError as error:
        return str(error)
    for i, prompt in enumerate(prompts):
        if not prompt:
            return f"prompt {i} of rank {engine.mesh.world.rank} has no token; give at least one"
        if len(prompt) >= max_positions:
            return (
                f"prompt {i} of rank {engine.mesh.world.rank} has {len(prompt)} tokens, but the model reads at most "
                f"{max_positions} (max_positions); shorten it"
            )
    return ""


def padded_batch(token_BS: Tensor, padding: Sequence[int], alive: Sequence[bool], before: int, device: torch.device) -> Batch:
    """The next tokens, behind `before` (with padding) that are in the cache.  `padding`: of each sequence, in front;
    `alive` False: the sequence is none, and goes to no expert."""
    length = token_BS.shape[1]
    pad_B = torch.tensor(padding)
    place_L = torch.arange(before + length)
    document_BL = torch.where(place_L >= pad_B[:, None], TEXT, PADDING)
    text_BS = document_BL[:, before:] == TEXT
    position_BS = (place_L[before:] - pad_B[:, None]).clamp(min=0)
    valid_BS = text_BS & torch.tensor(alive)[:, None]
    documents = document_BL if any(padding) else None
    sample_B = torch.zeros(len(token_BS), dtype=torch.int64)
    return Batch(token_BS, token_BS, valid_BS, valid_BS, position_BS, documents, sample_B).to(device)
