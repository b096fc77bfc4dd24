"""A likelihood: how probable a model finds a continuation after its context, computed over the ranks of an engine.

Sequences are padded in front; padding is a document of its own and goes to no expert, so what else is in a batch changes nothing.

Shapes: B sequences, S tokens a sequence, N scored tokens, D width, V words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalina.data.tokenizer import Tokenizer
from megalina.generate import refuse_looking_ahead
from megalina.mesh import all_gather_object
from megalina.serve.decoding import padded_batch
from megalina.serve.engine import Engine
from megalina.tasks.continuation import Continuation

ROWS_AT_ONCE = 256  # scored tokens whose logits, float64 [N, V], exist at a time

Progress = Callable[[int, int], None]  # batches done, of how many


@dataclass(frozen=True, slots=True)
class Likelihood:
    log_likelihood: float  # nats, summed over the continuation's tokens
    greedy: bool  # every token is the likeliest one after those before
    cut_tokens: int  # tokens in front of the context for which the model has no room


def no_progress(done: int, total: int) -> None:
    """What to call where nobody looks."""


def check_tokenizer(engine: Engine, tokenizer: Tokenizer) -> None:
    """ValueError for ids that the model doesn't have."""
    ids, words = tokenizer.vocab_size, engine.gpt.vocab_size
    if ids > words:
        raise ValueError(f"the tokenizer has {ids} ids, the model {words}: give the tokenizer it was trained with")


def log_likelihoods(
    engine: Engine,
    continuations: Sequence[Continuation],
    *,
    batch_size: int,
    max_positions: int,
    num_ids: int | None = None,
    progress: Progress = no_progress,
) -> list[Likelihood]:
    """Of each continuation, in their order, the same on all ranks; all ranks call it together, with equal arguments.

    `batch_size`: sequences of a rank at a time.  A sequence longer than `max_positions` is cut in front.  `num_ids`: of the
    tokenizer, where the model has more: the likeliest token is one of these.  ValueError for an empty or too long continuation,
    a router that looks at later tokens, and for ranks with unequal arguments.
    """
    _refuse(engine, continuations, batch_size, max_positions)
    world = engine.mesh.world
    longest_first = sorted(range(len(continuations)), key=lambda i: (-len(continuations[i].read(max_positions)), i))
    batches = [longest_first[i : i + batch_size] for i in range(0, len(longest_first), batch_size)]
    own, found = batches[world.rank :: world.size], dict[int, Likelihood]()
    for step in range(-(-len(batches) // world.size)):
        mine = own[step] if step < len(own) else []  # none: this rank takes part with padding
        scored = _scored(engine, [continuations[i] for i in mine], max_positions, num_ids or engine.gpt.vocab_size)
        found.update(zip(mine, scored, strict=True))
        progress(min((step + 1) * world.size, len(batches)), len(batches))
    of_all = {i: likelihood for of_rank in all_gather_object(engine.mesh, found) for i, likelihood in of_rank.items()}
    return [of_all[i] for i in range(len(continuations))]


def _refuse(engine: Engine, continuations: Sequence[Continuation], batch_size: int, max_positions: int) -> None:
    given = (len(continuations), sum(len(c.context) + len(c.tokens) for c in continuations), batch_size, max_positions)
    for rank, others in enumerate(all_gather_object(engine.mesh, given)):
        if others != given:
            raise ValueError(
                f"rank {engine.mesh.world.rank} was given {given[0]} continuations with {given[1]} tokens, batch_size {given[2]} "
                f"and max_positions {given[3]}, rank {rank} {others[0]}, {others[1]}, {others[2]} and {others[3]}: give all "
                "ranks the same"
            )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: choose 1 or more")
    refuse_looking_ahead(engine.gpt)
    for i, c in enumerate(continuations):
        if not c.context or not c.tokens:
            raise ValueError(f"continuation {i} has {len(c.context)} tokens of context and {len(c.tokens)} after: both need one")
        if len(c.tokens) > max_positions:
            raise ValueError(
                f"continuation {i} has {len(c.tokens)} tokens, but the model reads at most {max_positions} (max_positions): "
                "shorten it"
            )


def _scored(engine: Engine, continuations: Sequence[Continuation], max_positions: int, num_ids: int) -> list[Likelihood]:
    """Of this rank's next batch; without a continuation, of padding."""
    read = [c.read(max_positions) for c in continuations] or [(0,)]
    longest = max(map(len, read))
    padding = [longest - len(ids) for ids in read]
    token_BS = torch.tensor([[0] * pad + list(ids) for pad, ids in zip(padding, read, strict=True)])
    alive = [bool(continuations)] * len(read)
    n_TD = engine.hidden(padded_batch(token_BS, padding, alive, 0, engine.gpt.embedding.device))
    if not continuations:
        return []
    n_BSD = n_TD.view(len(read), longest, -1)
    n_ND = torch.cat([n_BSD[b, longest - len(c.tokens) :] for b, c in enumerate(continuations)])
    label_N = torch.tensor([token for c in continuations for token in c.tokens], device=n_ND.device)
    log_N, greedy_N = _token_scores(engine, n_ND, label_N, num_ids)
    sizes = [len(c.tokens) for c in continuations]
    return [
        Likelihood(float(logs.sum()), bool(greedy.all()), c.cut_tokens(max_positions))
        for c, logs, greedy in zip(continuations, log_N.split(sizes), greedy_N.split(sizes), strict=True)
    ]


def _token_scores(engine: Engine, n_ND: Tensor, label_N: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """Of each label its log-likelihood in nats, float64 [N], and whether it is the likeliest, bool [N]; on the CPU."""
    gpt, logs, greedy = engine.gpt, [], []
    with torch.inference_mode():
        for n_nD, label_n in zip(n_ND.split(ROWS_AT_ONCE), label_N.split(ROWS_AT_ONCE), strict=True):
            logits_nV = gpt.logits(n_nD)[:, : gpt.vocab_size].double()
            greedy.append(logits_nV[:, :num_ids].argmax(1) == label_n)
            logs.append(logits_nV.gather(1, label_n[:, None])[:, 0] - logits_nV.logsumexp(1))
    return torch.cat(logs).cpu(), torch.cat(greedy).cpu()
