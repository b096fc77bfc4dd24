"""Slot counts: how many rows go to the slots of all devices and come to those here, for all slots at once or chunk by chunk.

A chunk is a group of neighbouring slots of every device, the same group on all of them, so all ranks start the same exchanges
in the same order, also where a rank has no row of a chunk.

R ranks (the devices), S slots on each, Q = R x S slots in all.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megalina.model.dispatcher import Counts, Sizes, sizes_of
from megalina.model.permute import regroup_index


class SlotCounts(Counts):
    """`sent_Q`: this rank's rows for each slot; `received_RS`: rows of each rank for each slot here; both int64."""

    def __init__(self, sent_Q: Tensor, received_RS: Tensor):
        ranks, self.num_slots = received_RS.shape
        super().__init__(sent_Q, received_RS.flatten(), ranks)

    def slots_of(self, chunk: tuple[int, int]) -> range:
        """The slots here of the c-th of n chunks, `chunk` being (c, n): slot s belongs to chunk s x n // S."""
        c, n = chunk
        begin, end = (-(-i * self.num_slots // n) for i in (c, c + 1))
        return range(begin, end)

    def sizes(self, chunk: tuple[int, int]) -> Sizes:
        """Of a chunk's slots.  Everything arrives at once and goes back in chunks: `index_N` picks the chunk's rows from all
        that arrived, `inverse_N` is of the chunk's rows alone."""
        c, n = chunk
        if n not in self._made and n > 1:
            self._made[n] = self._chunks(n)
        return self._made[n][c] if n > 1 else super().sizes(chunk)

    def join_index(self, chunks: int) -> tuple[Tensor, Tensor]:
        """Index and inverse that bring what comes back, sorted by (chunk, device, slot), into the order (device, slot)."""
        came_CR = [self.sizes((c, chunks)).send_R for c in range(chunks)]
        return regroup_index(came_CR, self._sent_E.device)

    def _chunks(self, n: int) -> list[Sizes]:
        sent_RS, received_RS = (count.view(self._ranks, self.num_slots) for count in (self._sent_E, self._received_E))
        whole_N = super().sizes((0, 1)).index_N
        if whole_N is None:  # rows arrive in the order of slots
            whole_N = torch.arange(int(received_RS.sum()), device=sent_RS.device)
        out: list[Sizes] = []
        begin = 0
        for c in range(n):
            slots = slice(self.slots_of((c, n)).start, self.slots_of((c, n)).stop)
            sizes = sizes_of(sent_RS[:, slots].flatten(), received_RS[:, slots].flatten(), self._ranks)
            index_N = whole_N[begin : begin + sum(sizes.count_e)]
            inverse_N = torch.arange(len(index_N), device=index_N.device) if sizes.inverse_N is None else sizes.inverse_N
            out.append(replace(sizes, index_N=index_N, inverse_N=inverse_N))
            begin += len(index_N)
        return out
