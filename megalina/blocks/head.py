"""The head: the last norm, the logits and their cross entropy; and the balance loss over all layers."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megalina.blocks import memory
from megalina.blocks.block import Block, Loss, norm_parameters
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import At
from megalina.blocks.work import Piece, Work, linear, norm, small
from megalina.step.forward import Shape, compute, exchange
from megalina.step.program import Instruction, Op


class Balance(Block):
    """Where it needs the choices of all ranks, or of all parts of a micro-batch; layers give the sums it is made of."""

    name = "balance"
    functions = "megalina.model.head:Balance"
    cheap = ("loads", "balance", "balance_of_group")
    KERNELS: Mapping[str, int] = {"loads": 1, "balance": 12, "balance_of_group": 14}

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        if self.router.group != "global" or not shape.moe_layers:
            return []
        loads, probs = (" ".join(f"{v}.{i}.0" for i in shape.moe_layers) for v in ("#load", "prob"))
        return [
            compute("loads", layer, loads, "#loads"),
            *exchange("all_loads", layer, Op.SUM, "world", "#loads", "#all_loads"),
            compute("balance", layer, f"{probs} #all_loads", "global_aux"),
        ]

    def work(self, at: At) -> Piece:
        kernels = self.KERNELS[at.name]
        return Piece(small(kernels), small(kernels))

    def memory(self, at: At) -> Inside:
        return Inside()


class Head(Block):
    name = "head"
    functions = "megalina.model.head:Head"
    cheap = ("sequence_losses",)  # in place of `loss`, where no gradient is asked for
    prefix: ClassVar[str] = ""  # of the names of its instructions and values

    @property
    def emulated(self) -> Sequence[str]:
        return (f"{self.prefix}logits", f"{self.prefix}loss")  # the second has next to no FLOPs where there is the first

    @property
    def deferrable(self) -> Sequence[str]:
        return self.emulated

    @property
    def losses(self) -> Sequence[Loss]:
        return [Loss("loss", ("loss",), 1.0, "loss_tokens")]

    def parameters(self) -> Sequence[Parameter]:
        return norm_parameters("final_norm", self.model)

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        p, matrix = self.prefix, "embedding" if self.model.tie_embeddings else "head"
        norm = self.norm_group(shape, layer)
        if not shape.tp:
            return [compute(f"{p}loss", layer, f"{reads} #batch", f"{p}loss", matrix, norm)]
        whole = f"{p}n_all" if shape.sequence else f"{p}n"
        return [
            compute(f"{p}head_norm", layer, reads, f"{p}n", norm),
            *(exchange(f"{p}head_gather", layer, Op.GATHER, "tp", f"{p}n", whole) if shape.sequence else []),
            # log-sum-exp and target logit of this rank's vocabulary
            compute(f"{p}logits", layer, f"{whole} #batch", f"{p}stat", matrix),
            *exchange(f"{p}stat_gather", layer, Op.GATHER, "tp", f"{p}stat", f"{p}stats"),
            compute(f"{p}loss", layer, f"{p}stats #batch", f"{p}loss"),
        ]

    def norm_group(self, shape: Shape, layer: int) -> str:
        """The bucket that its norm is in."""
        return shape.ends

    def work(self, at: At) -> Piece:
        match at.name.removeprefix(self.prefix):
            case "head_norm":
                return norm(at.rank, at.held)
            case "logits":
                return self._logits_work(at)
        return norm(at.rank, at.tokens) + self._logits_work(at) if at.rank.tp == 1 else Piece(small(8), small(8))

    def _logits_work(self, at: At) -> Piece:
        """Logits, and their cross entropy in at least float32, in one memory if the model's type is."""
        rank = at.rank
        numbers, element, wide = at.tokens * rank.words, rank.element, rank.main
        forward = numbers * (element + 2 * element + wide)
        backward = numbers * (2 * wide + (wide + element) * (wide != element))
        return linear(rank, at.tokens, rank.words, rank.width) + Piece(Work((), forward, 10), Work((), backward, 5))

    def memory(self, at: At) -> Inside:
        name = at.name.removeprefix(self.prefix).replace("sequence_losses", "loss")
        if name == "head_norm":
            return memory.norm(at.rank, int(at.held))
        if name == "loss" and at.rank.tp > 1:  # a few numbers a token
            return Inside()
        return self._logits_memory(at, with_norm=name == "loss")

    def _logits_memory(self, at: At, *, with_norm: bool) -> Inside:
        """The largest activation: logits, in place of which their gradient comes; beside them probabilities of 32 bits."""
        rank, t, words = at.rank, int(at.tokens), int(at.rank.words)
        x, logits, wide = t * rank.width * rank.element, t * words * rank.element, t * words * rank.main
        before = memory.norm(rank, t) if with_norm else Inside()
        kept = before.kept + x * with_norm + logits + wide * rank.mixed
        # probabilities are taken in place, but where rows end in padding of a contiguous copy, and written from another
        copies = wide if rank.mixed else 2 * wide if rank.padded and not rank.cuda else 0
        backward = x + memory.outer(rank, words, rank.width)
        tail = x + before.backward - kept if with_norm else 0
        return Inside(kept, max(before.forward, kept + copies), max(backward, tail))

    def deferred(self, at: At) -> Deferred:
        """The largest: the gradients of all logits."""
        rank, t, words, whole = at.rank, int(at.tokens), int(at.rank.words), at.rank.tp == 1
        kept = t * (words + rank.width * whole) * rank.element
        return Deferred(kept, reads=not whole, rise=memory.outer(rank, words, rank.width))

    def value_bytes(self, at: At) -> Mapping[str, int]:
        rank, tokens = at.rank, int(at.tokens)
        number = rank.width * rank.element
        stat = 2 * tokens * rank.main
        sizes = {"n": int(at.held) * number, "n_all": tokens * number, "stat": stat, "stats": stat * rank.tp}
        return {self.prefix + name: size for name, size in sizes.items()}
