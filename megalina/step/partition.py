"""Partition: ranges of the forward pass walk in parts, so that one computes while another's tokens travel (Lancet, Jiang et al.
2024, sections 2.3 and 5).

A part is some of the micro-batch's sequences.  Where a range begins and ends, values are cut into parts and joined again: an
instruction whose mirror does the opposite.  Where a router must see the whole micro-batch, ranges lie between two routers.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from megalina.step.passes import rename_part, share_group
from megalina.step.program import Instruction, Kind, Op, Program, has_gradient
from megalina.step.turns import interleave

NONE, AUTO = "none", "auto"
MOST_PARTS = 8  # Lancet, section 7: more never pay
WORDS = re.compile(r"(\w+\.\d+)\.\.(\w+\.\d+):(\d+)")
ROWS, ORDER = "rows", "#order"  # of routed tokens, which are not in the order of tokens


@dataclass(frozen=True, slots=True)
class Range:
    """Of the forward pass, in so many parts."""

    first: str  # its first instruction, `attention.0`
    last: str  # its last one
    parts: int

    def __str__(self) -> str:
        return f"{self.first}..{self.last}:{self.parts}"


def ranges_from(text: str) -> tuple[Range, ...] | int:
    """Of `strategy.partition`: ranges, as "attention.0..mix.3:2,attention.4..mix.5:4"; or a number of parts, for ranges as wide
    as routers allow.  ValueError for what is neither."""
    if text == NONE:
        return ()
    if text.isdecimal() and len(text) < 4:
        return int(text)
    found = [WORDS.fullmatch(word) for word in text.split(",")]
    if not all(found):
        raise ValueError(
            f"strategy.partition={text[:60]} must be none, auto, a number of parts, or ranges such as attention.0..mix.3:2"
        )
    return tuple(Range(match[1], match[2], int(match[3])) for match in found if match)


def most_parts(text: str) -> int:
    """1 where nothing is cut."""
    ranges = ranges_from(text)
    return ranges if isinstance(ranges, int) else max((r.parts for r in ranges), default=1)


def ranges_of(text: str, forward: Program, *, whole_routers: bool) -> tuple[Range, ...]:
    """Of `strategy.partition` for this forward pass, whose layers have counts of their own."""
    found = ranges_from(text)
    return widest(forward, found, whole_routers=whole_routers) if isinstance(found, int) else found


def widest(forward: Program, parts: int, *, whole_routers: bool) -> tuple[Range, ...]:
    """The widest ranges: all layers; with `whole_routers` from behind each router to the next layer that has one."""
    layers = [i for i, s in enumerate(forward) if s.layer >= 0]
    routers = [i for i in layers if routes(forward[i])]
    if parts == 1 or not routers:
        return ()
    if not whole_routers:
        return (Range(_name(forward[layers[0]]), _name(forward[layers[-1]]), parts),)
    out = []
    for i, after in zip(routers, [*routers[1:], None], strict=True):
        end = layers[-1] if after is None else _first_of_router(forward, after) - 1
        out.append(Range(_name(forward[i + 1]), _name(forward[end]), parts))
    return tuple(out)


def _first_of_router(forward: Program, at: int) -> int:
    """Where the instructions begin that lead to the choice of experts at `at`: they all read the values of one block."""
    names = ("slice", "score", "scores")
    while forward[at - 1].layer == forward[at].layer and forward[at - 1].name in names:
        at -= 1
    return at


def routes(instruction: Instruction) -> bool:
    """Whether it is where a router says which experts get a token, or how much of it."""
    return any(v.startswith("#load.") for v in instruction.writes)


def _name(instruction: Instruction) -> str:
    return f"{instruction.name}.{instruction.layer}"


def partition(
    forward: Program,
    ranges: Sequence[Range],
    *,
    one_group: bool = False,
    whole_routers: bool = False,
    places: Sequence[tuple[int, int]] = (),
) -> Program:
    """The forward pass of part "0" with these ranges in parts, in the order of the list.

    `one_group`: the micro-batch is one group of the routers, whose parts tell one another how full experts are; `whole_routers`:
    they can't; `places`: the stage of a pipeline in which each range is, and its pipeline rank.

    ValueError for a range that isn't there, overlaps the one before it, or holds a router that needs the whole."""
    if not ranges:
        return forward
    out: list[Instruction] = []
    done, cut = 0, list[tuple[tuple[int, int], str]]()  # parts of values, and where they are
    for i, r in enumerate(ranges):
        stage, rank = places[i] if places else (0, 0)
        near = (stage, stage - 1)  # farther stages have the stream in between
        known = {v for (at, of), v in cut if of == rank and (at in near or not has_gradient(v))}
        start, stop = _bounds(forward, r)
        if start < done:
            raise ValueError(f"strategy.partition: {r} begins before the range before it ends")
        if whole_routers and any(map(routes, forward[start:stop])):
            raise ValueError(
                f"strategy.partition: in {r} a router would route part by part, and this one must see the whole micro-batch: "
                "begin ranges behind the routers, or set router.group=sequence"
            )
        out += forward[done:start]
        walked = in_parts(forward[start:stop], forward[stop:], r.parts, known, one_group=one_group)
        out += walked
        cut += (((stage, rank), v) for s in walked for v in s.writes)
        done = stop
    return _without_unread((*out, *forward[done:]))


def _without_unread(forward: Program) -> Program:
    """Without joining what nobody reads whole: the next range has as many parts, and goes on with them."""
    read = {v for s in forward for v in s.reads}
    out: list[Instruction] = []
    for s in forward:
        if s.name == "join_tokens" and (unread := [v for v in s.writes if v not in read]):
            kept, parts = [v for v in s.writes if v in read], len(s.reads) // len(s.writes)
            reads = [v for i, v in enumerate(s.reads) if s.writes[i // parts] not in unread]
            out += [replace(s, reads=tuple(reads), writes=tuple(kept))] if kept else []
        else:
            out.append(s)
    return tuple(out)


def _bounds(forward: Program, r: Range) -> tuple[int, int]:
    places = {name: [i for i, s in enumerate(forward) if _name(s) == name] for name in (r.first, r.last)}
    for name, found in places.items():
        if not found:
            raise ValueError(f"strategy.partition: {r}: this model and layout have no instruction {name}")
    start, stop = places[r.first][0], places[r.last][-1] + 1
    if not any(s.carries_tokens for s in forward[start:stop]):
        raise ValueError(f"strategy.partition: {r} has no all-to-all in it: give a range that holds one")
    sent = {v for s in forward[start:stop] if s.kind is Kind.START for v in s.writes}
    awaited = {v for s in forward[start:stop] if s.kind is Kind.WAIT for v in s.reads if ">" in v}
    if sent != awaited:
        raise ValueError(f"strategy.partition: {r} begins or ends while something is on the wire")
    return start, stop


def with_own_counts(forward: Program) -> Program:
    """Each layer learns its own sizes, as it must where experts choose: a part's are not those of the whole."""
    counted = {s.layer for s in forward if s.op is Op.COUNTS}
    out: list[Instruction] = []
    for s in forward:
        sizes = next((v for v in s.reads if v.startswith("#sizes")), None)
        if sizes is None or s.op is Op.COUNTS or s.layer in counted:
            out.append(s)
            continue
        own = f"#sizes.{s.layer}.0"
        if s.name == "dispatch" and s.kind is Kind.START and s.chunk[0] == 0:
            wire = f"#order>.{s.layer}.0"
            order = (f"#order.{s.layer}.0",)
            start = Instruction("F", Kind.START, "counts", s.layer, "0", order, (wire,), op=Op.COUNTS, axis="counts")
            out += [start, replace(start, kind=Kind.WAIT, reads=(wire,), writes=(own,))]
        out.append(replace(s, reads=tuple(own if v == sizes else v for v in s.reads)))
    return tuple(out)


def part_name(i: int, parts: int) -> str:
    """Part i of so many, as the list calls it: `0p1/2`."""
    return f"0p{i}/{parts}"


def in_parts(
    body: Program, after: Program, parts: int, known: Collection[str] = (), *, one_group: bool = False
) -> list[Instruction]:
    """A range of the forward pass, before `after`, in parts.  `known`: parts of values that are there already; ValueError where
    what it reads can't be cut, or what it leaves can't be joined."""
    names = [part_name(i, parts) for i in range(parts)]
    written = {v for s in body for v in s.writes}
    enter = list(dict.fromkeys(v for s in body for v in s.reads if v not in written))
    leave = [v for v in dict.fromkeys(v for s in after for v in s.reads) if v in written]
    if wrong := [v for v in leave if not has_gradient(v)]:
        raise ValueError(f"strategy.partition: {wrong[0]} of the whole is read after {_name(body[-1])}: end the range elsewhere")

    def cut_up(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{v.rpartition('.')[0]}.{name}" for v in values for name in names)

    ordered = any(v.startswith(ORDER) for v in enter)  # else all experts get all tokens
    batch, tokens, rows = list[str](), list[str](), list[str]()
    for v in enter:
        if not any(part in known for part in cut_up([v])):
            head = v.partition(".")[0]
            kind = batch if head == "#batch" else rows if ordered and head in (ROWS, ORDER) else tokens
            kind.append(v)
    if wrong := [v for v in tokens if not has_gradient(v)]:
        raise ValueError(f"strategy.partition: {wrong[0]} can't be cut into parts: begin the range elsewhere")
    cut = {"cut_batch": batch, "cut_tokens": tokens, "cut_rows": sorted(rows, key=lambda v: not has_gradient(v))}
    out = [
        Instruction("F", Kind.COMPUTE, name, body[0].layer, reads=tuple(values), writes=cut_up(values))
        for name, values in cut.items()
        if values
    ]
    walking = [rename_part(body, name, 1 / parts) for name in names]
    out += interleave(share_group(walking, body[0].layer) if one_group else walking)
    out.append(Instruction("F", Kind.COMPUTE, "join_tokens", body[0].layer, reads=cut_up(leave), writes=tuple(leave)))
    return out if leave else out[:-1]


def side_by_side(backward: Program) -> Program:
    """The parts of a range side by side, as if it were whole: what one is waiting for the others wait for, too, and what they
    send leaves together.  In the order of the first part."""
    siblings: dict[tuple[object, ...], list[Instruction]] = {}
    for s in backward:
        siblings.setdefault(_without_part(s), []).append(s)
    out: list[Instruction] = []
    for s in backward:
        if not is_part(s):
            out.append(s)
        elif "p0/" in s.part:
            together = siblings[_without_part(s)]
            out += (replace(t, credit=0) if t.carries_tokens else t for t in together)
        elif not any("p0/" in t.part for t in siblings[_without_part(s)]):
            out.append(s)  # of the last part alone: the balance of a group
    return tuple(out)


def is_part(instruction: Instruction) -> bool:
    """Whether it is of a part of a range."""
    return "p" in instruction.part


def _without_part(s: Instruction) -> tuple[object, ...]:
    return s.kind, s.name, s.layer, re.sub(r"p\d+", "p", s.part)
