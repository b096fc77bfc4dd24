"""The table of faults: what counts as explained, what as a problem, and that its plants and its damage are what they say."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.fault.cases import (
    FAULTS,
    WITHIN_S,
    Fault,
    Outcome,
    core,
    ended_with,
    explained,
    flip_bit,
    largest_shard,
    nothing_updated,
    problems,
    table,
    truncate,
)
from benchmarks.fault.jobs import FAULT_FILE, Command, Job
from benchmarks.fault.plants import MARK, PLANTS, Place
from megalina.train.diagnosis import State, summary

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = {fault.name: fault for fault in FAULTS}
GOOD = Outcome(code=1, message_s=4.0, end_s=5.0, left=0, missing=[], explanation=["rank 1 was ended"])


def test_every_plant_is_in_the_table_and_every_name_is_there_once() -> None:
    planted = [fault.strike.keywords["plant"] for fault in FAULTS if isinstance(fault.strike, partial)]
    assert sorted(planted) == sorted(PLANTS)
    assert len(CASES) == len(FAULTS) and FAULT_FILE == MARK


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": 0}, "exit code 0, 1 expected"),
        ({"code": None}, "the command did not end"),
        ({"left": 2}, "2 processes were left"),
        ({"message_s": WITHIN_S + 1}, "the message came after 11.0 s"),
        ({"missing": ["rank 1"], "message_s": None}, "nothing says 'rank 1'"),
        ({"end_s": WITHIN_S + 1}, "the end came after 11.0 s"),
        ({"wrong": ["updated"]}, "updated"),
    ],
)
def test_each_thing_that_is_not_as_it_must_be_is_a_problem(change: dict[str, object], said: str) -> None:
    assert problems(CASES["kill_rank"], GOOD) == []
    assert problems(CASES["kill_rank"], replace(GOOD, **change)) == [said]  # type: ignore[arg-type]


def test_a_run_that_is_to_go_on_may_take_its_time() -> None:
    later = replace(GOOD, code=0, end_s=WITHIN_S + 1)
    assert problems(CASES["full_disk"], later) == [] and problems(CASES["kill_rank"], later) != []


def test_the_message_is_there_with_its_last_line_and_begins_with_its_first() -> None:
    lines = [(1.0, "model"), (2.0, "rank 1 computes"), (3.0, "a"), (4.5, "rank 0 waits"), (9.0, "rank 0 waits")]
    when, missing, explanation = explained(lines, ["0 waits", "1 computes"])
    assert (when, missing, explanation) == (4.5, [], ["rank 1 computes", "a", "rank 0 waits", "rank 0 waits"])
    assert core(explanation, ["0 waits", "1 computes"]) == ["rank 1 computes", "rank 0 waits"]
    assert explained(lines, ["0 waits", "rank 2"])[1] == ["rank 2"]
    assert explained(lines, ["rank 2"]) == (None, ["rank 2"], [])
    assert core(["one", "two"], []) == ["two"]


def stands(culprit: int, tag: str, stack: str) -> list[tuple[float, str]]:
    """What the doctor says of two ranks of which `culprit` computes."""
    states = {
        rank: State(rank, 3, tag if rank == culprit else "F:combine<.0.0", rank != culprit, 3.5, False, (stack,), ())
        for rank in range(2)
    }
    return [(0.0, line) for line in summary(states, {}, 3.0, "logs").splitlines()]


def test_what_a_hang_must_say_is_what_the_doctor_says_of_it_and_of_no_other() -> None:
    stack = '  File "x/fault/plants.py", line 7, in endless\n    while True:\n'
    loop = CASES["loop"].must
    assert explained(stands(0, "F:experts.0.0", stack), loop)[1] == []
    assert len(explained(stands(1, "F:experts.0.0", stack), loop)[1]) == 2  # both ranks
    assert len(explained(stands(0, "F:route.0.0", stack), loop)[1]) == 1  # the instruction
    assert len(explained(stands(0, "F:experts.0.0", stack.replace("plants", "cases")), loop)[1]) == 1  # the call site
    outside = stands(1, "", stack.replace("while True:", "time.sleep(600)").replace("endless", "batch"))
    assert explained(outside, CASES["stall_data"].must)[1] == []


def test_what_a_lost_rank_must_say_has_rank_and_place() -> None:
    said = "rank 1 of 4 was ended by SIGKILL (out of memory?) in step 9, instruction F:mix.1.0; the job was ended"
    first = CASES["kill_rank"].must[0]
    assert re.search(first, said)
    assert not re.search(first, said.replace("rank 1", "rank 2"))
    assert not re.search(first, said.replace(" in step 9, instruction F:mix.1.0", ""))


def test_damage_is_one_bit_or_a_shorter_file_of_the_largest_shard(tmp_path: Path) -> None:
    for name, size in (("__0_0.distcp", 3000), ("__1_0.distcp", 4000), ("values.json", 5000)):
        (tmp_path / name).write_bytes(bytes(size))
    shard = largest_shard(tmp_path)
    assert shard.name == "__1_0.distcp"
    flip_bit(shard)
    assert sum(byte.bit_count() for byte in shard.read_bytes()) == 1
    truncate(shard)
    assert shard.stat().st_size == 3000


def test_a_plant_marks_the_time_of_its_fault_once(tmp_path: Path) -> None:
    job = Job("run", tmp_path, 2)
    job.run.mkdir()
    assert job.fault_began() is None
    before_s = time.time()
    Place(1, job.run).mark()
    began_s = job.fault_began()
    assert began_s is not None and before_s <= began_s <= time.time()
    Place(0, job.run).mark()
    assert job.fault_began() == began_s


def test_a_changed_weight_a_wrong_count_and_a_lost_checkpoint_are_seen(tmp_path: Path) -> None:
    job = Job("run", tmp_path, 2)
    (job.run / "checkpoints").mkdir(parents=True)
    assert nothing_updated(job) == ["updated: {}"]
    for rank in range(2):
        (job.run / f"weights.{rank}").write_text("same")
    assert nothing_updated(job) == []
    (job.run / "weights.1").write_text("changed")
    assert nothing_updated(job) != []
    check = ended_with(failed_saves=1)
    assert len(check(job)) == 2
    (job.run / "summary.json").write_text('{"finished": true, "failed_saves": 1}')
    assert check(job) == []
    (job.run / "checkpoints" / "step_00000004.damaged").mkdir()
    assert check(job) == ["set aside: ['step_00000004.damaged']"]
    assert ended_with(aside="step_00000004.damaged")(job) == []


CHILD = "import subprocess; print('one', flush=True); subprocess.Popen(['sleep', '60'], stdout=-3)"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_process_that_outlives_its_launcher_is_seen_and_ended() -> None:
    command = Command(["-c", CHILD])
    command.wait()
    assert command.launcher.poll() == 0 and len(command.left(0.05)) == 1
    command.kill_all()
    assert command.left() == [] and command.text == "one"


def test_the_command_lists_its_faults_and_refuses_others() -> None:
    def say(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, ROOT / "benchmarks" / "faults.py", *arguments], capture_output=True, text=True)

    assert [line.split()[0] for line in say("--list").stdout.splitlines()[1:]] == list(CASES)
    assert say("--only", "no_such").returncode == 2


def test_the_table_has_its_columns_under_each_other() -> None:
    assert table([{"fault": "a", "left": "0"}, {"fault": "longer", "left": "1"}]) == "fault   left\na       0\nlonger  1"


def test_a_fault_has_something_to_say_unless_nobody_is_left_to_say_it() -> None:
    silent: list[Fault] = [fault for fault in FAULTS if not fault.must]
    assert [fault.name for fault in silent] == ["kill_launcher"]
