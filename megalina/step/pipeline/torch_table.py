"""Tables as torch.distributed.pipelining reads and writes them: a CSV file with a row a rank, in two formats: "compute_only", and
"compute_comms" with messages and FSDP's gathers.

`_PipelineScheduleRuntime._load_csv` and `_dump_csv` are torch's side (torch 2.13).  A cell is `2F0`, `1SEND_F3` or `0UNSHARD`; a
pair is `(0F4;7B1)OVERLAP_F_B`; an empty one is a time in which a rank does nothing in torch's drawing, and means nothing here.
"""

import csv
import io
import re
from collections import Counter

from megalina.step.pipeline.cell import COMPUTED, Cell, Entry, Pipeline, Work

CELL = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD|F|I|W|B)(\d*)")
PAIR = re.compile(r"\((.*)\)OVERLAP_F_B")
ALONE = (Work.UNSHARD, Work.RESHARD, Work.REDUCE_GRAD)  # of a stage, not of a micro-batch


def from_csv(text: str) -> Pipeline:
    """The lists of a table.  Where stages are follows from who computes them, and how many micro-batches there are from the most
    forwards of a stage.  ValueError, with row and column, for what is no table."""
    rows = list(csv.reader(io.StringIO(text)))
    lists = tuple(
        tuple(_entry(word.strip(), f"row {rank + 1}, column {column + 1}") for column, word in enumerate(row) if word.strip())
        for rank, row in enumerate(rows)
    )
    holders: dict[int, int] = {}
    forwards = Counter[int]()
    for rank, entries in enumerate(lists):
        for cell in (cell for entry in entries for cell in entry if cell.work in COMPUTED):
            if holders.setdefault(cell.stage, rank) != rank:
                raise ValueError(f"row {rank + 1} has {cell}, but stage {cell.stage} is in row {holders[cell.stage] + 1}")
            forwards[cell.stage] += cell.work is Work.FORWARD
    if missing := sorted(set(range(max(holders, default=-1) + 1)) - set(holders)):
        raise ValueError(f"no row computes anything of stage {missing[0]}, but one does of stage {max(holders)}")
    if not holders:
        raise ValueError("the table has no cell: each row holds a rank's, such as 0F0,0F1,0B0,0B1")
    return Pipeline(lists, tuple(holders[stage] for stage in range(len(holders))), max(forwards.values()))


def _entry(word: str, where: str) -> Entry:
    pair = PAIR.fullmatch(word)
    return tuple(_cell(part.strip(), where) for part in pair[1].split(";")) if pair else (_cell(word, where),)


def _cell(word: str, where: str) -> Cell:
    match = CELL.fullmatch(word)
    if match is None:
        raise ValueError(
            f"{where}: {word!r} is no cell; write 2F0, 2B0, 2I0, 2W0, 2SEND_F0, 2RECV_B0, 2UNSHARD, (0F4;7B1)OVERLAP_F_B"
        )
    work = Work(match[2])
    if (work in ALONE) == bool(match[3]):
        raise ValueError(f"{where}: {word!r} {'is of a stage alone' if work in ALONE else 'says no micro-batch'}")
    return Cell(work, int(match[1]), int(match[3]) if match[3] else None)


def to_csv(pipeline: Pipeline) -> str:
    """The table, which torch reads as "compute_only", or as "compute_comms" if there are messages.  Torch has no batches: it
    starts messages one after another, in the one order that both ranks have for them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for entries in pipeline.lists:
        row: list[str] = []
        for entry in entries:
            if len(entry) > 1 and entry[0].work in COMPUTED:
                row.append(f"({';'.join(map(str, entry))})OVERLAP_F_B")
            else:
                row += map(str, entry)
        writer.writerow(row)
    return out.getvalue()
