"""The prefetch gives the very batches that were asked for, makes the next one meanwhile, and leaves nothing behind."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalina.batch import Batch
from megalina.config import DataConfig
from megalina.data.indexed import IndexedWriter
from megalina.data.prefetch import PREFETCH, Prefetch
from megalina.data.source import open_data
from tests.train.small_run import random_batch

CPU = torch.device("cpu")


class Made:
    """What was asked of the source, and by which threads."""

    def __init__(self, act: Callable[[int], None] = lambda first: None):
        self.asked: list[tuple[int, int]] = []
        self.threads: list[str] = []
        self._act = act

    def __call__(self, first: int, count: int) -> Batch:
        self.asked.append((first, count))
        self.threads.append(threading.current_thread().name)
        self._act(first)
        return random_batch(count, first=first)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens_BS, b.tokens_BS) and torch.equal(a.sample_B, b.sample_B)


def threads() -> set[int | None]:
    return {t.ident for t in threading.enumerate() if t.name.startswith(PREFETCH)}


def test_the_next_batch_is_made_on_another_thread_and_each_only_once() -> None:
    made = Made()
    prefetch = Prefetch(made, CPU)
    for first in (0, 4, 8):
        assert same(prefetch.take(first, 4, following=first + 4), random_batch(4, first=first))
    prefetch.close()
    assert made.asked[:3] == [(0, 4), (4, 4), (8, 4)] and made.asked[3:] in ([], [(12, 4)])
    assert made.threads[0] == threading.current_thread().name and all(name.startswith(PREFETCH) for name in made.threads[1:])


def test_it_is_made_while_the_caller_goes_on() -> None:
    going_on = threading.Event()
    prefetch = Prefetch(Made(lambda first: assert_(going_on.wait(30.0)) if first == 4 else None), CPU)
    prefetch.take(0, 4, following=4)
    going_on.set()  # a batch that were made before `take` returned would wait in vain
    assert same(prefetch.take(4, 4, following=None), random_batch(4, first=4))
    prefetch.close()


def assert_(true: bool) -> None:
    assert true


def test_another_batch_than_the_expected_one_is_made_anew() -> None:
    """As after a rewind; the number of sequences may be another one too."""
    made = Made()
    prefetch = Prefetch(made, CPU)
    prefetch.take(0, 4, following=4)
    assert same(prefetch.take(40, 4, following=44), random_batch(4, first=40))
    assert same(prefetch.take(44, 2, following=46), random_batch(2, first=44))
    assert same(prefetch.take(46, 2, following=None), random_batch(2, first=46))
    prefetch.close()
    assert {(40, 4), (44, 2), (46, 2)} <= set(made.asked)


def fails_at(bad: int) -> Callable[[int], None]:
    def act(first: int) -> None:
        if first == bad:
            raise OSError("tokens.bin: the disk is gone")

    return act


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    prefetch = Prefetch(Made(fails_at(8)), CPU)
    prefetch.take(0, 4, following=4)
    prefetch.take(4, 4, following=8)
    with pytest.raises(OSError, match="^tokens.bin: the disk is gone$"):
        prefetch.take(8, 4, following=12)
    with pytest.raises(OSError, match="^tokens.bin: the disk is gone$"):
        prefetch.take(8, 4, following=12)
    prefetch.close()


def test_an_error_of_a_batch_that_nobody_asks_for_is_none() -> None:
    prefetch = Prefetch(Made(fails_at(8)), CPU)
    prefetch.take(4, 4, following=8)
    assert same(prefetch.take(16, 4, following=8), random_batch(4, first=16))
    prefetch.close()


def test_no_thread_is_left_and_none_is_made_for_the_last_batch() -> None:
    before = threads()  # of runs in this process that were not closed
    prefetch = Prefetch(Made(), CPU)
    prefetch.take(0, 4, following=None)
    assert threads() == before
    prefetch.take(4, 4, following=8)
    assert len(threads() - before) == 1
    prefetch.close()
    assert threads() <= before
    assert same(prefetch.take(8, 4, following=12), random_batch(4, first=8))  # it begins anew
    prefetch.close()
    assert threads() <= before


@pytest.mark.full
def test_a_process_that_never_closes_it_ends_all_the_same() -> None:
    code = (
        "import torch; from megalina.data.prefetch import Prefetch\n"
        "import time; p = Prefetch(lambda first, count: time.sleep(0.2), torch.device('cpu')); p.take(0, 1, following=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_on_cuda_it_is_made_in_page_locked_memory_of_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[torch.device, str]] = []
    here: list[torch.device] = []

    class On:
        def __init__(self, device: torch.device):
            self.device = device

        def __enter__(self) -> None:
            here.append(self.device)

        def __exit__(self, *_: object) -> None:
            here.pop()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append((here[-1], threading.current_thread().name))
        return tensor

    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    prefetch = Prefetch(Made(), torch.device("cuda", 3))
    prefetch.take(0, 4, following=4)
    assert same(prefetch.take(4, 4, following=None), random_batch(4, first=4))
    prefetch.close()
    assert {device for device, _ in pinned} == {torch.device("cuda", 3)}
    assert len(pinned) == 2 * 6  # six tensors a batch; there are no documents
    assert all(name.startswith(PREFETCH) for _, name in pinned[6:])


def test_several_threads_may_ask_one_source(tmp_path: Path) -> None:
    """Blends and datasets keep the index that was asked for last."""
    for name in ("a", "b"):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for i in range(20):
                writer.add_document(np.arange(i, i + 9) % 50)
    blend: list[Any] = [0.7, str(tmp_path / "a"), 0.3, str(tmp_path / "b")]
    config = DataConfig(kind="indexed", blend=blend, cache_dir=str(tmp_path / "cache"), split="1")
    numbers = [0, 70_000, 3, 140_000, 40, 69_999, 200, 7]  # of several blocks of the blend and epochs of the data
    want = [open_data(config, seq_len=8, seed=0).train.batch(first, 2) for first in numbers]
    source, found = open_data(config, seq_len=8, seed=0).train, dict[int, list[Batch]]()

    def ask(turn: int) -> None:
        found[turn] = [source.batch(first, 2) for _ in range(10) for first in numbers]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        asking = [threading.Thread(target=ask, args=(turn,)) for turn in range(3)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(found) == 3 and all(same(a, b) for batches in found.values() for a, b in zip(batches, want * 10, strict=True))
