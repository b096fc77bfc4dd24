"""The pool of ranks: results in order, every way to fail said in words and in time, no process left, nothing inherited."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import megalina
from megalina.rank_pool import BACKWARD, RankPool, RanksFailed
from tests.parallel.ranks import PRELOAD, run_on_ranks

ROOT = Path(__file__).resolve().parent.parent


def on_rank_1(fault: str) -> int:
    """The others wait for it."""
    if dist.get_rank() == 1:
        if fault == "raises":
            raise KeyError("the lost key")
        if fault == "exits":
            sys.exit(3)
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(600)
        if fault == "fails a test":
            pytest.fail("not what was expected")
        if fault == "gives what cannot be sent":
            return lambda: 0  # type: ignore[return-value]
    dist.barrier()
    return dist.get_rank()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raises", r"^rank 1 of 3: KeyError: 'the lost key'\nTraceback(.|\n)*in on_rank_1\n"),
        ("exits", r"^rank 1 of 3 ended with exit code 3"),
        ("killed", r"^rank 1 of 3 was ended by SIGKILL"),
        ("fails a test", r"^rank 1 of 3: Failed: not what was expected"),
        ("gives what cannot be sent", r"^rank 1 of 3: .*(pickle|local object)"),
    ],
)
def test_the_rank_at_fault_is_named_and_none_is_left(fault: str, text: str) -> None:
    with RankPool(preload=PRELOAD) as pool:
        assert pool.run(3, on_rank_1, "") == [0, 1, 2]
        pids = pool.pids
        started_s = time.monotonic()
        with pytest.raises(RanksFailed, match=text):
            pool.run(3, on_rank_1, fault)
        assert time.monotonic() - started_s < 30
        assert pool.pids == [] and not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert pool.run(3, on_rank_1, "") == [0, 1, 2]  # on new ones
    assert multiprocessing.active_children() == []


def test_a_rank_that_hangs_fails_its_job_in_time() -> None:
    with RankPool(time_limit_s=2, preload=PRELOAD) as pool:
        assert pool.run(2, dist.get_rank) == [0, 1]
        started_s = time.monotonic()
        with pytest.raises(RanksFailed, match=r"^no answer from rank 0, 1 of 2 after 2 s$"):
            pool.run(2, on_rank_1, "hangs")
        assert time.monotonic() - started_s < 30
    assert multiprocessing.active_children() == []


def stays(path: Path) -> None:
    """A thread that outlives the job."""
    if dist.get_rank() == 0:
        threading.Thread(target=time.sleep, args=(600,)).start()
        path.touch()


@pytest.mark.full
def test_a_rank_that_does_not_end_after_its_job_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalina.rank_pool.END_S", 1.0)
    with pytest.raises(RanksFailed, match=r"^rank 0 of 2 does not end$"):
        run_on_ranks(2, stays, tmp_path / "done")
    assert (tmp_path / "done").exists()
    assert multiprocessing.active_children() == []


def state() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "word": os.environ.get("WORD"),
        "rank": (os.environ["RANK"], os.environ["WORLD_SIZE"], dist.get_rank(), dist.get_world_size(), dist.get_backend()),
        "threads": torch.get_num_threads(),
        "random": random.getrandbits(64),
        "numpy": int(np.random.randint(2**60)),
        "torch": float(torch.rand((), dtype=torch.float64)),
        "megalina": megalina.__file__,
    }


def test_ranks_have_the_environment_and_folder_of_now_and_are_new_for_each_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", "one")
    before = run_on_ranks(2, state)
    monkeypatch.delenv("WORD")
    monkeypatch.chdir(tmp_path)
    after = run_on_ranks(2, state)
    assert [(s["word"], s["cwd"]) for s in before + after] == [("one", str(ROOT))] * 2 + [(None, str(tmp_path))] * 2
    assert len({s["pid"] for s in before + after}) == 4
    assert [s["rank"] for s in after] == [("0", "2", 0, 2, "gloo"), ("1", "2", 1, 2, "gloo")]
    assert {s["threads"] for s in before + after} == {1}
    for drawn in ("random", "numpy", "torch"):
        assert len({s[drawn] for s in before + after}) == 4, drawn


@pytest.mark.full
def test_a_server_started_in_another_folder_imports_the_same_files(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.parallel.ranks import run_on_ranks\n"
        "from tests.test_rank_pool import state\n"
        "if __name__ == '__main__': print(run_on_ranks(1, state)[0]['megalina'])\n"
    )
    (tmp_path / "megalina").mkdir()
    (tmp_path / "megalina" / "__init__.py").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "script.py").write_text(script)
    found = subprocess.run([sys.executable, tmp_path / "script.py"], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert found.stdout.strip() == str(ROOT / "megalina" / "__init__.py"), found.stderr


def preloaded() -> list[str]:
    return [name for name in (*PRELOAD, BACKWARD) if name not in sys.modules]


def imported_by_a_backward() -> list[str]:
    x = torch.ones(2, requires_grad=True)
    before = set(sys.modules)
    torch.autograd.backward([x * 2], [torch.ones(2)])
    return sorted(sys.modules.keys() - before)


def test_a_ranks_first_backward_imports_nothing() -> None:
    assert run_on_ranks(1, imported_by_a_backward) == [[]]


def test_what_takes_long_to_import_is_there_before_a_rank_is_forked() -> None:
    """The server ends with a child of its own that has imported nothing but this module."""
    process = multiprocessing.get_context("forkserver").Process(target=_nothing_is_missing)
    run_on_ranks(1, preloaded)  # starts the server
    process.start()
    process.join()
    assert process.exitcode == 0


def _nothing_is_missing() -> None:
    sys.exit(len(preloaded()))
