"""What would really happen: ranks that go through their lists with messages that have no names, as on the wire.

It shares nothing with the check but the cells: values are followed, and whatever arrives is what a cell computes with."""

from collections import defaultdict

from megalina.step.pipeline.cell import RECEIVES, SENDS, Cell, Pipeline, Work

DIRECTION = {Work.SEND_ACTIVATIONS: 1, Work.SEND_GRADIENTS: -1, Work.RECV_ACTIVATIONS: -1, Work.RECV_GRADIENTS: 1}


def trains(pipeline: Pipeline) -> bool:
    """Whether all ranks come to their ends, with what one process computes; a rank stands still at its messages."""
    ranks, stages = len(pipeline.lists), len(pipeline.rank_of)
    at = [0] * ranks
    made: list[dict[tuple, tuple]] = [{} for _ in range(ranks)]  # by name, what it really is
    sent: dict[tuple[int, int], list[tuple]] = defaultdict(list)
    asked: dict[tuple[int, int], int] = defaultdict(int)
    number: dict[tuple[int, int, Cell], int] = {}  # of a message in its lane
    posted: set[tuple[int, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while at[rank] < len(pipeline.lists[rank]):
                entry = pipeline.lists[rank][at[rank]]
                if entry[0].work in SENDS or entry[0].work in RECEIVES:
                    if (rank, at[rank]) not in posted:
                        posted.add((rank, at[rank]))
                        moved = True
                        for cell in entry:
                            other = cell.stage + DIRECTION[cell.work]
                            if not 0 <= other < stages or (peer := pipeline.rank_of[other]) == rank:
                                return False
                            if cell.work in SENDS:
                                kind = "f" if cell.work is Work.SEND_ACTIVATIONS else "g"
                                value = made[rank].get((kind, cell.stage, cell.micro_batch))
                                if value is None:
                                    return False
                                number[rank, at[rank], cell] = len(sent[rank, peer])
                                sent[rank, peer].append(value)
                            else:
                                number[rank, at[rank], cell] = asked[peer, rank]
                                asked[peer, rank] += 1
                    for cell in entry:
                        peer = pipeline.rank_of[cell.stage + DIRECTION[cell.work]]
                        lane = (rank, peer) if cell.work in SENDS else (peer, rank)
                        other_side = asked[lane] if cell.work in SENDS else len(sent[lane])
                        if other_side <= number[rank, at[rank], cell]:
                            break
                    else:
                        for cell in entry:
                            if cell.work in RECEIVES:
                                other = cell.stage + DIRECTION[cell.work]
                                kind = "f" if cell.work is Work.RECV_ACTIVATIONS else "g"
                                came = sent[pipeline.rank_of[other], rank][number[rank, at[rank], cell]]
                                if (kind, other, cell.micro_batch) in made[rank]:
                                    return False
                                made[rank][kind, other, cell.micro_batch] = came
                        at[rank] += 1
                        moved = True
                        continue
                    break
                if any(pipeline.rank_of[cell.stage] != rank for cell in entry):
                    return False  # it has no weights for that
                before = dict(made[rank])  # cells of a pair can't take what the other gives
                if not all(_compute(cell, made[rank], stages, before) for cell in entry):
                    return False
                at[rank] += 1
                moved = True
    if any(at[rank] < len(pipeline.lists[rank]) for rank in range(ranks)):
        return False
    done = {name for of_rank in made for name in of_rank}
    everything = {(k, s, i) for k in "fgw" for s in range(stages) for i in range(pipeline.micro_batches)}
    return done == everything and all(asked[lane] == len(values) for lane, values in sent.items())


def _compute(cell: Cell, made: dict[tuple, tuple], stages: int, before: dict[tuple, tuple]) -> bool:
    """Values are what they are of: forward of stage 2 needs the output of stage 1 for the same micro-batch, whatever it is
    called."""
    s, i = cell.stage, cell.micro_batch
    if cell.work is Work.FORWARD:
        given, gives = [("f", s - 1, i)] if s else [], [("f", s, i)]
    elif cell.work is Work.WEIGHT_GRADIENTS:
        given, gives = [("g", s, i)], [("w", s, i)]
    else:
        given = [("f", s, i), *([("g", s + 1, i)] if s < stages - 1 else [])]
        gives = [("g", s, i), *([("w", s, i)] if cell.work is Work.BACKWARD else [])]
    if any(before.get(name) != name for name in given) or any(name in made for name in gives):
        return False
    made.update({name: name for name in gives})
    return True
