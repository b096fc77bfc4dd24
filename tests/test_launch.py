"""Local ranks as real processes: they start together, end together, and none is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megalina import launch, rank_files

ROOT = Path(__file__).resolve().parent.parent
# Starts the script beside it as a rank and ends with the code that pretrain_gpt_moe.py would give.
LAUNCHER = """
import signal, sys
from pathlib import Path
from megalina.launch import RankFailed, Stopped, run_ranks, run_with_restarts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
here = Path(__file__).parent
try:
    run_ranks([sys.executable, str(here / "rank.py")], ranks=int(sys.argv[1]), logs=here / "logs")
except RankFailed as error:
    print(error, file=sys.stderr)
    sys.exit(1)
except Stopped as error:
    sys.exit(128 + error.signum)
"""


class Job:
    """A launcher with its ranks; `rank_code` is what each rank runs, after RANK is read into `rank`."""

    def __init__(self, folder: Path, rank_code: str, ranks: int = 3, launcher: str = LAUNCHER):
        self.folder, self.ranks = folder, ranks
        start = (
            "import os, signal, sys, time\nfrom pathlib import Path\n"
            "rank = int(os.environ['RANK']); here = Path(__file__).parent\n"
            "def ready():\n"
            "    (here / f'part.{rank}').write_text(str(os.getpid()))\n"
            "    os.rename(here / f'part.{rank}', here / f'pid.{rank}')\n"
        )
        (folder / "rank.py").write_text(start + textwrap.dedent(rank_code))
        (folder / "launcher.py").write_text(launcher)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "launcher.py"), str(ranks)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup, which it heeds
        )

    def wait_until_ready(self) -> list[int]:
        deadline = time.monotonic() + 20
        while len(paths := sorted(self.folder.glob("pid.[0-9]"))) < self.ranks:
            assert time.monotonic() < deadline, "the ranks don't start"
            time.sleep(0.02)
        return [int(path.read_text()) for path in paths]

    def finish(self) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its ranks find out and end
            raise
        return self.process.returncode, out, err


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"orphans: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


SLEEP = "ready(); time.sleep(60)"
SAVES_ON_SIGTERM = """
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
ready()
while not stop:
    time.sleep(0.02)
time.sleep(0.2)
(here / f"saved.{rank}").touch()
"""
IGNORES_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)"


def test_rank_0_is_heard_and_all_know_their_place(tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"import json; print(json.dumps([os.environ[n] for n in {names}])); (here / f'done.{{rank}}').touch()"
    rc, out, err = Job(tmp_path, code).finish()
    assert (rc, err) == (0, "")
    place = json.loads(out)
    assert place[:5] == ["0", "3", "0", "3", "127.0.0.1"]
    assert len(list(tmp_path.glob("done.*"))) == 3
    quiet = json.loads((tmp_path / "logs" / "rank_2.log").read_text())
    assert quiet == ["2", "3", "2", *place[3:]]


def test_threads_are_shared_out_unless_the_user_has_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Job(tmp_path, code, ranks=1).finish()[1] == "7\n"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Job(tmp_path, code, ranks=1).finish()[1] == f"{launch.num_cores()}\n"


def test_a_rank_that_raises_ends_the_job_with_its_traceback(tmp_path: Path) -> None:
    job = Job(tmp_path, "ready()\nif rank == 1: raise KeyError('the lost key')\ntime.sleep(60)")
    pids = job.wait_until_ready()
    start = time.monotonic()
    rc, _, err = job.finish()
    assert rc == 1
    assert time.monotonic() - start < 3
    assert "rank 1 of 3 failed with exit code 1" in err
    assert "[rank 1] KeyError: 'the lost key'" in err
    wait_until_gone(pids)


def test_the_rank_that_failed_is_blamed_and_not_the_one_that_lost_it(tmp_path: Path) -> None:
    code = """
    ready()
    if rank == 2:
        time.sleep(0.3)
        raise ValueError("the cause")
    if rank == 1:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    time.sleep(60)
    """
    rc, _, err = Job(tmp_path, code).finish()
    assert rc == 1
    assert "rank 2 of 3 failed" in err
    assert "the cause" in err
    assert "closed by peer" not in err


@pytest.mark.full
def test_a_rank_that_crashes_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "ready()\nif rank == 2: os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(60)")
    pids = job.wait_until_ready()
    rc, _, err = job.finish()
    assert rc == 1
    assert "rank 2 of 3 was ended by SIGSEGV" in err
    wait_until_gone(pids)


def test_the_children_of_a_rank_end_with_it(tmp_path: Path) -> None:
    code = """
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    (here / "child").write_text(str(child.pid))
    sys.exit(3)
    """
    job = Job(tmp_path, code, ranks=1)
    rc, _, err = job.finish()
    assert rc == 1
    assert "exit code 3" in err
    wait_until_gone([int((tmp_path / "child").read_text())])


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.full) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_signal_lets_the_ranks_save(tmp_path: Path, signum: signal.Signals) -> None:
    job = Job(tmp_path, SAVES_ON_SIGTERM)
    pids = job.wait_until_ready()
    job.process.send_signal(signum)
    rc, _, err = job.finish()
    assert rc == 128 + signum
    assert len(list(tmp_path.glob("saved.*"))) == 3
    assert f"{signum.name}: the ranks finish their step" in err
    wait_until_gone(pids)


@pytest.mark.full
def test_a_second_signal_kills(tmp_path: Path) -> None:
    job = Job(tmp_path, IGNORES_SIGTERM)
    pids = job.wait_until_ready()
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert all(map(alive, pids))
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 130
    wait_until_gone(pids)


def test_a_rank_that_dies_of_the_signal_takes_the_others_along(tmp_path: Path) -> None:
    job = Job(tmp_path, "if rank: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP)
    pids = job.wait_until_ready()
    job.process.send_signal(signal.SIGTERM)
    assert job.finish()[0] == 143
    wait_until_gone(pids)


def test_killing_the_launcher_leaves_no_rank(tmp_path: Path) -> None:
    job = Job(tmp_path, IGNORES_SIGTERM)
    pids = job.wait_until_ready()
    job.process.kill()
    assert job.finish()[0] == -signal.SIGKILL
    wait_until_gone(pids)


RESTARTER = LAUNCHER.replace("run_ranks(", "run_with_restarts(").replace(
    'logs=here / "logs")',
    'logs=here / "logs", restarts=2, again=lambda: ([sys.executable, str(here / "rank.py"), "later"], "from here"))',
)
FIRST_START_ONLY = "later = len(sys.argv) > 1\n(here / f'started.{rank}.{later}').touch()\n"


def test_a_lost_rank_starts_all_again_and_what_was_written_is_kept(tmp_path: Path) -> None:
    code = "print('words of', rank, flush=True)\nif rank == 1 and not later: time.sleep(1); os.kill(os.getpid(), 9)"
    rc, _, err = Job(tmp_path, FIRST_START_ONLY + code, launcher=RESTARTER).finish()
    assert rc == 0
    assert err.count("rank 1 of 3 was ended by SIGKILL") == 1
    assert err.count("start 2 of 3, from here; logs of the failed one: ") == 1
    assert (tmp_path / "logs" / "start_1" / "rank_2.log").read_text() == "words of 2\n"
    assert (tmp_path / "logs" / "rank_2.log").read_text() == "words of 2\n"
    assert len(list(tmp_path.glob("started.*.True"))) == 3


@pytest.mark.full
def test_the_last_start_that_fails_ends_the_job(tmp_path: Path) -> None:
    rc, _, err = Job(tmp_path, "if rank == 2: raise KeyError('again')\ntime.sleep(60)", launcher=RESTARTER).finish()
    assert rc == 1
    assert (err.count("start 2 of 3"), err.count("start 3 of 3"), err.count("start 4")) == (1, 1, 0)
    assert err.count("KeyError: 'again'") == 3


@pytest.mark.full
def test_settings_that_are_refused_are_not_tried_again(tmp_path: Path) -> None:
    rc, _, err = Job(tmp_path, "if rank == 1: sys.exit(2)\ntime.sleep(60)", launcher=RESTARTER).finish()
    assert rc == 1
    assert "start 2" not in err


def test_a_signal_is_no_reason_to_start_again(tmp_path: Path) -> None:
    job = Job(tmp_path, SLEEP, launcher=RESTARTER)
    pids = job.wait_until_ready()
    job.process.send_signal(signal.SIGTERM)
    rc, _, err = job.finish()
    assert rc == 143
    assert "start 2" not in err
    wait_until_gone(pids)


def test_the_message_says_where_each_rank_was(tmp_path: Path) -> None:
    code = """
    from megalina.collective_log import Position
    from megalina.rank_files import position_path
    position = Position()
    position.mirror(position_path(here / "logs", rank))
    position.step = 7
    position.enter("F:experts.1.0" if rank == 1 else "F:combine<.1.0", rank != 1)
    ready()
    if rank == 1:
        while len(list(here.glob("pid.[0-9]"))) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    err = Job(tmp_path, code).finish()[2]
    assert "rank 1 of 3 was ended by SIGKILL (out of memory?) in step 7, instruction F:experts.1.0" in err
    assert "ranks 0, 2 were in step 7, instruction F:combine<.1.0" in err


@pytest.mark.parametrize("room", [pytest.param(True, marks=pytest.mark.full), False])
def test_a_last_state_that_could_not_be_saved_is_told_in_one_line(tmp_path: Path, room: bool) -> None:
    """`room`: for a rank's words on the disk; else rank 0's are on our stderr."""
    code = f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from megalina import worker
    from megalina.rank_files import Unsaved
    def train(config):
        time.sleep(rank / 5)
        raise Unsaved("make room")
    worker.load_config = lambda text: None
    if not {room}: worker.traceback_path = lambda logs, rank: here / "no" / "folder"
    (here / "config.yaml").touch()
    sys.exit(worker.main([str(here / "config.yaml")], train))
    """
    code, out, err = Job(tmp_path, code).finish()
    assert (code, out) == (1, "")
    assert err == ("make room\n" if room else "make room\nthe last state could not be saved\n")


def test_torchrun_and_slurm_are_joined_by_their_variables() -> None:
    assert launch.joined({}) is None
    assert launch.joined({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    place = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    member = launch.joined(place)
    assert member is not None
    assert member.environment() == place
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NODELIST": "gpu[003-004]",
        "SLURM_JOB_ID": "123456",
    }
    assert launch.joined(slurm) == launch.Member("slurm", 5, 8, 1, 4, "gpu003", 20000 + 123456 % 20000)


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("SLURM_NTASKS", {"SLURM_PROCID": "0", "SLURM_NTASKS": "abc"}),
        ("SLURM_PROCID", {"SLURM_PROCID": "", "SLURM_NTASKS": "2"}),
        ("SLURM_LOCALID", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "x"}),
        ("SLURM_JOB_ID", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "x"}),
        ("MASTER_PORT", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_PORT": "1e3"}),
        ("WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "two"}),
        ("RANK", {"RANK": "-1", "WORLD_SIZE": "2"}),
        ("LOCAL_RANK", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0.5"}),
        ("LOCAL_WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "?"}),
    ],
)
def test_a_variable_that_is_no_number_is_named(name: str, variables: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"^{name}={re.escape(variables[name])} in the environment must be a whole number"):
        launch.joined(variables)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-006,9],cpu1", "gpu003"), ("a-[7,9]-x,b", "a-7-x"), ("login,gpu[1-2]", "login")],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, first: str) -> None:
    assert launch.first_host(nodes) == first


FAKE_RUN = """
import sys
sys.path.insert(0, {root!r})
from megalina.cli import train as command
from megalina.config import PretrainConfig
def train(config: PretrainConfig) -> dict:
    import os
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    ranks = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(ranks)
    dist.destroy_process_group()
    return dict(run_dir=config.run.dir, steps=config.train.steps, val_loss=float(ranks), unigram_loss=2.0, tokens_per_s=1.0)
command.check_data = lambda config: 512
command._train = lambda config: command.worker.work(config, train)
import os, time
time.sleep(1.1 * int(os.environ.get("RANK") or os.environ["SLURM_PROCID"]))  # the clocks read another second
if {other}: sys.argv.append("train.steps=7")
sys.exit(command.main())
"""


def torchrun(folder: Path, *arguments: str, other: str = "False") -> "subprocess.CompletedProcess[str]":
    (folder / "fake.py").write_text(FAKE_RUN.format(root=str(ROOT), other=other))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "fake.py")]
    return subprocess.run([sys.executable, *command, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.full
def test_ranks_under_torchrun_share_one_run_folder(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "train.steps=3")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["steps"], summary["val_loss"]) == (3, 3.0)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(summary["run_dir"]).name]
    assert "steps: 3" in (tmp_path / summary["run_dir"] / "config.yaml").read_text()


@pytest.mark.full
def test_ranks_with_another_configuration_are_refused(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "run.dir=here", other="__import__('os').environ['RANK'] == '1'")
    assert done.returncode != 0
    assert re.search(r"^rank 1 differs from rank 0: train.steps is 7, not 100; start all ranks", done.stderr, re.MULTILINE)
    assert not (tmp_path / "here").exists()


@pytest.mark.full
def test_bad_input_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "parallel.ep=3")
    assert done.returncode != 0
    line = "parallel.tp (1) x parallel.ep (3) must divide the number of ranks (2)"
    assert len(re.findall(f"^{re.escape(line)}", done.stderr, re.MULTILINE)) == 1
    cause = done.stderr.split("Root Cause (first observed failure):")[1]  # with which torchrun's own report ends
    assert "rank      : 0 " in cause and f"traceback : {line}" in cause
    assert not (tmp_path / "runs").exists()


def test_torchrun_is_told_why_a_rank_ended(tmp_path: Path) -> None:
    rank_files.tell_agent("train.steps=0 must be at least 1", {})  # nobody to tell
    path = tmp_path / "error.json"
    rank_files.tell_agent("train.steps=0 must be at least 1", {"TORCHELASTIC_ERROR_FILE": str(path)})
    failure = ProcessFailure(local_rank=1, pid=2, exitcode=2, error_file=str(path))
    assert abs(failure.timestamp - time.time()) < 5
    report = str(ChildFailedError("job", {1: failure})).splitlines()
    assert report[-2].strip() == "traceback : train.steps=0 must be at least 1" and set(report[-1]) == {"="}
    rank_files.tell_agent("no such folder", {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "gone" / "error.json")})


def slurm(folder: Path, *arguments: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each of two tasks, as srun would start them."""
    (folder / "fake.py").write_text(FAKE_RUN.format(root=str(ROOT), other="False"))
    port = str(launch.free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(folder / "fake.py"), "cluster.timeout_s=30", *arguments],
            cwd=folder,
            env={
                **os.environ,
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS": "2",
                "SLURM_JOB_NODELIST": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=60) for rank in ranks]
    return [(rank.returncode, *text) for rank, text in zip(ranks, texts, strict=True)]


@pytest.mark.full
def test_ranks_under_slurm_share_one_run_folder(tmp_path: Path) -> None:
    first, second = slurm(tmp_path)
    assert (first[0], second[0]) == (0, 0)
    assert json.loads(first[1].splitlines()[-1])["val_loss"] == 3.0
    assert second[1] == ""
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.full
def test_bad_input_under_slurm_ends_all_ranks_and_is_said_once(tmp_path: Path) -> None:
    first, second = slurm(tmp_path, "parallel.ep=3")
    assert (first[0], second[0]) == (2, 2)
    assert "parallel.tp (1) x parallel.ep (3) must divide the number of ranks (2)" in first[2]
    assert "must divide" not in second[2]
    assert "found no agreement" not in second[2]
