"""benchmarks/import_checkpoint.py: an import needs one shard and one tensor, whatever the model has."""

from pathlib import Path

import pytest

from benchmarks.import_checkpoint import run, table
from tests.checkpoint.hugging_face.test_prove import needs_transformers

OTHER = 30e6  # bytes that libraries and the allocator take as they are used first


@needs_transformers
@pytest.mark.full
def test_an_import_holds_one_shard_and_one_tensor(tmp_path: Path) -> None:
    found = run(tmp_path, layers=4)
    for one in found["imports"].values():
        assert one["peak_bytes"] < one["largest_shard_bytes"] + one["largest_tensor_bytes"] + OTHER
    assert found["imports"]["checkpoint"]["peak_bytes"] < 0.4 * found["imports"]["checkpoint"]["num_bytes"]
    for ranks in found["loads"].values():  # gradients and optimizer state are there before
        assert all(rank["after_bytes"] - rank["built_bytes"] < 100e6 and rank["peak_bytes"] < 250e6 for rank in ranks)
    whole = found["loads"]["1"][0]["weight_bytes"]
    assert len(found["loads"]["4"]) == 4 and all(rank["weight_bytes"] < 0.6 * whole for rank in found["loads"]["4"])
    assert found["weights_alone"]["megalina.open_checkpoint"]["weight_bytes"] == whole
    text = table(found)
    assert "tp=2 ep=2, rank 3" in text and "transformers" in text
