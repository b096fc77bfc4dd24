"""The start of a verification: a model in which no parameter is zero or one, a text with every kind of hole in it, and with
`router.replay` choices to go with it."""

import zlib

import torch
from torch import nn

from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.model.init import Cut, spec_of
from megalina.model.routers import Router
from megalina.verify.recording import SEQUENCES

NOISE_STD = 0.1
BIAS_STD = 0.05


@torch.no_grad()
def shake(model: nn.Module, seed: int, cut: Cut) -> None:
    """Add noise to this rank's part of every parameter, and to selection biases: a bug that a bias of zero or a norm of one
    would hide then shows.  The same on every layout; the vocabulary's padding stays zero."""
    for name, p in model.named_parameters():
        spec = spec_of(p)
        noise = torch.zeros(spec.shape, dtype=torch.float64)
        rows = spec.rows or spec.shape[0]
        noise[:rows] = _normal(f"{seed} {name}", (rows, *spec.shape[1:])) * NOISE_STD
        p.add_(cut.local(noise, spec).reshape(p.shape).to(p))
    for name, module in model.named_modules():
        if isinstance(module, Router) and module.bias_E is not None:
            module.bias_E.add_((_normal(f"{seed} {name} bias", tuple(module.bias_E.shape)) * BIAS_STD).to(module.bias_E))


def random_batches(config: PretrainConfig, steps: int) -> list[Batch]:
    """The global batch of each step: random words, documents, labels that don't count, padding at two ends.

    No two tokens of a batch are alike in all that a model knows of them: else routers would choose between them by rounding."""
    length, words = config.train.seq_len, config.model.vocab_size
    out = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(config.train.seed + 100 + step)
        tokens = torch.randint(0, words, (SEQUENCES, length + 1), generator=generator)
        document = torch.rand(SEQUENCES, length, generator=generator).lt(0.2).long().cumsum(1)
        mask = torch.rand(SEQUENCES, length, generator=generator) > 0.2
        valid = torch.ones(SEQUENCES, length, dtype=torch.bool)
        valid[1, length * 5 // 8 :] = valid[6, length // 4 :] = False
        position = torch.arange(length).repeat(SEQUENCES, 1)
        starts = torch.cat([torch.ones(SEQUENCES, 1, dtype=torch.bool), document[:, 1:] != document[:, :-1]], 1)
        _without_twins(tokens, starts, words, config.train.seed + 100 + step)
        if config.data.reset_positions:
            position = position - position.where(starts, 0).cummax(1).values
        sample = torch.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
        documents = document if config.data.reset_attention else None
        replay = _drawn_choices(config, generator) if config.router.replay else None
        out.append(Batch(tokens[:, :-1], tokens[:, 1:], mask & valid, valid, position, documents, sample, replay))
    return out


def _drawn_choices(config: PretrainConfig, generator: torch.Generator) -> torch.Tensor:
    """What is replayed where the file is of a larger model: some experts for most tokens, in padding too, none for the others."""
    model, length = config.model, config.train.seq_len
    scores = torch.rand(SEQUENCES, length, model.num_layers, model.num_experts, generator=generator)
    choices = scores.argsort(dim=3)[..., : config.router.top_k].short()
    choices[torch.rand(SEQUENCES, length, generator=generator) < 0.2] = -1
    return choices


def _without_twins(tokens: torch.Tensor, starts: torch.Tensor, words: int, seed: int) -> None:
    """Every document begins with a word of its own, as far as there are words, and with no word twice: the first tokens of two
    documents know nothing but their word, and a run of one word, with rotary positions, nothing more."""
    distinct = torch.randperm(words, generator=torch.Generator().manual_seed(seed))
    number = int(starts.sum())
    tokens[:, :-1][starts] = distinct.repeat(-(-number // words))[:number]
    for column in range(1, starts.shape[1]):
        twice = ~starts[:, column] & (tokens[:, column] == tokens[:, column - 1])
        tokens[twice, column] = (tokens[twice, column] + 1) % words


def _normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, dtype=torch.float64, generator=generator)
