"""Torch's tables, read and written; what the check says of torch's own schedules; ours are the same cells."""

import csv
from pathlib import Path

import pytest

from megalina.step.pipeline.cell import Cell, Pipeline, Work
from megalina.step.pipeline.check import check
from megalina.step.pipeline.live import live_peaks
from megalina.step.pipeline.messages import with_messages
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.torch_table import from_csv, to_csv
from megalina.step.pipeline.walk import Stuck, walk

TABLES = Path(__file__).with_name("torch_tables")  # of torch 2.13, four ranks and eight micro-batches
OURS = {
    "GPipe": "gpipe",
    "1F1B": "1f1b",
    "Interleaved1F1B": "interleaved",
    "InterleavedZeroBubble": "zb_h1",
    "ZBVZeroBubble": "zbv",
    "DualPipeV": "dualpipev",
}
BUBBLES = {"GPipe": 9.0, "Interleaved1F1B": 4.5, "InterleavedZeroBubble": 1.5, "ZBVZeroBubble": 1.5, "DualPipeV": 3.0}
WITH_MESSAGES = [name for name in OURS if (TABLES / f"{name}_comms.csv").exists()]


def table(name: str) -> Pipeline:
    return from_csv((TABLES / f"{name}.csv").read_text())


def cells(pipeline: Pipeline) -> tuple:
    """Without what FSDP adds."""
    return tuple(tuple(e for e in entries if e[0].work is not Work.REDUCE_GRAD) for entries in pipeline.lists)


@pytest.mark.parametrize("name", BUBBLES)
def test_torchs_tables_are_legal_and_have_their_bubbles(name: str) -> None:
    pipeline = table(name)
    check(pipeline)
    assert max(walk(pipeline).idle) == BUBBLES[name]
    schedule = SCHEDULES[OURS[name]]
    ours = schedule.pipeline(Size(4, pipeline.stages // 4, 8, paired=pipeline.has_pairs))
    assert cells(pipeline) == ours.lists and pipeline.rank_of == ours.rank_of
    assert live_peaks(pipeline) == live_peaks(ours)


def test_torchs_table_of_1f1b_begins_with_the_wrong_micro_batch_on_the_last_rank() -> None:
    """Its last rank has 3F1, 3B0, ... 3F8, 3B7.  What torch runs is other code, so its drawing alone is wrong."""
    pipeline = table("1F1B")
    with pytest.raises(ValueError, match="rank 3 at position 14, 3F8: there are micro-batches 0 to 7"):
        check(pipeline)
    ours = SCHEDULES["1f1b"].pipeline(Size(4, 1, 8))
    assert cells(pipeline)[:3] == ours.lists[:3]


@pytest.mark.parametrize("name", WITH_MESSAGES)
def test_torchs_tables_with_messages_are_legal_and_end(name: str) -> None:
    pipeline = table(f"{name}_comms")
    check(pipeline)
    assert max(walk(pipeline).idle) == BUBBLES[name]
    assert {c.work for r in range(4) for _, c in pipeline.cells(r)} >= {Work.UNSHARD, Work.RESHARD, Work.REDUCE_GRAD}


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.csv")), ids=lambda path: path.stem)
def test_a_table_that_is_written_is_the_one_that_was_read(path: Path) -> None:
    pipeline = from_csv(path.read_text())
    assert from_csv(to_csv(pipeline)) == pipeline
    written = [[word for word in row if word] for row in csv.reader(path.read_text().splitlines())]
    assert list(csv.reader(to_csv(pipeline).splitlines())) == written


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("0F0,0B\n", "row 1, column 2: '0B' says no micro-batch"),
        ("0F0,0UNSHARD3\n", "row 1, column 2: '0UNSHARD3' is of a stage alone"),
        ("0F0,F0\n", "row 1, column 2: 'F0' is no cell; write 2F0"),
        ("0F0,(0F1;0Q0)OVERLAP_F_B\n", "row 1, column 2: '0Q0' is no cell"),
        ("0F0\n0B0\n", "row 2 has 0B0, but stage 0 is in row 1"),
        ("0F0\n2F0\n", "no row computes anything of stage 1, but one does of stage 2"),
        (",,\n", "the table has no cell"),
    ],
)
def test_what_is_no_table_is_refused_with_row_and_column(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        from_csv(text)


def test_pairs_and_empty_times_are_read() -> None:
    pipeline = from_csv("0F0,,1F0, 1B0 ,0B0\n")
    assert [str(e[0]) for e in pipeline.lists[0]] == ["0F0", "1F0", "1B0", "0B0"] and pipeline.rank_of == (0, 0)
    pair = from_csv("0F0,1F0,(0F1;1B0)OVERLAP_F_B,1F1,1B1,0B0,0B1\n").lists[0][2]
    assert pair == (Cell(Work.FORWARD, 0, 1), Cell(Work.BACKWARD, 1, 0))


@pytest.mark.full
@pytest.mark.parametrize("name", OURS)
def test_torch_makes_these_tables_and_reads_ours(name: str, tmp_path: Path) -> None:
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
    from torch.distributed.pipelining.schedules import _Action, _validate_schedule

    ours = SCHEDULES[OURS[name]]
    for ranks in (2, 3, 4, 8):
        for micro_batches in (2 * ranks, 4 * ranks):
            chunks = ours.chunks or 2
            theirs = get_schedule_ops(name, ranks, micro_batches, num_stages_per_rank=chunks)
            pipeline = from_csv("\n".join(",".join("" if a is None else str(a) for a in row) for row in theirs) + "\n")
            made = ours.pipeline(Size(ranks, chunks, micro_batches, paired=pipeline.has_pairs))
            assert cells(pipeline)[: ranks - (name == "1F1B")] == made.lists[: ranks - (name == "1F1B")]
            read = {r: [_Action.from_str(w) for w in row] for r, row in enumerate(csv.reader(to_csv(made).splitlines()))}
            _validate_schedule(read, ranks, ranks * chunks, micro_batches)
            sent = with_messages(made)
            for row in csv.reader(to_csv(sent).splitlines()):
                assert [str(_Action.from_str(word)) for word in row] == row


@pytest.mark.full
@pytest.mark.parametrize("name", WITH_MESSAGES)
def test_torchs_late_receives_close_a_circle_or_mix_messages_up(name: str) -> None:
    """With `defer_pp_recv` RECVs come right before their readers.  On a loop all ranks send at once then, and each waits for the
    next one's RECV; on a V what goes down and what comes up are received in another order than they are sent."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    theirs = get_schedule_ops(name, 4, 8, num_stages_per_rank=2, with_comms=True, defer_pp_recv=True)
    pipeline = from_csv("\n".join(",".join(map(str, row)) for row in theirs) + "\n")
    if OURS[name] in ("zbv", "dualpipev"):
        with pytest.raises(ValueError, match="receives in another order than rank 0 sends"):
            check(pipeline, meet=False)
    else:
        with pytest.raises(Stuck, match="0SEND_F3, waits for 1RECV_F3, which rank 1 has at position"):
            check(pipeline)
        check(pipeline, meet=False)
