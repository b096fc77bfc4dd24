"""Samples whose routing is replayed: each token gets its own sequence's choices, whatever the order of the data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megalina.batch import Batch
from megalina.config import DataConfig, ModelConfig, PretrainConfig, RouterConfig, TrainConfig
from megalina.data.indexed import IndexedWriter
from megalina.data.replayed import replayed
from megalina.data.source import open_data
from megalina.placement.routing_trace import RoutingTrace, traced, write_trace
from megalina.placement.traced_text import TracedText

LENGTH, LAYERS, MOE = 8, 3, (1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replayed")
    with IndexedWriter(folder / "tokens", np.uint16) as writer:
        for document in range(30):
            writer.add_document(np.random.default_rng(document).integers(0, 50, 7 + document % 5))
    return folder


def config_of(folder: Path, **router: str) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(num_layers=LAYERS, dense_layers_first=1, num_experts=4),
        router=RouterConfig(**router),  # type: ignore[arg-type]
        data=DataConfig(kind="indexed", prefix=str(folder / "tokens"), cache_dir=str(folder / "cache"), split="80,20"),
        train=TrainConfig(seq_len=LENGTH, seed=3),
    )


def trace_of(batch: Batch) -> RoutingTrace:
    """Choices follow from the tokens before: no two sequences have the same."""
    valid_BS = batch.valid_BS.numpy()
    ids = np.random.default_rng(0).random((int(valid_BS.sum()), len(MOE), 4)).argsort(2)[..., :2]
    tokens = TracedText(batch.tokens_BS.numpy()[valid_BS])
    return traced(ids.astype(np.uint8), 4, sample_lengths_S=valid_BS.sum(1), layers=MOE, name="r", text=tokens)


def test_sequences_get_their_own_choices_and_padding_none(folder: Path, tmp_path: Path) -> None:
    plain = open_data(config_of(folder).data, seq_len=LENGTH, seed=3)
    assert plain.valid is not None
    known = plain.valid.batch(0, plain.valid.num_sequences)
    trace = trace_of(known)
    write_trace(tmp_path / "r.npz", trace)
    data = replayed(plain, config_of(folder, replay_validation=str(tmp_path / "r.npz")))
    assert data.train is plain.train and data.valid is not None
    starts = np.cumsum(trace.sample_lengths_S) - trace.sample_lengths_S
    for numbers in ((0, 1, 2), (1, 2, 3), (0, 2, 4)):
        batch = data.valid.batch(numbers[0], 3, numbers[1] - numbers[0])
        assert torch.equal(batch.tokens_BS, known.tokens_BS[list(numbers)]) and batch.replay_BSLK is not None
        for row, number in zip(batch.replay_BSLK, numbers, strict=True):
            length = int(trace.sample_lengths_S[number])
            assert np.array_equal(row[:length, list(MOE)], trace.expert_ids_TLK[starts[number] : starts[number] + length])
            assert bool((row[length:] == -1).all()) and bool((row[:, 0] == -1).all())


def test_a_sequence_that_the_file_lacks_is_named_with_the_setting(folder: Path, tmp_path: Path) -> None:
    plain = open_data(config_of(folder).data, seq_len=LENGTH, seed=3)
    write_trace(tmp_path / "r.npz", trace_of(plain.train.batch(0, 4)))
    data = replayed(plain, config_of(folder, replay=str(tmp_path / "r.npz")))
    assert data.train.batch(0, 4).replay_BSLK is not None
    with pytest.raises(ValueError, match=r"^router.replay: sequence 4 isn't among the 4 sequences of trace r: .* in token \d"):
        data.train.batch(3, 2)


def test_without_a_file_the_data_is_as_it_was(folder: Path) -> None:
    plain = open_data(config_of(folder).data, seq_len=LENGTH, seed=3)
    assert replayed(plain, config_of(folder)) is plain
    assert plain.train.batch(0, 2).replay_BSLK is None
