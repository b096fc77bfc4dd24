"""Candidates: the plans that are worth a try, for all who search: measured steps (`auto`), the planner, the map, the ladder."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from megalina.step.plan import Plan

PIECE_BYTES = 2**19  # smaller ones cost their latency many times: a small all-reduce takes milliseconds whatever its size
PIECES_BYTES = (0, 2**19, 2**20)  # 0: whole buckets
CHUNKS = ((1,), (2,), (4,))
PARTS = (2, 4)
LATE_LAYERS = (0, 2, 4)
DEFERRED = ("none", "experts", "all")
PACKINGS = (2, 4, 8, 16)  # tried in turn while they pay
PACKED = (
    "lina",
    "flow",
    "pair",
    "lina_zero",
    "lancet",
    "search",
)  # strategies that packing is a part of; others are what they are held against

# With the numbers of conf/strategy, but for lina's packing, which is measured there.
EAGER = Plan("eager")
DDP = Plan("ddp", merge_bytes=25 * 2**20)  # torch's default
PRIORITY = Plan("priority", yields=True)
PRIORITY_PARTITION = replace(PRIORITY, strategy="priority_partition", piece_bytes=PIECE_BYTES)
LINA_NOPACK = replace(PRIORITY_PARTITION, strategy="lina_nopack", chunks=(2,))
LINA = replace(LINA_NOPACK, strategy="lina")
FLOW = Plan("flow", parts=2)
PAIR = Plan("pair")  # of several micro-batches
LANCET = Plan("lancet", deferred_weights="all")
LANCET_IN_PARTS = replace(LANCET, partition="2", partition_backward="mirrored")
LINA_ZERO = Plan("lina_zero", parts=2, yields=True, piece_bytes=PIECE_BYTES)

OF_A_LAYOUT = (  # one list for every layout of a large search
    *(EAGER, DDP, PRIORITY_PARTITION, LINA_NOPACK),
    *(replace(LINA, packing=k) for k in (2, 4)),
    *(replace(FLOW, late_layers=late, packing=k) for late in (0, 2) for k in (1, 2)),
    *(LANCET, LANCET_IN_PARTS, replace(FLOW, deferred_weights="all"), LINA_ZERO),
    *(PAIR, replace(PAIR, deferred_weights="all")),
)


def to_search_from(*, zero: bool, piece_bytes: int, packing: int, newton_schulz_after: int = 0) -> list[Plan]:
    """The plans whose lists a search of lists begins with: every strategy, and flow with finer parts, chunks, deferred and late
    weights.  With ZeRO-1 shards belong to pieces, which are of `piece_bytes`."""
    plans = [EAGER, Plan("serial"), Plan("fixed"), DDP, PRIORITY, PRIORITY_PARTITION, FLOW, LANCET]
    plans += [LINA if packing > 1 else LINA_NOPACK]
    plans += [replace(PAIR, parts=parts, deferred_weights=mode) for parts in (1, *PARTS[:1]) for mode in DEFERRED[::2]]
    plans += [LINA_ZERO] if zero else []
    for walking in (FLOW, *([LINA_ZERO] if zero else ())):
        for parts, deferred, chunks, pieces in product(PARTS, DEFERRED, CHUNKS[:2], PIECES_BYTES[:2]):
            more = replace(walking, parts=parts, deferred_weights=deferred, chunks=chunks, piece_bytes=pieces)
            plans += [more] if parts == PARTS[0] or not (pieces or chunks != (1,)) else []
        whole = [plan for plan in plans if plan.strategy == walking.strategy and plan.chunks == (1,)]
        plans += [plan for start in whole for plan in joined(start)]
        for parts, layers, deferred, pieces in product(PARTS, LATE_LAYERS[1:], DEFERRED, PIECES_BYTES[::2]):
            more = replace(walking, parts=parts, late_layers=layers, deferred_weights=deferred, join_weights=True)
            plans.append(replace(more, piece_bytes=pieces, yields=True) if pieces else more)
    plans += [replace(LANCET, chunks=chunks) for chunks in CHUNKS[1:]]
    plans = [replace(plan, packing=packing, piece_bytes=piece_bytes if zero else plan.piece_bytes) for plan in plans]
    plans = [replace(plan, newton_schulz_after=newton_schulz_after) for plan in plans]
    return list(dict.fromkeys(plans))


def winners(*, zero: bool) -> list[Plan]:
    """Those that have won somewhere.  With ZeRO-1 shards belong to pieces, so pieces stay as they are."""
    return [replace(FLOW, late_layers=2), PAIR, LINA, LANCET, *([replace(LINA_ZERO, piece_bytes=0)] if zero else [])]


def packed(best: Plan, packings: Sequence[int]) -> list[Plan]:
    """The best plan, or the simplest that can, with each packing."""
    plan = best if best.strategy in PACKED else replace(LINA, chunks=(1,))
    return [replace(plan, packing=k) for k in packings]


def yielding(best: Plan) -> list[Plan]:
    """Flow and pair, the other way round."""
    return [replace(best, yields=not best.yields)] if best.strategy in ("flow", "pair") else []


def in_parts(best: Plan) -> list[Plan]:
    return [replace(best, parts=parts) for parts in PARTS] if best.parts > 1 else []


def with_late_layers(best: Plan) -> list[Plan]:
    return [replace(best, late_layers=layers) for layers in LATE_LAYERS] if best.strategy != "eager" else []


def with_deferred_weights(best: Plan) -> list[Plan]:
    """Whose weights' gradients are placed under all-to-alls."""
    return [replace(best, deferred_weights=mode) for mode in DEFERRED] if best.strategy != "eager" else []


def joined(best: Plan) -> list[Plan]:
    """What all parts leave out of the gradients of the same weights, as one product."""
    late = best.late_layers or best.deferred_weights != "none"
    return [replace(best, join_weights=not best.join_weights)] if best.parts > 1 and late else []


def with_partition(best: Plan) -> list[Plan]:
    """Of lancet alone: others walk in parts by themselves, or stay whole."""
    if best.strategy != "lancet":
        return []
    whole = [replace(best, partition=parts, partition_backward="whole") for parts in ("none", "2")]
    return [*whole, *(replace(best, partition=parts, partition_backward="mirrored") for parts in ("2", "4"))]


def in_chunks(best: Plan) -> list[Plan]:
    return [replace(best, chunks=chunks) for chunks in CHUNKS]


def in_pieces(best: Plan) -> list[Plan]:
    return [replace(best, piece_bytes=size) for size in PIECES_BYTES]


def piece_of(layer_bytes: int, pieces: int) -> int:
    """Bytes of about so many pieces a layer, for models where pieces of half a MiB would be ten thousands."""
    return max(1, layer_bytes // pieces // PIECE_BYTES) * PIECE_BYTES
