"""The tokens of a micro-batch, and which of them are this rank's.

A tokens of the micro-batch, T of them this rank's own (with tensor parallelism a slice), G groups that share capacity and
balance, L layers of the model, K experts a token.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megalina.batch import Batch

OwnTokens = slice  # of a micro-batch's tokens
ALL = slice(None)  # all tokens of a micro-batch are this rank's


@dataclass(frozen=True, slots=True)
class TokenShare:
    """This rank's part of each micro-batch's tokens under tensor parallelism."""

    ranks: int = 1
    rank: int = 0
    cut: bool = False  # activations between attention and MLP are cut along the tokens

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


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of tokens that share capacity and balance."""

    number: int  # G
    tokens_G: Tensor  # int64, valid tokens
    group_A: Tensor  # int64, each token's; padding is a group of its own, G


@dataclass(frozen=True)
class RouterTokens:
    """The micro-batch's tokens, sequence after sequence, the same on each rank of a tensor-parallel group."""

    token_A: Tensor  # int64, token id
    sample_A: Tensor  # int64, number of the sequence since the start of training
    position_A: Tensor  # int64, index within the sequence, 0 .. S-1, never starting anew
    valid_A: Tensor  # bool, False: padding
    num_sequences: int  # A = num_sequences x S
    may_have_padding: bool = True  # False: all are valid, and nothing need be masked
    replay_ALK: Tensor | None = None  # integers, see `Batch.replay_BSLK`

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


def places(batch: Batch, own: slice) -> tuple[Tensor, Tensor]:
    """Number of the sequence and index within it, of each of this rank's tokens: what noise is a function of."""
    tokens = router_tokens(batch)
    return tokens.sample_A[own], tokens.position_A[own]


def router_tokens(batch: Batch) -> RouterTokens:
    """What routers know of a micro-batch; the same object each time, so what it has found out need not be found out again."""
    return batch.once(_tokens_of)


def _tokens_of(batch: Batch) -> RouterTokens:
    batch_size, length = batch.tokens_BS.shape
    sample_A = batch.sample_B.repeat_interleave(length)
    position_A = torch.arange(length, device=sample_A.device).repeat(batch_size)
    tokens_A, valid_A = batch.tokens_BS.flatten(), batch.valid_BS.flatten()
    replay_ALK = None if batch.replay_BSLK is None else batch.replay_BSLK.flatten(0, 1)
    return RouterTokens(tokens_A, sample_A, position_A, valid_A, batch_size, batch.may_have_padding, replay_ALK)
