"""Perplexity: how well a model foresees text, in nats a token and in bits a byte, measured over the ranks of an engine.

Text is the run's own held-out part, the very sequences on which training validates, or documents that somebody gives.

Shapes: B sequences, S tokens a sequence, T = B x S tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.checkpoint.files import read_values
from megalina.config import DataConfig
from megalina.data.documents import find_sources, read_texts
from megalina.data.source import Samples, open_data
from megalina.data.tokenizer import Tokenizer
from megalina.evaluate.likelihood import Progress, check_tokenizer, no_progress
from megalina.mesh import Axis, all_gather_object
from megalina.model.vocabulary import cross_entropy
from megalina.serve.engine import Engine


@dataclass(frozen=True, slots=True)
class Quality:
    """Sums over the text, of all ranks."""

    nats: float  # of the losses of all tokens that were predicted
    num_tokens: int  # that were predicted
    num_bytes: int  # of text that these stand for; 0: not known

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where no float holds it."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None where the bytes are not known."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The validation text of a run."""

    samples: Samples
    num_sequences: int  # the first so many count
    token_bytes: Sequence[int] | None  # None: bits a byte can't be known


def perplexity(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    token_bytes: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Quality:
    """Over the `batches` of all ranks, of which this one may have fewer than others or none; all ranks call it together.

    Labels count where `loss_mask_BS` is True.  `token_bytes`: see `Tokenizer.token_bytes`.  `progress(done)`: after each batch
    that all ranks have done together.  Sums are in float64, in the order of ranks, so every rank has the same.  ValueError, on
    all ranks, where no token counts or where a rank's batches can't be read.
    """
    nats, num_tokens, num_bytes, done = 0.0, 0, 0, 0
    bytes_V = None if token_bytes is None else torch.tensor(token_bytes)
    own = iter(batches)
    while True:
        batch, problem = _next_of(own)
        told = all_gather_object(engine.mesh, (batch is not None, problem))
        if wrong := [text for _, text in told if text]:
            raise ValueError(wrong[0])
        if not any(more for more, _ in told):
            break
        losses_T = _token_losses(engine, batch if batch is not None else _padding())
        if batch is not None:
            counts_T = batch.loss_mask_BS.flatten().cpu()
            nats += float(losses_T[counts_T].sum())
            num_tokens += int(counts_T.sum())
            if bytes_V is not None:
                num_bytes += int(bytes_V[batch.labels_BS.flatten().cpu()[counts_T]].sum())
        done += 1
        progress(done)
    sums = all_gather_object(engine.mesh, (nats, num_tokens, num_bytes))
    whole = Quality(sum(s[0] for s in sums), sum(s[1] for s in sums), sum(s[2] for s in sums))
    if whole.num_tokens == 0:
        raise ValueError("there is no token to predict: give more text")
    return whole


def open_held_out(checkpoint: Path, *, num_sequences: int = 0, cache_dir: str = "") -> HeldOut:
    """The validation text of a checkpoint's run.  `num_sequences`: at most so many, 0: as many as training validates on.
    `cache_dir`: where prepared text lies now, if not where the run had it.

    ValueError where there is none, or where it isn't the text that the model was trained on."""
    values = read_values(checkpoint)
    train, data = values["config"]["train"], DataConfig(**values["config"]["data"])
    if cache_dir:
        data = replace(data, cache_dir=cache_dir)
    if num_sequences < 0:
        raise ValueError(f"{num_sequences} sequences: choose 1 or more, or 0 for those that training validates on")
    opened = open_data(data, seq_len=train["seq_len"], seed=train["seed"])
    if opened.valid is None:
        raise ValueError(f"data.split={data.split} of {checkpoint} leaves no validation text: give a text instead")
    if opened.vocab_size > values["vocab_size"]:
        raise ValueError(
            f"the text now has {opened.vocab_size} ids, the model of {checkpoint} {values['vocab_size']}: it isn't the text that "
            "the model was trained on; give the folder where that was prepared"
        )
    token_bytes = opened.tokenizer.token_bytes() if opened.tokenizer is not None else None
    return HeldOut(opened.valid, min(num_sequences or train["eval_sequences"], opened.valid.num_sequences), token_bytes)


def held_out_quality(engine: Engine, held_out: HeldOut, *, batch_size: int, progress: Progress = no_progress) -> Quality:
    """All ranks call it together.  `batch_size`: sequences of a rank at a time; `progress`: in batches of each rank.

    What training calls `val_loss`, unless it had a capacity, which engines don't enforce: no token loses its expert here."""
    world = engine.mesh.world
    total = -(-held_out.num_sequences // (_positive(batch_size) * world.size))
    own = held_out_batches(held_out, world, batch_size=batch_size)
    return perplexity(engine, own, token_bytes=held_out.token_bytes, progress=lambda done: progress(done, total))


def held_out_batches(held_out: HeldOut, world: Axis, *, batch_size: int) -> Iterator[Batch]:
    """This rank's share; the last ranks may have fewer."""
    for first in range(world.rank * batch_size, held_out.num_sequences, batch_size * world.size):
        yield held_out.samples.batch(first, min(batch_size, held_out.num_sequences - first))


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, which is one, of a .jsonl under "text", or of a folder.  ValueError in one line for what
    can't be read, or is empty."""
    documents = [text for text in read_texts(find_sources([str(path)]), ["text"]) if text]
    if not documents:
        raise ValueError(f"{path} holds no text: give a file with text in it")
    return documents


def text_quality(
    engine: Engine,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_positions: int,
    progress: Progress = no_progress,
) -> Quality:
    """Of every token of the documents, in windows of `max_positions`, the first of a document after an end of document.

    All ranks call it together, with the same documents.  Bits a byte are of the documents' own bytes."""
    check_tokenizer(engine, tokenizer)
    windows = windows_of([tokenizer.encode(text) for text in documents], tokenizer.eod, max_positions)
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), _positive(batch_size))]
    world = engine.mesh.world
    total = -(-len(batches) // world.size)
    own = (_batch_of(batch) for batch in batches[world.rank :: world.size])
    quality = perplexity(engine, own, progress=lambda done: progress(done, total))
    return replace(quality, num_bytes=sum(len(text.encode()) for text in documents))


def windows_of(documents: Sequence[Sequence[int]], eod: int, length: int) -> list[list[int]]:
    """Up to `length` + 1 tokens each, the first only read, the last only a label: together, every token is a label once."""
    behind_eod = [[eod, *ids] for ids in documents]
    return [ids[i : i + length + 1] for ids in behind_eod for i in range(0, len(ids) - 1, length)]


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: choose 1 or more")
    return batch_size


def _batch_of(windows: Sequence[Sequence[int]]) -> Batch:
    """Padded behind, which earlier tokens don't see."""
    longest = max(map(len, windows)) - 1
    token_Bs = torch.tensor([[*ids, *[0] * (longest + 1 - len(ids))] for ids in windows])
    valid_BS = torch.arange(longest) < torch.tensor([len(ids) - 1 for ids in windows])[:, None]
    position_BS = torch.arange(longest).expand(len(windows), -1)
    sample_B = torch.zeros(len(windows), dtype=torch.int64)
    return Batch(token_Bs[:, :-1], token_Bs[:, 1:], valid_BS, valid_BS, position_BS, None, sample_B)


def _padding() -> Batch:
    """One token that is none."""
    zero_BS, no_BS = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
    return Batch(zero_BS, zero_BS, no_BS, no_BS, zero_BS, None, zero_BS[:, 0])


def _next_of(batches: Iterator[Batch]) -> tuple[Batch | None, str]:
    """None after the last; a text where it can't be read, so that the other ranks don't wait for this one."""
    try:
        return next(batches, None), ""
    except (ValueError, OSError) as error:
        return None, str(error) or type(error).__name__


def _token_losses(engine: Engine, batch: Batch) -> Tensor:
    """Nats, float64 [T], on the CPU: of each token's label."""
    batch = batch.to(engine.gpt.embedding.device)
    n_TD = engine.hidden(batch)
    with torch.inference_mode():
        return cross_entropy(engine.gpt.output.stat(n_TD, batch).unsqueeze(0)).double().cpu()
