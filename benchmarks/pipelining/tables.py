"""Torch's five pipeline schedules: their tables, as torch prints them, and what the check of lists says of each."""

import csv
import io
from dataclasses import dataclass

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from megalina.step.pipeline.check import check
from megalina.step.pipeline.torch_table import from_csv


@dataclass(frozen=True, slots=True)
class Kind:
    """A schedule."""

    name: str  # torch's
    ours: str  # what it is called here
    chunks: int  # stages on each rank

    @property
    def takes_late_receives(self) -> bool:
        """Whether torch has `defer_pp_recv` for it."""
        return self.chunks > 1


KINDS = (
    Kind("1F1B", "1f1b", 1),
    Kind("Interleaved1F1B", "interleaved", 2),
    Kind("InterleavedZeroBubble", "zb_h1", 2),
    Kind("ZBVZeroBubble", "zbv", 2),
    Kind("DualPipeV", "dualpipev", 2),
)


def kind_of(name: str) -> Kind:
    """ValueError where torch has no such schedule, or it isn't measured here."""
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise ValueError(f"{name}: choose of torch's schedules {', '.join(kind.name for kind in KINDS)}")


def table_of(kind: Kind, ranks: int, micro_batches: int, *, messages: bool = False, late_receives: bool = False) -> str:
    """As CSV.  `messages`: with SEND and RECV, `late_receives`: these right before their readers (`defer_pp_recv`)."""
    rows = get_schedule_ops(
        kind.name, ranks, micro_batches, num_stages_per_rank=kind.chunks, with_comms=messages, defer_pp_recv=late_receives
    )
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([["" if a is None else str(a) for a in row] for row in rows])
    return out.getvalue()


def said_of(text: str, *, meet: bool = True) -> str:
    """What the check has against a table; "" where it is legal.  `meet`: each SEND waits for its RECV."""
    try:
        check(from_csv(text), meet=meet)
    except ValueError as error:
        return str(error)
    return ""


def said_of_all(kind: Kind, ranks: int, micro_batches: int) -> dict[str, str]:
    """By what the table has: cells alone, messages too, messages received late; torch prints the last two of the schedules with
    several stages on a rank."""
    out = {"cells": said_of(table_of(kind, ranks, micro_batches))}
    if kind.takes_late_receives:
        out["messages"] = said_of(table_of(kind, ranks, micro_batches, messages=True))
        late = table_of(kind, ranks, micro_batches, messages=True, late_receives=True)
        out["late receives"], out["late receives, none waited for"] = said_of(late), said_of(late, meet=False)
    return out
