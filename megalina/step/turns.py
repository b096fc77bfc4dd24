"""Turns: programs that need little of one another are woven into one, so that one computes while another's tokens travel."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest

from megalina.step.program import Instruction, Kind, Op, Program, backward

Ends = Callable[[Instruction], bool]  # whether a turn ends behind an instruction


def sends(instruction: Instruction) -> bool:
    """Anything: what follows can wait while another part computes.  Not COUNTS: that would put a part's dispatch behind the other
    part's attention."""
    return instruction.kind is Kind.START and instruction.op is not Op.COUNTS


def sends_tokens(instruction: Instruction) -> bool:
    return instruction.kind is Kind.START and instruction.carries_tokens


def segments(instructions: Iterable[Instruction], ends: Ends = sends) -> list[list[Instruction]]:
    """Cut into turns."""
    out: list[list[Instruction]] = [[]]
    for instruction in instructions:
        out[-1].append(instruction)
        if ends(instruction):
            out.append([])
    return out


def interleave(parts: Sequence[Program], ends: Ends = sends) -> Program:
    """Parts take turns, what is left of the longer ones comes last (FlowMoE; Lancet, section 5): one is in attention or experts
    while another's tokens are on the wire."""
    if len(parts) == 1:
        return parts[0]
    turns = zip_longest(*(segments(part, ends) for part in parts), fillvalue=[])
    return one_at_a_time(s for turn in turns for segment in turn for s in segment)


def there_and_back(parts: Sequence[Program], between: Sequence[Program]) -> Program:
    """Forward and backward of three parts or more in turns, of which each turns round by itself, the first one first.

    To turn round is what a part does behind the last exchange of its forward pass, `between` of it (its seed), and what starts
    its backward pass.  That stands behind the next part's turn, as soon as its tokens can be there, and that of the last two
    behind the first part's next turn: so something is computed while the last tokens of forward and the first ones of backward
    travel.  Were all of backward the mirror of all of forward, a step would wait there for two exchanges, as it does with two
    parts."""
    forward = [segments(part) for part in parts]
    backwards = [segments(backward(part)) for part in parts]
    rounds = [[*f[-1], *seed, *b[0]] for f, seed, b in zip(forward, between, backwards, strict=True)]
    no_turn = [[list[Instruction]()] * len(parts)]  # without exchanges there are no others
    *there, last = list(zip(*(f[:-1] for f in forward), strict=True)) or no_turn
    first, *back = list(zip(*(b[1:] for b in backwards), strict=True)) or no_turn
    turning = [
        last[0],
        *(s for both in zip(last[1:-1], rounds, strict=False) for s in both),
        last[-1],
        first[0],
        *rounds[-2:],
        *first[1:],
    ]
    turns = (*(s for turn in there for s in turn), *turning, *(s for turn in back for s in turn))
    return one_at_a_time(instruction for turn in turns for instruction in turn)


def one_at_a_time(instructions: Iterable[Instruction]) -> Program:
    """All-to-alls one after another: at once they'd all end late."""
    return tuple(replace(s, credit=1) if s.carries_tokens else s for s in instructions)


def side_with_side(backward: Program, forward: Program) -> Program:
    """Backward of one micro-batch and forward of another, which need nothing of one another (Megatron-LM's combined 1F1B,
    `core/models/common/model_chunk_schedule_plan.py`): layer f's forward meets the backward of the f-th layer from the end.

    Turns end where tokens start to travel, and there alone: a turn that ended at another START, or at a WAIT, would lose what
    hides what.  Backward's comes first, since its first turn is short."""
    return interleave((backward, forward), sends_tokens)


def paired(step: Program) -> Program:
    """A step (`megalina.step.passes.step`) in which each backward pass goes side with side with the forward pass behind it.

    The first forward pass and the last backward pass have nobody to go with, so of m passes a share of (m - 1) / m is paired, and
    with one nothing is.  Backward passes keep their order, and gradients with it all bits of their sums."""
    sizes, first, *rest = (tuple(run) for _, run in groupby(step, _is_forward))
    *pairs, last = zip(rest[::2], [*rest[1::2], ()], strict=True)
    return (*sizes, *first, *(s for backward, forward in pairs for s in side_with_side(backward, forward)), *last[0])


def _is_forward(instruction: Instruction) -> bool:
    return instruction.phase == "F" or instruction.name == "sizes_of_group"
