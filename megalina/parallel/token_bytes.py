"""The bytes of a step's tokens: what this rank sends of them to other ranks, in its node and beyond it."""

import threading
from collections.abc import Sequence

from megalina.mesh import Axis


class TokenBytes:
    """Counts what is sent, exactly: rows as they are routed, there and back, forward and backward.  What stays on a rank is in
    neither number.  Tokens that all experts get, with their weights, count as sent from each rank of the row to each other one,
    and so do their results on the way back, whichever way a collective takes.

    They are read after all have arrived."""

    def __init__(self, ranks_per_node: int):
        self.ranks_per_node = ranks_per_node
        self._between = self._within = 0
        self._lock = threading.Lock()  # what is passed on in a node is sent by other threads

    def add(self, axis: Axis, send_R: Sequence[int], row_bytes: int) -> None:
        """`send_R`: rows to each rank of the axis."""
        me, per_node = axis.ranks[axis.rank], self.ranks_per_node
        with self._lock:
            for rank, rows in zip(axis.ranks, send_R, strict=True):
                if rank // per_node != me // per_node:
                    self._between += rows * row_bytes
                elif rank != me:
                    self._within += rows * row_bytes

    def take(self) -> tuple[int, int]:
        """Bytes between nodes and within this one, since they were taken last."""
        found = self._between, self._within
        self._between = self._within = 0
        return found
