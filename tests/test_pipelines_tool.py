"""tools/pipelines.py prints lists, bubble and memory beside the formulas, and what the check says; a wrong call is one line."""

import json
from pathlib import Path

import pytest

from megalina.step.pipeline.torch_table import from_csv
from megalina.timeline.pipeline_picture import Box, draw_pipeline
from tests.commands import done
from tools.pipelines import main

ROOT = Path(__file__).resolve().parent.parent
TORCH = ROOT / "tests" / "step" / "pipeline" / "torch_tables"


def test_it_prints_lists_bubble_and_activations_beside_the_formulas() -> None:
    printed = done(main, "1f1b", "--stages", 3, "--micro-batches", 4)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout.splitlines() == [
        "1f1b: 3 ranks, 1 chunk each, 4 micro-batches",
        "rank 0  0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "rank 1  1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "rank 2  2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
        "step 18, 33.3% of it idle",
        "rank  busy  idle  formula  peak  formula  peak until W",
        "   0    12     6        6     3        3             3",
        "   1    12     6        6     2        2             2",
        "   2    12     6        6     1        1             1",
        "check: legal: complete, in order; 16 messages put in, and no circle where every SEND waits for its RECV",
    ]


def test_tables_go_out_and_come_in_again(tmp_path: Path) -> None:
    own, told = tmp_path / "own.csv", tmp_path / "told.json"
    size = ("--stages", 2, "--micro-batches", 4)
    assert done(main, "dualpipev", *size, "--messages", "--csv", own, "--json", told, "--pair", 0.8).returncode == 0
    assert from_csv(own.read_text()).has_messages
    numbers = json.loads(told.read_text())
    assert numbers["step"] == pytest.approx(numbers["busy"][0] + numbers["idle"][0]) and len(numbers["lists"]) == 2
    assert max(numbers["idle"]) <= numbers["idle_by_formula"] and numbers["formula_is_bound"]
    read = done(main, "--from-csv", own)
    assert read.returncode == 0 and "check: legal: complete, in order; 16 messages, and no circle" in read.stdout


def test_a_table_that_the_check_refuses_is_told_with_its_own_exit_code() -> None:
    printed = done(main, "--from-csv", TORCH / "1F1B.csv")
    assert (printed.returncode, printed.stderr) == (1, "")
    assert printed.stdout.splitlines()[-1] == "check: rank 3 at position 14, 3F8: there are micro-batches 0 to 7"


def test_a_circle_is_told_and_that_it_is_none_where_only_cells_wait(tmp_path: Path) -> None:
    table = tmp_path / "both_send_first.csv"
    table.write_text("0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1\n")
    printed = done(main, "--from-csv", table)
    assert printed.returncode == 0
    assert (
        "check: where every SEND waits for its RECV, the lists never end: rank 0 at position 3, 0SEND_F1, waits" in printed.stdout
    )
    assert printed.stdout.splitlines()[-1] == "check: legal where only the cell that reads a message waits for it"


def test_layers_are_cut_and_read() -> None:
    printed = done(main, "gpipe", "--stages", 2, "--micro-batches", 2, "--layers", 7, "--ends", "0.5,2.5").stdout
    assert "stage 0 on rank 0: E 0-3\nstage 1 on rank 1: 4-6 L\nas Megatron's layout: Etttt|tttL\n" in printed
    printed = done(main, "gpipe", "--stages", 2, "--micro-batches", 2, "--layout", "Et*3|(t)*2L").stdout
    assert "stage 0 on rank 0: E 0-2\nstage 1 on rank 1: 3-4 L" in printed


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "give a schedule, one of gpipe, 1f1b, interleaved, zb_h1, zbv, dualpipev, greedy, or a table: --from-csv FILE"),
        (("1f1b", "--stages", 2), "1f1b: give --stages and --micro-batches"),
        (("2f2b", "--stages", 2, "--micro-batches", 2), "there is no schedule 2f2b: choose one of gpipe, 1f1b"),
        (("nowhere.py:S", "--stages", 2, "--micro-batches", 2), "nowhere.py: there is no such file"),
        (("megalina.step.pipeline.walk:walk", "--stages", 2, "--micro-batches", 2), "walk:walk is no Schedule"),
        (("zbv", "--stages", 2, "--micro-batches", 2, "--chunks", 3), "zbv has 2 chunks on each rank, not 3"),
        (("--from-csv", TORCH / "1F1B.csv", "--stages", 4), "the table says how many ranks"),
        (("--from-csv", TORCH / "none.csv"), "none.csv"),
        (("1f1b", "--stages", 2, "--micro-batches", 2, "--layout", "EtL"), "--layout has 1 stages, and the schedule 2"),
        (("1f1b", "--stages", 2, "--micro-batches", 2, "--layout", "EtL", "--layers", 3), "not both"),
        (("1f1b", "--stages", 2, "--micro-batches", 2, "--times", "1,1,0,1"), "1,1,0,1: F, B and W must be above 0"),
        (("1f1b", "--stages", 2, "--micro-batches", 2, "--times", "1,1"), "1,1 must be 4 numbers with commas between them"),
    ],
)
def test_a_wrong_call_is_one_line(words: tuple, error: str) -> None:
    found = done(main, *words)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1 and error in found.stderr


def test_the_picture_has_a_box_for_each_cell_where_it_was_and_white_bubbles(tmp_path: Path) -> None:
    path = tmp_path / "pairs.svg"
    assert done(main, "dualpipev", "--stages", 2, "--micro-batches", 4, "--picture", path).returncode == 0
    text = path.read_text()
    for word in ("rank 0", "rank 1", "dualpipev: 2 ranks", "gradients of weights", "forward"):
        assert f"<!-- {word}" in text, word
    lanes = [[Box(0, 1, "F", 0, 0), Box(1, 3, "F", 1, 0, 0, 2), Box(1, 3, "B", 0, 1, 1, 2)], [Box(3, 4, "W", 0, 0)]]
    draw_pipeline(tmp_path / "small.png", lanes, title="small")
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_of_the_document_is_a_schedule_that_is_legal_and_pays_where_pairs_do() -> None:
    example = ("docs/examples/own_pipeline.py:SCHEDULE", "--stages", 4, "--micro-batches", 16)
    plain = done(main, "1f1b", *example[1:])
    printed = done(main, *example, "--pair", 0.8)
    assert printed.returncode == 0 and "step 48, " in printed.stdout and "step 57, " in plain.stdout
    document = (ROOT / "docs" / "pipelines.md").read_text()
    assert (
        "(examples/own_pipeline.py)" in document and len((ROOT / "docs/examples/own_pipeline.py").read_text().splitlines()) <= 40
    )
    assert all(f"(images/pipelines/{path.name})" in document for path in (ROOT / "docs/images/pipelines").glob("*.png"))
