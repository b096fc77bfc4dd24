"""The numbers of one rank that blocks count with: of its model, its layout, and of the tokens and rows of one instruction.

Rows are those of routing without drops: a rank sends `top_k` of a token (fewer where capacity is below one), gets as many on
average, and `skew` times as many where its experts are the fullest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megalina.config import BYTES, PretrainConfig
from megalina.step.program import Instruction

INT_BYTES = 8  # of an index
LIMBS = 2  # numbers that make up one digest
NEARNESS_BINS = 512  # of [0, 1], in which cosines between tokens and their experts' rows are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Of all instructions.  All ranks are taken to be alike."""

    config: PretrainConfig
    ep: float  # ranks that share out the experts; packing counted in
    vocab_rows: int  # of the output matrix, over all ranks
    padded: bool = False  # some of those rows are no words
    skew_L: Sequence[float] = ()  # rows that a rank gets over the mean, of each layer; (): 1
    expert_skew_L: Sequence[float] = ()  # rows of its fullest expert over the mean of its experts
    cuda: bool = False  # kernels of a GPU and not of a CPU
    tp: int = field(init=False)
    cp: int = field(init=False)
    element: int = field(init=False)  # bytes of a number
    main: int = field(init=False)  # bytes of gradients, master weights and moments, and of what routers compute with
    words: float = field(init=False)

    def __post_init__(self) -> None:
        tp, cp, element = self.config.parallel.tp, self.config.parallel.cp, BYTES[self.config.train.dtype]
        found = {"tp": tp, "cp": cp, "element": element, "main": max(element, 4), "words": self.vocab_rows / tp}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def mixed(self) -> bool:
        """Numbers are narrower than gradients."""
        return self.element < self.main

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return self.config.model.d_model

    @property
    def shares_tokens(self) -> bool:
        """Whether other ranks have tokens of the same micro-batch."""
        return self.tp * self.cp > 1

    @property
    def seq_len(self) -> int:
        """Of whole sequences."""
        return self.config.train.seq_len

    def at(self, instruction: Instruction, *, load: float = 1.0) -> "At":
        """`load`: rows of the experts here as a multiple of the mean."""
        return At(self, instruction, load)

    def shapes(self, instruction: Instruction) -> "At":
        """The same in whole tokens and rows, for what is held in memory."""
        return At(self, instruction, 1.0, round)


@dataclass(frozen=True, slots=True)
class At:
    """Of one instruction."""

    rank: Rank
    instruction: Instruction
    load: float = 1.0
    whole: Callable[[float], float] = float  # `round` for numbers of things

    @property
    def name(self) -> str:
        return self.instruction.name

    @property
    def layer(self) -> int:
        return self.instruction.layer

    @property
    def all_tokens(self) -> float:
        """Of the part of a micro-batch, those that other ranks of cp have, too."""
        train = self.rank.config.train
        return self.whole(self.instruction.share * train.micro_batch_size * train.seq_len)

    @property
    def tokens(self) -> float:
        """Of the part of a micro-batch, with cp of this rank's part of its sequences."""
        return self.all_tokens // self.rank.cp if self.whole is round else self.all_tokens / self.rank.cp

    @property
    def held(self) -> float:
        """Tokens whose activations a rank has between attention and MLP."""
        cut = self.rank.tp if self.rank.config.parallel.sequence else 1
        return self._divided(cut)

    @property
    def own(self) -> float:
        """Tokens that a rank routes."""
        return self._divided(self.rank.tp)

    def _divided(self, ways: int) -> float:
        return self.tokens // ways if self.whole is round else self.tokens / ways

    @property
    def top_k(self) -> int:
        return self.rank.config.router.top_k
