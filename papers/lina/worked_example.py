"""The paper's worked example: one MoE layer's backward pass beside an all-reduce (section 4, Figures 7 and 8).

Its own numbers give the lengths.  The first all-to-all ends at 13.3 ms (7d's gap), experts take 1.6 ms (8b), the second ends at
24.6 ms with nothing beside (7c), so an all-to-all takes 9.7 ms and what comes before them 3.6 ms.  An all-reduce that ends 6.6 ms
earlier ends 21.7% earlier than in 7c, so there at 30.4 ms, and takes 5.8 ms.  When it is asked for is fitted on 7a.
"""

from collections.abc import Iterator
from dataclasses import replace

from megalina.perfmodel.sim.network import Network
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import Timeline, simulate_alike
from megalina.step.program import Instruction, Kind, Op, Program
from megalina.timeline.recorder import SEND
from papers.lina.row import Row

GAP_MS, EXPERTS_MS, FAIR_MS, WHOLE_MS, HELD_MS = 13.3, 1.6, 29.0, 30.9, 24.6
EARLIER_MS, EARLIER_PERCENT, CHUNK_MS = 6.6, 21.7, 0.764
A2A_MS = HELD_MS - GAP_MS - EXPERTS_MS
COMBINE_MS = GAP_MS - A2A_MS
REDUCE_MS = EARLIER_MS / EARLIER_PERCENT * 100 - HELD_MS
RANKS = 16
PIECES = 5  # of the all-reduce in 8a, as drawn in one of its places; another has three
CHUNKS = 2  # in 8b


def rows() -> Iterator[Row]:
    """In the paper's order."""
    asked_ms = COMBINE_MS - (REDUCE_MS - (FAIR_MS - HELD_MS))  # so long alone on the wire before the first all-to-all
    fair = walk(asked_ms=asked_ms)
    whole = walk(asked_ms=asked_ms, alone=True)
    held = walk(place="end")
    gap = walk(place="gap")
    pieces = walk(asked_ms=asked_ms, pieces=PIECES, yields=True)
    piped = walk(place="end", chunks=CHUNKS)
    yield _row("7a", "gradients done, fair share", FAIR_MS, layer_ms(fair), fitted=True)
    yield _row("7b", "the same, whole tensors one at a time", WHOLE_MS, layer_ms(whole))
    yield _row("7c", "the same, all-reduce after the second all-to-all", HELD_MS, layer_ms(held), fitted=True)
    yield Row(
        id="Fig7d",
        name=f"an all-reduce in the gap at {GAP_MS} ms",
        paper="the layer ends as in 7c",
        simulated=abs(layer_ms(gap) - layer_ms(held)) < 0.01 * HELD_MS,
        note=f"the gap is {EXPERTS_MS} ms, the all-reduce of 8a {REDUCE_MS:.1f} ms: the one drawn must be another, shorter one",
    )
    earlier_ms = reduced_ms(held) - reduced_ms(pieces)
    yield _row("8a.earlier", "all-reduce ends earlier than in 7c, by micro-operations", EARLIER_MS, earlier_ms, marks="n")
    yield _row("8a.percent", "the same, of 7c", EARLIER_PERCENT, 100 * earlier_ms / reduced_ms(held), unit="%", marks="n")
    yield Row(
        id="Fig8a.prolonged",
        name="all-to-all beside micro-operations",
        paper="not prolonged",
        simulated=layer_ms(pieces) < 1.01 * layer_ms(held),
        note=f"by {layer_ms(pieces) - layer_ms(held):.1f} ms here: a piece that starts in the gap ends after it",
    )
    yield Row(
        id="Fig8a.chunk",
        name="chunk and concatenate",
        paper=1e3 * CHUNK_MS,
        simulated=None,
        unit="us",
        note="gradients are cut as views of a flat buffer here, which copies nothing; T14 has what cutting rows costs",
    )
    yield _row("8b.hidden", "hidden by pipelining", EXPERTS_MS, layer_ms(held) - layer_ms(piped))


def _row(id: str, name: str, paper: float, simulated: float, *, unit: str = "ms", fitted: bool = False, marks: str = "") -> Row:
    return Row(id=f"Fig{id}", name=name, paper=paper, simulated=simulated, unit=unit, fitted=fitted, put_in=fitted, marks=marks)


def walk(
    *, asked_ms: float = 0.0, place: str = "asked", pieces: int = 1, chunks: int = 1, yields: bool = False, alone: bool = False
) -> Timeline:
    """The layer in virtual time.

    place: the all-reduce is asked for at `asked_ms`, in the "gap" or at the "end"; `alone`: nothing else is on the wire with it,
    so it holds up all-to-alls while it runs (the paper's scheduler on whole tensors); `yields`: it waits for them."""
    gradients = tuple(_sent("grads", Op.GRADS, "dp", piece=(i, i + 1), yields=yields) for i in range(pieces))
    axis = "dp" if alone else "ep"
    before_ms = asked_ms if place == "asked" else COMBINE_MS
    head = [_compute("before", before_ms), *(gradients if place == "asked" else ()), _compute("combine", COMBINE_MS - before_ms)]
    firsts = [_sent("combine", Op.TOKENS, axis, part=c) for c in range(chunks)]
    body = [*firsts]
    for c in range(chunks):
        experts = _compute("experts", EXPERTS_MS / chunks, part=c)
        body += [_awaited(firsts[c]), *(gradients if place == "gap" and c == 0 else ()), experts]
        body.append(_sent("dispatch", Op.TOKENS, axis, part=c))
    seconds = [s for s in body if s.name == "dispatch"]
    tail = [*map(_awaited, seconds), _compute("layer", 0.0), *(gradients if place == "end" else ()), *map(_awaited, gradients)]
    program = _credited((*head, *body, *tail), alone=alone or chunks > 1)
    lengths = {"combine": A2A_MS / chunks, "dispatch": A2A_MS / chunks, "grads": REDUCE_MS / pieces}
    return simulate_alike(
        program,
        ranks=RANKS,
        ranks_of=lambda axis, rank: tuple(range(RANKS)),
        seconds=_seconds,
        network=Network(nic_bytes_per_s=1.0, algorithm="direct", share="collective"),
        sizes=Sizes(
            lambda instruction: lengths[instruction.name] / 1e3 * RANKS / (RANKS - 1) / (2 if instruction.op is Op.GRADS else 1)
        ),
    )


def _credited(program: Program, *, alone: bool) -> Program:
    """`alone`: one thing of an axis is under way at a time."""
    return tuple(replace(s, credit=1) if s.kind is Kind.START and (alone or s.yields_to) else s for s in program)


def layer_ms(timeline: Timeline) -> float:
    """The moment at which the second all-to-all has come."""
    return 1e3 * max(e.end_s for e in timeline.events(0) if e.kind == SEND and e.op == "tokens")


def reduced_ms(timeline: Timeline) -> float:
    return 1e3 * max(e.end_s for e in timeline.events(0) if e.kind == SEND and e.op == "grads")


def _compute(name: str, ms: float, part: int = 0) -> Instruction:
    return Instruction("B", Kind.COMPUTE, name, layer=0, part=str(part), share=ms / 1e3)


def _seconds(instruction: Instruction) -> float:
    return instruction.share if instruction.kind is Kind.COMPUTE else 0.0


def _sent(name: str, op: Op, axis: str, *, part: int = 0, piece: tuple[int, int] = (0, 0), yields: bool = False) -> Instruction:
    value = f"{name}>.0.{part}.{piece[0]}"
    yields_to = (Op.TOKENS,) if yields else ()
    return Instruction("B", Kind.START, name, 0, str(part), writes=(value,), op=op, axis=axis, piece=piece, yields_to=yields_to)


def _awaited(start: Instruction) -> Instruction:
    return replace(start, kind=Kind.WAIT, reads=start.writes, writes=(), yields_to=(), credit=0)
