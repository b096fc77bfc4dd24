"""The order of the modules, and which megalina the processes that tests start will import."""

import os
from pathlib import Path

import pytest

LONG = (  # modules that take half a minute or more, the longest first
    *("verify/test_layouts.py", "train/test_trainer.py", "parallel/test_random_delays.py", "train/test_repack.py"),
    *("test_measure_cluster.py", "forecast/test_sequence.py", "train/test_run_state.py", "infer/test_engine.py"),
    *("sim/test_memory.py", "train/test_recovery.py", "train/test_replay.py", "verify/test_verify_layouts.py"),
    *("checkpoint/test_checkpoints.py", "parallel/test_executor.py", "compare/test_contest.py"),
    *("benchmarks/test_validate_simulator.py", "test_analyze_alltoall.py", "sim/test_network.py", "train/test_doctor.py"),
)
TESTS = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = str(TESTS.parent)  # this one, from whatever folder, also where another clone is installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first: workers take one module after another, and the last ones should be short."""
    place = {TESTS / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
