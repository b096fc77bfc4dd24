"""The pool: processes are reused, a row that fails takes only itself along, and none is left."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalina.rank_pool import RanksFailed
from megalina.verify.compare import compare
from megalina.verify.on_ranks import Pool
from megalina.verify.recording import Layout
from megalina.verify.reference import record
from megalina.verify.start import random_batches
from tests.verify.cases import config_with

ROOT = Path(__file__).resolve().parent.parent.parent


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not asked after counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_rows_of_one_world_share_processes_and_a_failed_row_gets_new_ones() -> None:
    config = config_with()
    batches = random_batches(config, 1)
    reference = record(config, batches)
    with Pool() as pool:
        first = pool.record(config, Layout(2, 1, 2), batches)
        used = pool.pids
        second = pool.record(config, Layout(2, 2), batches)
        assert pool.pids == used
        broken = replace(batches[0], tokens_BS=batches[0].tokens_BS + 10**6)  # no such words
        with pytest.raises(RanksFailed, match=r"^rank \d of 2: IndexError: index out of range(.|\n)*in instruction F:embed"):
            pool.record(config, Layout(2, 1, 2), [broken])
        assert gone(used, 5)
        third = pool.record(config, Layout(2, 1, 2), batches)
        new = pool.pids
        assert not set(new) & set(used)
        fourth = pool.record(config, Layout(1), batches)
        assert gone(new, 5)
        last = pool.pids
        assert len(last) == 1
    assert gone(last, 5)
    for recording in (first, second, third, fourth):
        assert compare(reference, recording).first is None


def test_a_rank_that_dies_or_takes_too_long_fails_the_row() -> None:
    config = config_with()
    batches = random_batches(config, 1)
    with Pool() as pool:
        pool.record(config, Layout(2, 1, 2), batches)
        pids = pool.pids
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(RanksFailed, match="^rank 1 of 2 was ended by SIGKILL"):
            pool.record(config, Layout(2, 1, 2), batches)
        assert gone(pids, 5)
    with Pool(time_limit_s=0.02) as pool:
        pool.record(config, Layout(1), batches)  # the first row waits for the start as well
        pids = pool.pids
        os.kill(pids[0], signal.SIGSTOP)
        with pytest.raises(RanksFailed, match=r"no answer from rank 0 of 1 after 0.02 s"):
            pool.record(config, Layout(1), batches)
        assert gone(pids, 5)


def test_what_a_rank_has_is_a_part_of_the_whole_and_the_rest_is_marked() -> None:
    config = config_with()
    batches = random_batches(config, 1)
    with Pool() as pool:
        recording = pool.record(config, Layout(2, 2, zero=1), batches)
        of_data = pool.record(config, Layout(2, 1, 2, zero=1), batches)
    ranks = recording.entry(0, "activation", "layers.0").by_rank
    assert ranks is not None
    held = torch.stack([~r.isnan() for r in ranks])
    assert held.sum(0).eq(1).all()  # with sequence parallelism each token is on one rank
    assert held[0].any() and held[1].any()
    query = recording.entry(0, "gradient", "layers.0.attention.q").by_rank
    assert query is not None
    half = len(query[0]) // 2
    assert [not q[:half].isnan().any() for q in query] == [True, False]
    assert [not q[half:].isnan().any() for q in query] == [False, True]
    experts = of_data.entry(0, "gradient", "layers.0.experts.w1").by_rank
    assert experts is not None
    assert [int((~e[:, 0, 0].isnan()).sum()) for e in experts] == [2, 2]  # of 4 experts
    embedding = of_data.entry(0, "gradient", "embedding")
    assert embedding.by_rank is not None
    shards = torch.stack([~e.isnan() for e in embedding.by_rank])
    assert shards.sum(0).eq(1).all()  # ZeRO-1: a slice each
    assert embedding.value.shape == (config.model.vocab_size, config.model.d_model)  # without padded words
    weight = of_data.entry(0, "weight", "embedding").by_rank
    assert weight is not None
    assert all(not w.isnan().any() for w in weight)


@pytest.mark.full
def test_no_rank_outlives_its_parent_even_inside_a_collective() -> None:
    script = (
        "from tests.verify.test_pool import *\n"
        "config = config_with()\n"
        "with Pool() as pool:\n"
        "    pool.record(config, Layout(2, 1, 2), random_batches(config, 1))\n"
        "    os.kill(pool.pids[1], signal.SIGSTOP)\n"  # the other rank waits for it
        "    pool.start_row(config, Layout(2, 1, 2), random_batches(config, 1))\n"
        "    time.sleep(0.5)\n"
        "    print(*pool.pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2
        assert all(map(alive, pids))
        parent.kill()
    assert gone(pids[:1], 20)
    os.kill(pids[1], signal.SIGCONT)
    assert gone(pids, 20)
