"""`train.deterministic=true` runs on this machine's kernels, and changes no bit where they are deterministic already."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megalina.train.trainer import train
from tests.train.small_run import config_of, records_of, write_tokens
from tests.train.test_trainer import _process_state  # noqa: F401  handlers of signals come back


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deterministic_run_is_possible_and_equal_to_the_bit(tmp_path: Path, dtype: str) -> None:
    write_tokens(tmp_path / "tokens")
    plain = records_of(config_of(tmp_path, "plain", steps=3, dtype=dtype, capacity_factor=1.0)).of("loss")
    config = config_of(tmp_path, "deterministic", steps=3, dtype=dtype, capacity_factor=1.0)
    config.train.deterministic = True
    train(config)
    assert torch.are_deterministic_algorithms_enabled()
    lines = (tmp_path / "deterministic" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == plain
