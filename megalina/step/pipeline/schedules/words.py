"""Lists written as words: `Fa Fb Ia W` are cells of a rank's first chunk (a) and second (b), micro-batches counted up."""

from collections import Counter
from collections.abc import Sequence

from megalina.step.pipeline.cell import Cell, CellList, Entry, Work


def cells_of(words: str, stages: Sequence[int]) -> CellList:
    """The list of a rank that holds `stages`.  Each word takes the next micro-batch of its kind and chunk, and whole backward (B)
    counts as the gradients of inputs (I) and of weights (W) do.  `W` alone is of the oldest I whose W has not come;
    `Fa+Bb` go in turns."""
    taken, owed, out = Counter[tuple[str, str]](), list[Cell](), list[Entry]()
    for word in words.split():
        entry: list[Cell] = []
        for kind, chunk in ((w[0], w[1:]) for w in word.split("+")):
            if not chunk:
                oldest = owed.pop(0)
                entry.append(Cell(Work.WEIGHT_GRADIENTS, oldest.stage, oldest.micro_batch))
                continue
            cell = Cell(Work(kind), stages["ab".index(chunk)], taken[kind.replace("B", "I"), chunk])
            taken.update((k, chunk) for k in kind.replace("B", "IW"))
            owed += [cell] if kind == "I" else []
            entry.append(cell)
        out.append(tuple(entry))
    return tuple(out)
