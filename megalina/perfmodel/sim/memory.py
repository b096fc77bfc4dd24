"""The memory of one rank in a step: the very program, walked as the executor runs it, with bytes in place of tensors.

A value lives from its write to its last read; a forward instruction keeps what its mirror needs; what is on the wire holds its
buffers until it is awaited.  The same memory may be held several times (a value that is also kept; an exchange with nobody
to talk to gives back what it got): it counts once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from megalina.step.program import Instruction, Kind, Op, Program, has_gradient

VIEWS = (("F", "cut_tokens"), ("B", "join_tokens"))


class Deferred(Protocol):
    """Which values stay for the gradients of weights."""

    @property
    def reads(self) -> bool:
        """Those that the forward instruction read."""
        ...

    @property
    def gradients(self) -> bool:
        """The gradients of those that it wrote."""
        ...


class Sizes(Protocol):
    """What a rank's numbers are, by name; `megalina/perfmodel/cost/instruction_bytes.py` has them of a configuration."""

    @property
    def state(self) -> Mapping[str, int]:
        """What is there throughout: weights, gradients, optimizer, batches."""
        ...

    def ranks(self, axis: str) -> int: ...

    def value(self, name: str, instruction: Instruction) -> int:
        """Bytes of a value; `instruction` writes it, or its share and chunk are the writer's."""
        ...

    def bucket(self, instruction: Instruction) -> int:
        """GRADS, PARAMS: bytes that START sets aside."""
        ...

    def kept(self, instruction: Instruction) -> int:
        """Bytes that a forward instruction keeps for its mirror, besides the values that it reads."""
        ...

    def keeps(self, instruction: Instruction) -> tuple[str, ...]:
        """Those of its results that a forward instruction keeps, too."""
        ...

    def deferred(self, instruction: Instruction) -> Deferred:
        """What stays for weights' gradients that an instruction of backward leaves out; the bytes are those of its value."""
        ...

    def rise(self, instruction: Instruction) -> int:
        """Bytes of the most memory inside a compute instruction above what there was before, its results among it."""
        ...

    def received(self, instruction: Instruction, sent: int, arrives: int) -> int:
        """Bytes of the buffer beside what is sent, of which there are `sent`; `arrives`: of what comes of it."""
        ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank at the moment of a step when there are most."""

    state: Mapping[str, int]  # there throughout: weights, gradients, master weights, moments, batches
    kept: Mapping[str, int]  # for backward, by the name of the forward instruction
    values: int  # activations and their gradients that later instructions read
    wire: int  # what exchanges hold besides: send and receive buffers
    working: int  # inside the instruction of the peak
    instruction: str  # tag of this instruction

    @property
    def peak(self) -> int:
        return sum(self.rows().values())

    def rows(self) -> dict[str, int]:
        """What, in words -> bytes; the sum is the peak."""
        kept = {f"kept by {name}": size for name, size in sorted(self.kept.items(), key=lambda k: -k[1]) if size}
        return {**self.state, **kept, "values": self.values, "on the wire": self.wire, f"inside {self.instruction}": self.working}


@dataclass(slots=True, eq=False)
class _Block:
    """Memory that is held as a whole."""

    bytes: int
    holders: int = 0


class _Walk:
    """Who holds what, instruction by instruction."""

    def __init__(self, program: Program, sizes: Sizes):
        self._program, self._sizes = program, sizes
        self._graph = any(s.phase == "B" for s in program)
        self._arrives = {s.reads[0]: s for s in program if s.kind is Kind.WAIT}
        self._last = {v: i for i, s in enumerate(program) for v in s.reads}
        self.values: dict[str, list[_Block]] = {}
        self.wire: dict[str, list[_Block]] = {}
        self.kept: dict[tuple[str, int, str], list[_Block]] = {}
        self._read: dict[tuple[str, int, str], list[_Block]] = {}  # by forward instructions whose weights are late
        self.bytes = 0

    def peaks(self) -> Iterator[tuple[int, Instruction]]:
        """The most bytes during each instruction; at that time what it reads is held still, and what it writes already."""
        run = {Kind.COMPUTE: self._compute, Kind.START: self._start, Kind.WAIT: self._wait}
        for i, instruction in enumerate(self._program):
            inside = self.bytes + (self._sizes.rise(instruction) if instruction.kind is Kind.COMPUTE else 0)
            if instruction.phase == "W" and len(instruction.reads) > 1:  # rows of several parts are copied, at most all at once
                inside += sum({id(b): b.bytes for v in instruction.reads for b in self.values[v]}.values())
            replaced = run[instruction.kind](instruction)
            yield max(inside, self.bytes + replaced), instruction
            if instruction.kind is Kind.COMPUTE and instruction.phase == "B":
                self._drop(self.kept.pop(instruction.key))
            for value in dict.fromkeys(v for v in instruction.reads if self._last[v] == i):
                for holders in (self.values, self.wire):
                    self._drop(holders.pop(value, []))

    # what an instruction makes; each returns the bytes that are gone again at its end
    def _compute(self, instruction: Instruction) -> int:
        sizes = [self._sizes.value(name, instruction) for name in instruction.writes]
        parts = (instruction.phase, instruction.name) in (("F", "cut"), ("B", "join"))  # its results are parts of one tensor
        blocks = [_Block(sum(sizes))] * len(sizes) if parts else [_Block(size) for size in sizes]
        if (instruction.phase, instruction.name) in VIEWS:  # parts of what is there already
            number = len(sizes) // len(instruction.reads)
            blocks = [self.values[v][0] for v in instruction.reads for _ in range(number)]
        replaced = 0
        for name, block in zip(instruction.writes, blocks, strict=True):
            replaced += self._write(name, [block, *(self._deferred(instruction) if name.startswith("#late") else ())])
        if self._graph and instruction.phase == "F" and any(map(has_gradient, instruction.writes)):
            same = () if instruction.recompute else self._sizes.keeps(instruction)
            read = [block for value in instruction.reads for block in self.values.get(value, ())]
            if instruction.late:
                self._read[instruction.key] = read
            held = [*read, *(block for value in same for block in self.values.get(value, ()))]
            self.kept[instruction.key] = self._hold(
                [*held, _Block(0 if instruction.recompute else self._sizes.kept(instruction))]
            )
        return replaced

    def _deferred(self, instruction: Instruction) -> Iterator[_Block]:
        """Of a mirror that leaves out its weights' gradients: which values stay for them."""
        stays = self._sizes.deferred(instruction)
        if stays.reads:
            yield from self._read.pop(instruction.key)
        if stays.gradients:
            yield from (block for value in instruction.reads if has_gradient(value) for block in self.values[value])

    def _start(self, instruction: Instruction) -> int:
        sizes, wire = self._sizes, instruction.writes[0]
        if instruction.op is Op.RECV:
            arrival = self._arrives[wire]
            self.wire[wire] = self._hold([_Block(sizes.value(arrival.writes[0], arrival))])
            return 0
        held = self.values.get(instruction.reads[0], [])
        if instruction.op in (Op.GRADS, Op.PARAMS):
            held = [_Block(sizes.bucket(instruction))]
        elif instruction.op is Op.COUNTS:
            held = []  # a number an expert
        elif instruction.op is not Op.SEND and sizes.ranks(instruction.axis) > 1:
            arrival = self._arrives[wire]
            buffer = sizes.received(
                instruction, sizes.value(instruction.reads[0], instruction), sizes.value(arrival.writes[0], arrival)
            )
            held = [_Block(buffer), *(held if instruction.op not in (Op.SUM, Op.MAX) else [])]  # a sum is taken in a copy
        self.wire[wire] = self._hold(held)
        return 0

    def _wait(self, instruction: Instruction) -> int:
        if instruction.op in (Op.GRADS, Op.PARAMS, Op.SEND):
            return 0  # it is in the bucket, or gone
        held, size = self.wire[instruction.reads[0]], self._sizes.value(instruction.writes[0], instruction)
        if instruction.op is not Op.RECV and (self._sizes.ranks(instruction.axis) > 1 or instruction.op is Op.COUNTS):
            made = instruction.op is Op.COUNTS or held[0].bytes > size  # a scatter whose buffer has all ranks' parts
            held = [_Block(size)] if made else held[:1]
        return self._write(instruction.writes[0], held)

    def _write(self, name: str, blocks: list[_Block]) -> int:
        """Gradients add up, in new memory: what was there and what comes are there too until that is done."""
        old = self.values.get(name, [])
        new = [_Block(sum(b.bytes for b in blocks))] if old else blocks
        self.values[name] = self._hold(new)
        self._drop(old)
        return sum(b.bytes for b in (*old, *(b for b in blocks if not b.holders))) if old else 0

    def _hold(self, blocks: Sequence[_Block]) -> list[_Block]:
        for block in blocks:
            self.bytes += 0 if block.holders else block.bytes
            block.holders += 1
        return list(blocks)

    def _drop(self, blocks: Sequence[_Block]) -> None:
        for block in blocks:
            block.holders -= 1
            self.bytes -= 0 if block.holders else block.bytes


def peak_of(sizes: Sizes, program: Program) -> tuple[int, int]:
    """`Memory.peak` of a step of this program, and the number of the instruction where it is."""
    peaks = [size for size, _ in _Walk(program, sizes).peaks()]
    most = max(peaks)
    return sum(sizes.state.values()) + most, peaks.index(most)


def memory_of(sizes: Sizes, program: Program, *, at: int | None = None) -> Memory:
    """The peak of a step of this program, and what it is made of.  `at`: number of the instruction where it is, if that is known.

    Of an evaluation, and of forward instructions with recompute, what is inside an instruction is an upper bound: without a
    graph some of it goes earlier."""
    at = peak_of(sizes, program)[1] if at is None else at
    walk = _Walk(program, sizes)
    peak, instruction = next(islice(walk.peaks(), at, None))
    counted: set[int] = set()

    def more(blocks: Sequence[_Block]) -> int:
        new = {id(block): block.bytes for block in blocks if id(block) not in counted}
        counted.update(new)
        return sum(new.values())

    kept: dict[str, int] = {}
    for (name, _, _), blocks in walk.kept.items():
        kept[name] = kept.get(name, 0) + more(blocks)
    values, wire = (sum(map(more, holders.values())) for holders in (walk.values, walk.wire))
    return Memory(sizes.state, kept, values, wire, peak - sum(kept.values()) - values - wire, instruction.tag)


def by_instruction(sizes: Sizes, program: Program) -> list[tuple[Instruction, int]]:
    """The most bytes during each instruction, what is there throughout included."""
    always = sum(sizes.state.values())
    return [(instruction, always + peak) for peak, instruction in _Walk(program, sizes).peaks()]
