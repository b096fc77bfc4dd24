"""Turns: programs that need little of one another are woven into one, so that one computes while another's tokens travel."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest

from megalina.step.program import Instruction, Kind, Op, Program

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
    while another's tokens are on the wire.  All-to-alls go one after another: at once they'd all end late."""
    if len(parts) == 1:
        return parts[0]
    turns = zip_longest(*(segments(part, ends) for part in parts), fillvalue=[])
    instructions = (s for turn in turns for segment in turn for s in segment)
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
