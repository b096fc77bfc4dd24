"""A batch: the tokens of some sequences and what must be known about each.

B sequences, S tokens a sequence, L layers of the model, K experts a token.

With context parallelism a rank has a part of each sequence (`megalina/zigzag.py`) and knows whole ones: what a token gets
of its sequence follows from these."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from megalina import zigzag

Fact = TypeVar("Fact")


class Once:
    """Has things that follow from it alone, made when somebody asks and kept."""

    def once(self, make: Callable[..., Fact], *also: Hashable) -> Fact:
        """`make(self, *also)`, made once and kept: for what each layer would make anew."""
        key = make, *also
        if key not in self._made:
            self._made[key] = make(self, *also)
        made: Fact = self._made[key]
        return made

    @cached_property
    def _made(self) -> dict[tuple[Hashable, ...], Any]:
        return {}


@dataclass(frozen=True)
class Batch(Once):
    tokens_BS: Tensor  # int64, what the model reads
    labels_BS: Tensor  # int64, the token after each
    loss_mask_BS: Tensor  # bool, False: this position's label does not count in the loss
    valid_BS: Tensor  # bool, False: padding; it goes to no expert and counts nowhere
    position_BS: Tensor  # int64, for RoPE or learned positions; starts anew at document ends if so configured
    document_BS: Tensor | None  # int64, equal within a document of the sequence; None: plain causal attention
    sample_B: Tensor  # int64, number of the sequence since the start of training: seeds dropout and noise
    # integers, experts that routers send tokens to whatever they would choose; -1: they choose (padding, layers without experts)
    replay_BSLK: Tensor | None = None
    cut_from: "Batch | None" = None  # the same sequences, whole; None: these are
    contexts: int = 1  # ranks that have a part of each sequence ...
    context: int = 0  # ... and which of them this is

    @classmethod
    def whole(cls, token_BS: Tensor) -> "Batch":
        """Sequences without padding, each one document; their last tokens have no loss."""
        sequences, length = token_BS.shape
        valid_BS = torch.ones_like(token_BS, dtype=torch.bool)
        counts_BS = valid_BS.clone()
        counts_BS[:, -1] = False
        position_BS = torch.arange(length, device=token_BS.device).expand(sequences, length)
        sample_B = torch.arange(sequences, device=token_BS.device)
        return cls(token_BS, token_BS.roll(-1, 1), counts_BS, valid_BS, position_BS, None, sample_B)

    def part_of(self, contexts: int, context: int) -> "Batch":
        """This rank's part of each sequence.  2 x contexts must divide their length."""
        if contexts == 1:
            return self
        assert self.cut_from is None, "it is a part already"
        alike = {"sample_B": self.sample_B, "cut_from": self, "contexts": contexts, "context": context}
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in values.keys() - alike.keys():
            if values[name] is not None:
                values[name] = zigzag.own_part(values[name], contexts, context)
        out = Batch(**(values | alike))
        if not self.may_have_padding:
            out.__dict__["may_have_padding"] = False
        return out

    @property
    def uncut(self) -> "Batch":
        """Of whole sequences."""
        return self if self.cut_from is None else self.cut_from

    @cached_property
    def place_S(self) -> Tensor:
        """int64 [S]: where in its sequence each token is."""
        if self.cut_from is None:
            return torch.arange(self.tokens_BS.shape[1], device=self.tokens_BS.device)
        return zigzag.places(self.cut_from.tokens_BS.shape[1], self.contexts, self.context, self.tokens_BS.device)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda v: v.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In page-locked memory, from which a copy to a GPU goes on beside other work."""
        return self._map(lambda v: v.pin_memory())

    def split(self, size: int) -> "list[Batch]":
        """Cut into batches of `size` sequences each."""
        return [self._map(lambda v, i=i: v[i : i + size]) for i in range(0, len(self.tokens_BS), size)]  # type: ignore[misc]

    def part(self, i: int, parts: int, slices: int = 1) -> "Batch":
        """Part i of so many: of each of `slices` slices of the sequences the same share."""
        return self._map(lambda v: v.view(slices, parts, -1, *v.shape[1:])[:, i].flatten(0, 1))

    @cached_property
    def may_have_padding(self) -> bool:
        """False: every position is valid.  Known of batches that were on the CPU once; asking a GPU would make the host wait."""
        return not self.valid_BS.is_cpu or not bool(self.valid_BS.all())

    def __getstate__(self) -> dict[str, Any]:
        """What was made of the batch doesn't travel with it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Batch):
                values[name] = value._map(change)
            elif isinstance(value, Tensor):
                values[name] = change(value)
        out = Batch(**values)
        if not self.may_have_padding:
            out.__dict__["may_have_padding"] = False  # as a cached property keeps it
        return out
