"""A program: one training step as a list of instructions, the same on every rank.  No torch, no rank, no clock.

An instruction reads and writes named values.  `rows.2.0` is `rows` of layer 2, part 0; `-` stands for no layer.

- `h.2.0'` is the gradient of `h.2.0`.  It may have several writers, which add up; its reader comes after them all.
- `#order.2.0` has no gradient.
- `rows>.2.0` is `rows.2.0` on the wire.
- A parameter group (`dense.2`) is a value too: forward reads it, backward adds to `dense.2'`.

Under tensor parallelism a value is either cut along the tokens or copied, and what flows back for a copied one is a
*part* of its gradient: the sum over tp is the whole.  So a sum over tp mirrors itself, gather mirrors scatter, and all
parameters that are copied over tp are summed over it, whatever the layout of activations.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import lru_cache

VERDICT = "#verdict.-.0"  # what all ranks know before they update


class Kind(Enum):
    __hash__ = object.__hash__  # instructions are hashed often, and Enum's own is slow

    COMPUTE = auto()
    START = auto()  # something goes on the wire
    WAIT = auto()  # it has arrived; every wait is an instruction


class Op(Enum):
    """What is sent."""

    __hash__ = object.__hash__

    TOKENS = auto()  # uneven all-to-all of rows; its mirror is the same with the sizes swapped
    COUNTS = auto()  # all-to-all of split sizes; the host needs the result
    EVEN = auto()  # all-to-all of equal parts along the first dimension; its mirror is the same
    GATHER = auto()  # all-gather along the first dimension; mirror: SCATTER
    SCATTER = auto()  # reduce-scatter along the first dimension; mirror: GATHER
    SUM = auto()  # all-reduce of a value; mirror: SUM
    MAX = auto()  # all-reduce of a value without gradient: the largest
    GRADS = auto()  # a piece of a gradient bucket: all-reduce, or reduce-scatter where the bucket is sharded
    PARAMS = auto()  # a piece of a sharded bucket's parameters: all-gather
    SEND = auto()  # to the neighbour in a pipeline, one rank to one other; mirror: RECV
    RECV = auto()  # from the neighbour; mirror: SEND


MIRRORED_OP = {Op.GATHER: Op.SCATTER, Op.SCATTER: Op.GATHER, Op.SEND: Op.RECV, Op.RECV: Op.SEND}
MOVABLE = (Op.GRADS, Op.PARAMS)  # of buckets: nothing that is computed in this pass waits for them


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a program."""

    phase: str  # F forward; B backward; W weights' gradients that B left out; U without autograd: sizes, seeds, norm, update
    kind: Kind
    name: str  # which function, which exchange, which bucket
    layer: int = -1
    part: str = "0"  # which micro-batch, or slice of it
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()  # those with a gradient come first
    uses: tuple[str, ...] = ()  # parameter groups
    op: Op | None = None  # of START and WAIT
    axis: str = ""  # START and WAIT: the axis of the mesh along which it is sent
    piece: tuple[int, int] = (0, 0)  # GRADS, PARAMS: elements of the bucket (of several, "a+b", all of each)
    recompute: bool = False  # activations are dropped after forward and computed again in backward
    share: float = 1.0  # how much of a micro-batch the part is
    chunk: tuple[int, int] = (0, 1)  # chunk c of n of the part's rows; of COUNTS: all n
    yields_to: tuple[Op, ...] = ()  # START: held back here while one of these is under way on this rank
    late: bool = False  # backward leaves out the products that give weights' gradients: they are an instruction of their own
    credit: int = 0  # START: held back here while so many of its axis are under way on this rank; 0: never

    @property
    def key(self) -> tuple[str, int, str]:
        """The same for a forward instruction and its mirror."""
        return self.name, self.layer, self.part

    @property
    def tag(self) -> str:
        """For people: `F:dispatch>.2.0`."""
        arrow = {Kind.START: ">", Kind.WAIT: "<"}.get(self.kind, "")
        layer = "-" if self.layer < 0 else str(self.layer)
        cut = f"[{self.piece[0]}:{self.piece[1]}]" if self.piece[1] else ""
        return f"{self.phase}:{self.name}{arrow}.{layer}.{self.part}{cut}"

    @property
    def timed_as(self) -> str:
        """The same for instructions that take as long, shares and chunks aside: `W:experts`, `B:combine>`."""
        return f"{self.phase}:{self.name}{'>' if self.kind is Kind.START else '<' if self.kind is Kind.WAIT else ''}"

    @property
    def carries_tokens(self) -> bool:
        """Whether tokens go to experts, or come back: routed ones by all-to-all; or all of them, gathered and summed along ep."""
        return self.op is Op.TOKENS or (self.axis == "ep" and self.op in MIRRORED_OP)

    @property
    def traffic(self) -> Op | None:
        """What it counts as for those that yield: tokens are tokens, whichever collective sends them."""
        return Op.TOKENS if self.carries_tokens else self.op

    @property
    def outward(self) -> bool:
        """Of an exchange of tokens: whether it goes to the experts, else it brings back.  In backward, combine's gradients go."""
        return (self.name == "dispatch") == (self.phase == "F")

    @property
    def buckets(self) -> tuple[str, ...]:
        """GRADS, PARAMS: whose elements are sent; several, whole and side by side in memory, may go as one."""
        return tuple(self.name.split("+"))


Program = tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices in a bucket that are updated as wholes, one after another, row by row: of one parameter, all alike."""

    start: int  # the first one's first element
    count: int
    rows: int  # here
    columns: int
    cut: int = -1  # the dimension along which tp cuts them, and along which they are gathered; -1: they are whole here

    @property
    def numel(self) -> int:
        """Of one."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        return self.start + self.count * self.numel

    def inside(self, start: int, stop: int) -> "Matrices | None":
        """Those that lie between two elements, neither of which is inside of one."""
        first = max(0, -(-(start - self.start) // self.numel))
        last = min(self.count, (stop - self.start) // self.numel)
        return replace(self, start=self.start + first * self.numel, count=last - first) if first < last else None


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """What a program must know about a flat bucket of gradients."""

    numel: int  # with padding
    axis: str  # its gradients are summed along this axis of the mesh
    sharded: bool = False  # ZeRO-1
    piece: int | None = None  # it goes on the wire in pieces of at most so many elements; shards belong to pieces
    matrices: tuple[Matrices, ...] = ()  # what the optimizer takes as whole matrices
    shares: tuple[tuple[int, int], ...] = ()  # of each rank, where shards are whole matrices; (): even parts of pieces

    @property
    def is_gathered(self) -> bool:
        """Whether some of its matrices are cut by tp, and gathered to be updated."""
        return any(m.cut >= 0 for m in self.matrices)

    def owned(self, ranks: int) -> int:
        """Elements that a rank of so many updates, the one with the most."""
        if self.shares:
            return max(stop - start for start, stop in self.shares)
        return self.numel // ranks if self.sharded else self.numel

    @property
    def busy(self) -> float:
        """The share of its ranks that update anything of it; whose turn it is goes round from layer to layer."""
        return sum(start < stop for start, stop in self.shares) / len(self.shares) if self.shares else 1.0

    def own_matrices(self, rank: int) -> tuple[Matrices, ...]:
        """Those that a rank of the axis updates."""
        start, stop = self.shares[rank] if self.shares else (0, self.numel)
        return tuple(own for m in self.matrices if (own := m.inside(start, stop)) is not None)


@lru_cache(maxsize=256)
def most_matrices(bucket: BucketSpec) -> tuple[Matrices, ...]:
    """Those of the rank that updates the most elements of them."""
    return max(map(bucket.own_matrices, range(len(bucket.shares) or 1)), key=lambda of: sum(m.count * m.numel for m in of))


def has_gradient(value: str) -> bool:
    return value[0] != "#"


def gradient(value: str) -> str:
    return value + "'"


def is_mirrored(instruction: Instruction) -> bool:
    """Whether a forward instruction has a backward instruction."""
    gives = any(map(has_gradient, instruction.writes)) or instruction.op is Op.SEND  # whose WAIT writes nothing
    return instruction.phase == "F" and instruction.op is not Op.PARAMS and gives


def mirror(instruction: Instruction) -> Instruction:
    """The backward instruction: reads and writes swap, so the exchange that was waited for is the one that starts."""
    late = (f"#late {instruction.name}.{instruction.layer}.{instruction.part}",) if instruction.late else ()
    swap = {Kind.START: Kind.WAIT, Kind.WAIT: Kind.START, Kind.COMPUTE: Kind.COMPUTE}
    return replace(
        instruction,
        phase="B",
        kind=swap[instruction.kind],
        op=MIRRORED_OP.get(instruction.op, instruction.op) if instruction.op else None,
        reads=tuple(gradient(v) for v in instruction.writes if has_gradient(v))
        + tuple(v for v in instruction.reads if not has_gradient(v)),
        writes=tuple(gradient(v) for v in instruction.reads if has_gradient(v)) + late,
    )


def weights_of(instruction: Instruction) -> Instruction:
    """What a forward instruction whose weights are late leaves to be done after its mirror."""
    reads = tuple(v for v in mirror(instruction).writes if not has_gradient(v))
    return replace(instruction, phase="W", reads=reads, writes=())


def joined_weights(weights: Iterable[Instruction]) -> Program:
    """Of `weights_of`, one instruction for all that give the gradients of the same weights: a part's name is then "0+1"."""
    of: dict[tuple[str, int], list[Instruction]] = defaultdict(list)
    for weight in weights:
        of[weight.name, weight.layer].append(weight)
    return tuple(_joined(parts) if len(parts) > 1 else parts[0] for parts in of.values())


def _joined(parts: Sequence[Instruction]) -> Instruction:
    reads = tuple(v for s in parts for v in s.reads)
    share = sum(s.share / s.chunk[1] for s in parts)
    return replace(parts[0], part="+".join(s.part for s in parts), reads=reads, share=share, chunk=(0, 1))


def parts_of(weights: Instruction) -> tuple[str, ...]:
    """Whose gradients an instruction of phase W gives."""
    return tuple(weights.part.split("+"))


def backward(forward: Program) -> Program:
    return tuple(mirror(s) for s in reversed(forward) if is_mirrored(s))


def reads_of(instruction: Instruction) -> tuple[str, ...]:
    """All that an instruction needs: values, parameters, and what its forward instruction kept."""
    kept = (f"kept {instruction.key}",) if instruction.phase == "B" and instruction.kind is Kind.COMPUTE else ()
    return instruction.reads + kept + (instruction.uses if instruction.phase in "FB" else ())  # W needs no weights


def writes_of(instruction: Instruction) -> tuple[str, ...]:
    """All that an instruction leaves behind: values, what it keeps for backward, gradients of parameters."""
    kept = (f"kept {instruction.key}",) if instruction.phase == "F" and instruction.kind is Kind.COMPUTE else ()
    return instruction.writes + kept + (tuple(map(gradient, instruction.uses)) if instruction.phase in "BW" else ())


def shares_of(program: Program) -> dict[str, float]:
    """By tag: of which share of a micro-batch an instruction is, of those that compute or send tokens."""
    timed = (s for s in program if s.kind is Kind.COMPUTE or (s.kind is Kind.START and s.carries_tokens))
    return {s.tag: s.share / s.chunk[1] for s in timed}


def check(program: Program, given: Collection[str], buckets: Mapping[str, BucketSpec]) -> None:
    """Raise ValueError unless the step is complete and in order.

    A program that passes can't deadlock: every rank holds this very list, so each group's collectives start in one
    order, and every wait is for something started before.  What `yields_to` and `credit` hold back at run time keeps its
    order too, and what it is held back for (tokens) is never held back itself.  `given`: values that exist before the step,
    parameter groups among them.  Without backward instructions (evaluation) only order and waits are checked.
    """
    writers: dict[str, list[int]] = defaultdict(list)
    for i, instruction in enumerate(program):
        for value in writes_of(instruction):
            writers[value].append(i)
    _check_order(program, given, writers)
    _check_waits(program)
    _check_yields(program)
    if any(s.phase == "B" for s in program):
        _check_backward(program)
        _check_buckets(program, buckets)
        _check_matrices(program, buckets)


def _check_order(program: Program, given: Collection[str], writers: Mapping[str, list[int]]) -> None:
    read = {value for instruction in program for value in reads_of(instruction)}
    if unread := sorted(set(given) - read):
        raise ValueError(f"nobody reads {', '.join(unread)}: part of the step's data, or of its parameters, would be left out")
    for i, instruction in enumerate(program):
        for value in reads_of(instruction):
            places = writers.get(value, ())
            if not places and value not in given:
                raise ValueError(f"{instruction.tag} reads {value}, which nobody writes")
            if places and places[-1] >= i:
                late = [program[j].tag for j in places if j >= i]
                raise ValueError(f"{instruction.tag} reads {value} before it is written by {', '.join(late)}")
    for value, places in writers.items():
        if len(places) > 1 and not _may_have_many_writers(value, program[places[0]]):
            raise ValueError(f"{value} is written by {', '.join(program[i].tag for i in places)}; only gradients add up")
    seen: set[tuple] = set()
    for instruction in program:
        same = (instruction.phase, instruction.kind, instruction.op, instruction.key, instruction.piece)
        if same in seen:
            raise ValueError(f"{instruction.tag} occurs twice")
        seen.add(same)


def _may_have_many_writers(value: str, first: Instruction) -> bool:
    return "'" in value or first.op in (Op.GRADS, Op.PARAMS)


def _check_waits(program: Program) -> None:
    """What is sent is awaited, by an instruction that says the same of it."""
    lost = {s.writes[0]: s for s in program if s.kind is Kind.START}
    for wait in (s for s in program if s.kind is Kind.WAIT):
        start = lost.pop(wait.reads[0], None)
        if start is None:
            raise ValueError(f"{wait.tag} waits for {wait.reads[0]}, which is not on the wire")
        if _sent(start) != _sent(wait):
            raise ValueError(f"{wait.tag} waits for something else than {start.tag} sends: {_sent(wait)}, {_sent(start)}")
    if lost:
        raise ValueError(f"nobody waits for {', '.join(s.tag for s in lost.values())}")


def _sent(instruction: Instruction) -> tuple[str | int | tuple[int, int] | Op | None, ...]:
    """Of a START or WAIT: what is sent, and along which axis."""
    return instruction.phase, instruction.op, instruction.axis, *instruction.key, instruction.piece, instruction.chunk


def _check_yields(program: Program) -> None:
    """Only gradients and parameters yield, and to nothing that shares a lane with what yields, or stands behind it: else two
    ranks could wait for one another."""
    yielding = [s for s in program if s.yields_to]
    lanes = {s.axis for s in yielding}
    shared = {Op.GRADS, Op.PARAMS} | {s.traffic for s in program if s.kind is Kind.START and s.axis in lanes}
    if Op.COUNTS in shared:  # tokens wait for their sizes
        shared.add(Op.TOKENS)
    bad = [s for s in yielding if s.kind is not Kind.START or s.op not in MOVABLE or shared & set(s.yields_to)]
    bad += [s for s in program if s.credit and s.kind is Kind.COMPUTE]
    if bad:
        raise ValueError(f"may not be held back: {', '.join(s.tag for s in bad)}")


def _check_backward(program: Program) -> None:
    present = {(s.kind, s.key): s for s in program if s.phase == "B" and s.op not in MOVABLE}
    for instruction in filter(is_mirrored, program):
        want = mirror(instruction)
        found = present.pop((want.kind, want.key), None)
        if found is None:
            raise ValueError(f"no backward for {instruction.tag}")
        if (found if found.credit == want.credit else replace(found, credit=want.credit)) != want:
            raise ValueError(f"{found.tag} is not the mirror of {instruction.tag}: {found}")
    if present:
        raise ValueError(f"backward without forward: {', '.join(s.tag for s in present.values())}")
    late, left = {s.key: weights_of(s) for s in program if s.late and s.phase == "F"}, {s for s in program if s.phase == "W"}
    for instruction in sorted(left, key=lambda s: s.tag):
        own = [late.pop((instruction.name, instruction.layer, part), None) for part in parts_of(instruction)]
        parts = [s for s in own if s is not None]
        if parts != own or joined_weights(parts) != (instruction,):
            raise ValueError(f"{instruction.tag} isn't what backward leaves out of {_tags(parts) or 'any instruction'}, once")
    if late:
        raise ValueError(f"no instruction computes these deferred gradients of weights: {_tags(late.values())}")
    updated = {s.name for s in program if s.phase == "U" and s.kind is Kind.COMPUTE}
    if idle := {f"update {u}" for s in program for u in s.uses} - updated:
        raise ValueError(f"missing: {', '.join(sorted(idle))}")


def _tags(instructions: Collection[Instruction]) -> str:
    return ", ".join(sorted(s.tag for s in instructions))


def _check_buckets(program: Program, buckets: Mapping[str, BucketSpec]) -> None:
    starts_of: dict[tuple[Op, str], list[Instruction]] = defaultdict(list)
    for instruction in program:
        if instruction.op in MOVABLE and instruction.kind is Kind.START:
            for name in dict.fromkeys(instruction.buckets):
                starts_of[instruction.op, name].append(instruction)
    for op in MOVABLE:
        for name, bucket in buckets.items():
            if op is Op.PARAMS and not bucket.sharded:
                continue
            starts = starts_of[op, name]
            if any(s.axis != bucket.axis for s in starts):
                raise ValueError(f"{op.name} of {name} must go along axis {bucket.axis}: {', '.join(s.tag for s in starts)}")
            for s in starts:
                if s.name != name and s.piece != (0, sum(buckets[b].numel for b in s.buckets)):
                    raise ValueError(f"{s.tag} must be of all elements of all its buckets")
            pieces = sorted(s.piece if s.name == name else (0, bucket.numel) for s in starts)
            ends = [0, *(stop for _, stop in pieces)]
            if [start for start, _ in pieces] != ends[:-1] or ends[-1] != bucket.numel:
                raise ValueError(f"{op.name} of {name} ({bucket.numel} elements) does not go out exactly once: {pieces}")
            size = bucket.piece or bucket.numel
            if bucket.sharded and not bucket.shares and any(start % size or stop - start > size for start, stop in pieces):
                raise ValueError(f"{op.name} of {name}: shards belong to pieces of {size} elements, not {pieces}")


def _check_matrices(program: Program, buckets: Mapping[str, BucketSpec]) -> None:
    """No shard cuts a matrix, and an update has the directions of its matrices, which are of the summed gradients."""
    by_name = {s.name: s for s in program if s.phase == "U" and s.kind is Kind.COMPUTE}
    for name, bucket in buckets.items():
        _check_shares(name, bucket)
        if not bucket.matrices:
            continue
        update, orthogonal = by_name.get(f"update {name}"), by_name.get(f"newton_schulz {name}")
        needed = {f"{gradient(name)}sum", *([f"#whole {name}"] if bucket.is_gathered else [])}
        if orthogonal is None or not needed <= set(orthogonal.reads) or orthogonal.writes != (direction_of(name),):
            raise ValueError(f"nothing makes the directions of {name}'s matrices of {', '.join(sorted(needed))}")
        if update is None or direction_of(name) not in update.reads:
            raise ValueError(f"the update of {name} does not wait for the directions of its matrices")


def _check_shares(name: str, bucket: BucketSpec) -> None:
    if not bucket.shares:
        return
    ends = [0, *(stop for _, stop in bucket.shares)]
    if [start for start, _ in bucket.shares] != ends[:-1] or ends[-1] != bucket.numel or sorted(ends) != ends:
        raise ValueError(f"shards of {name} ({bucket.numel} elements) don't tile it: {bucket.shares}")
    for m in bucket.matrices:
        if cut := [end for end in ends if m.start < end < m.stop and (end - m.start) % m.numel]:
            raise ValueError(f"a shard of {name} ends at {cut[0]}, inside of a matrix of {m.rows} x {m.columns} elements")


def direction_of(bucket: str) -> str:
    """The value that stands for where an update takes a bucket's matrices."""
    return f"#direction {bucket}"
