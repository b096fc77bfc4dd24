"""The tokens of a micro-batch, and which of them are this rank's.

A tokens of the micro-batch, T of them this rank's own (with tensor parallelism a slice of what it has of each sequence, with
context parallelism two pieces of it), G groups that share capacity and balance, L layers of the model, K experts a token.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megalina.batch import Batch, Once
from megalina.zigzag import in_order

OwnTokens = slice | Tensor  # of a micro-batch's tokens: a slice, or with context parallelism int64 [T]
ALL = slice(None)  # all tokens of a micro-batch are this rank's


@dataclass(frozen=True, slots=True)
class TokenShare:
    """This rank's part of each micro-batch's tokens under tensor parallelism, of those that a batch has under context
    parallelism."""

    ranks: int = 1
    rank: int = 0
    cut: bool = False  # activations between attention and MLP are cut along the tokens
    contexts: int = 1  # ranks of context parallelism
    context: int = 0

    def own(self, batch: Batch) -> slice:
        """Those that it routes, and whose losses it counts."""
        if self.ranks == 1:
            return ALL
        width = batch.tokens_BS.numel() // self.ranks
        return slice(self.rank * width, (self.rank + 1) * width)

    def held(self, batch: Batch) -> slice:
        """Those whose activations it has between attention and MLP."""
        return self.own(batch) if self.cut else ALL


WHOLE = TokenShare()


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The groups of tokens that share capacity and balance."""

    number: int  # G
    tokens_G: Tensor  # int64, valid tokens
    group_A: Tensor  # int64, each token's; padding is a group of its own, G


@dataclass(frozen=True)
class RouterTokens(Once):
    """The micro-batch's tokens, sequence after sequence, the same on each rank that has some of them."""

    token_A: Tensor  # int64, token id
    sample_A: Tensor  # int64, number of the sequence since the start of training
    position_A: Tensor  # int64, index within the sequence, 0 .. S-1, never starting anew
    valid_A: Tensor  # bool, False: padding
    num_sequences: int  # A = num_sequences x S
    may_have_padding: bool = True  # False: all are valid, and nothing need be masked
    replay_ALK: Tensor | None = None  # integers, see `Batch.replay_BSLK`

    @cached_property
    def padding_A1(self) -> Tensor:
        """bool [A, 1]"""
        return ~self.valid_A.unsqueeze(1)

    def counted(self, dtype: torch.dtype) -> Tensor:
        """[A]: 1 for each token that isn't padding."""
        return self.once(_counted, dtype)

    @cached_property
    def by_sequence(self) -> Groups:
        return self._in_groups(self.num_sequences)

    @cached_property
    def together(self) -> Groups:
        return self._in_groups(1)

    def _in_groups(self, number: int) -> Groups:
        tokens_G = self.valid_A.view(number, -1).sum(dim=1)
        group_A = torch.arange(len(self.valid_A), device=self.valid_A.device) // (len(self.valid_A) // number)
        return Groups(number, tokens_G, group_A.masked_fill_(~self.valid_A, number))


def _counted(tokens: RouterTokens, dtype: torch.dtype) -> Tensor:
    return tokens.valid_A.to(dtype)


def places(batch: Batch, own: slice) -> tuple[Tensor, Tensor]:
    """Number of the sequence and index within it, of each of this rank's tokens: what noise is a function of."""
    sample_T, position_T = batch.once(_places_of)
    return sample_T[own], position_T[own]


def _places_of(batch: Batch) -> tuple[Tensor, Tensor]:
    batch_size, length = batch.tokens_BS.shape
    return batch.sample_B.repeat_interleave(length), batch.place_S.repeat(batch_size)


def among_all(batch: Batch, own: slice) -> OwnTokens:
    """Where a rank's tokens are among those of `router_tokens`; `own`: which of the batch's they are."""
    return own if batch.cut_from is None else batch.once(_among_all)[own]


def _among_all(batch: Batch) -> Tensor:
    first_B = torch.arange(len(batch.sample_B), device=batch.place_S.device) * batch.uncut.tokens_BS.shape[1]
    return (first_B[:, None] + batch.place_S).flatten()


def all_in_order(value_A: Tensor, batch: Batch) -> Tensor:
    """[A, ...] of the ranks that share out a micro-batch's tokens, rank after rank -> in the order of `router_tokens`."""
    return value_A if batch.cut_from is None else in_order(value_A, batch.contexts, len(batch.sample_B)).flatten(0, 1)


def router_tokens(batch: Batch) -> RouterTokens:
    """What routers know of a micro-batch; the same object each time, so what it has found out need not be found out again."""
    return batch.uncut.once(_tokens_of)


def _tokens_of(batch: Batch) -> RouterTokens:
    sample_A, position_A = batch.once(_places_of)
    tokens_A, valid_A = batch.tokens_BS.flatten(), batch.valid_BS.flatten()
    replay_ALK = None if batch.replay_BSLK is None else batch.replay_BSLK.flatten(0, 1)
    return RouterTokens(tokens_A, sample_A, position_A, valid_A, len(batch.sample_B), batch.may_have_padding, replay_ALK)
