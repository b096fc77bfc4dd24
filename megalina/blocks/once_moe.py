"""A mixture of experts whose tokens travel once to each rank that has experts of theirs (`parallel.dispatch=once_per_rank`).

A row has the token and its weights for all experts of that rank, -inf where it didn't choose one; the rank computes the experts,
and the weighted sum of what they give comes back as one row.  So gradients of weights travel, too.  The same rows as DeepEP's
dispatch sends (DeepSeek-V3, arXiv:2412.19437, section 3.2.2), by plain all-to-alls.
"""

from collections.abc import Mapping

from megalina.blocks.memory import Inside
from megalina.blocks.moe import DIGESTED, ORDER, MoE
from megalina.blocks.sizes import INT_BYTES, At
from megalina.blocks.work import Piece, Work, moved, residual
from megalina.step.forward import compute
from megalina.step.program import Instruction

PACK_KERNELS = (24, 8)  # forward and backward; counted in megalina/model/once_moe.py
SORT_KERNELS = 14  # of the rows that came, by expert


class OnceMoE(MoE):
    functions = "megalina.model.once_moe:OnceMoE"

    # lines
    sent_value, wire_order = "sent", "#way"

    @property
    def counted_once(self) -> bool:
        return False

    def packing(self, layer: int) -> list[Instruction]:
        return [compute("pack", layer, "rows weight #order", "sent #way")]

    def mixed(self, shared: bool) -> str:
        return f"back {'s ' if shared else ''}#way"

    # sizes
    def places_of_a_token(self, at: At) -> float:
        """To how many places a token is sent on average: ranks that have experts of it."""
        return self.ranks_of_a_token(at)

    def ranks_of_a_token(self, at: At) -> float:
        """On how many ranks a token has experts on average."""
        return self._visited(at, at.rank.ep)

    def _visited(self, at: At, places: float) -> float:
        """Of so many places, each with as many experts, those where a token has any; all choices are as probable."""
        experts, apart = self.model.num_experts, 1.0
        for i in range(min(self.router.top_k, experts)):
            apart *= max(0.0, experts - experts / places - i) / (experts - i)
        return places * (1 - apart) * min(1.0, self._of_token / self.router.top_k)

    def packed(self, at: At) -> int:
        """Rows that a rank sends."""
        return self._of_chunk(at, int(at.own) * self.places_of_a_token(at))

    def _weights_sent(self, at: At) -> int:
        """Of a row."""
        return self._experts_here(at)

    def unpacked(self, at: At) -> int:
        """Rows that come to a rank."""
        over = min(at.rank.skew_L[at.layer], self._limit) if at.rank.ep > 1 else 1.0
        return self._of_chunk(at, int(at.own) * min(at.rank.ep, self.ranks_of_a_token(at) * over))

    def _choices_here(self, at: At) -> int:
        """Most experts here that a token has."""
        here = self._experts_here(at)
        return here if self.kind.experts_choose else min(self.router.top_k, here)

    def _regroups(self, at: At) -> bool:
        return False  # rows are made in the order of experts

    # work
    def work(self, at: At) -> Piece:
        rank, own = at.rank, at.own
        ways = self.places_of_a_token(at)
        match at.name:
            case "pack":
                kernels, back = PACK_KERNELS
                indices = Work((), own * self.router.top_k**2 * INT_BYTES, kernels)
                return Piece(indices, Work((), 0.0, back)) + moved(rank, 2 * own * ways, own * (self.router.top_k + ways), 1, 1)
            case "cut" | "join":
                return moved(rank, 2 * own * ways, 2 * own * ways, 2, 2)
            case "mix":
                mixed = moved(rank, own * (ways + 2), own * (1 + ways), 2, 2)
                return mixed + (residual(rank, own) if self.model.shared_d_ff else Piece())
        return super().work(at)

    def _experts_work(self, at: At, rows: float) -> Piece:
        """The experts', and a token's rows made and summed."""
        came = at.own * self.ranks_of_a_token(at) / at.instruction.chunk[1] * at.load
        sorting = Piece(Work((), 0.0, SORT_KERNELS), Work((), 0.0, SORT_KERNELS / 2))
        return super()._experts_work(at, rows) + sorting + moved(at.rank, 3 * rows + 2 * came, 5 * rows + 2 * came, 3, 4)

    # memory
    def memory(self, at: At) -> Inside:
        if at.name == "pack":
            return self._pack_memory(at)
        if at.name in ("cut", "join"):
            index, rows = (
                INT_BYTES * self.packed(at),
                self._wire_bytes(at, self.packed(at), self._weights_sent(at) * (at.name == "cut")),
            )
            forward = rows + DIGESTED * index if at.name == "cut" else 2 * rows
            return Inside(index, forward, 2 * rows if at.name == "cut" else rows)
        return super().memory(at)

    def _wire_bytes(self, at: At, rows: int, weights: int = 0) -> int:
        """Of rows with so many weights each."""
        rank = at.rank
        return rows * (rank.width * rank.element + weights * rank.main)

    def _pack_memory(self, at: At) -> Inside:
        choices, packed = int(at.own) * self.router.top_k, self.packed(at)
        kept = INT_BYTES * (packed + choices)
        sent = self._wire_bytes(at, packed, self._weights_sent(at))
        pairs = choices * self.router.top_k * INT_BYTES
        rows = self.sent(at) * at.rank.width * at.rank.element
        return Inside(kept, max(sent * 2, kept + pairs), rows + choices * at.rank.main)

    def _experts_memory(self, at: At) -> Inside:
        rank, came, got = at.rank, self.unpacked(at), self.got(at)
        base, x, token = super()._experts_memory(at), got * rank.width * rank.element, came * rank.width * rank.element
        slots = came * self._choices_here(at)
        weights = slots * rank.main + came * self._experts_here(at) + ORDER * INT_BYTES * slots
        kept = base.kept + 2 * x + weights  # each expert's rows, and what it gave
        # the sum's gradients, of which those of the experts' rows are made, are where what experts gave was
        return Inside(kept, base.forward + 2 * x + token + weights, base.backward + token + weights)

    def _mix_memory(self, at: At, sent: int) -> Inside:
        return super()._mix_memory(at, self.packed(at))

    def value_bytes(self, at: At) -> Mapping[str, int]:
        packed, came = self.packed(at), self.unpacked(at)
        return {
            **super().value_bytes(at),
            "sent": self._wire_bytes(at, packed, self._weights_sent(at)),
            "back": self._wire_bytes(at, packed),
            "got": self._wire_bytes(at, came, self._experts_here(at)),
            "y": self._wire_bytes(at, came),
            "#way": INT_BYTES * (2 * packed + int(at.own) * self.router.top_k),
            "#sizes": 0,
        }
