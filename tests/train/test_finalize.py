"""What rank 0 does when a run ends: texts by the trained model for the report, and reasons where there are none."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megalina.config import PretrainConfig
from megalina.data.source import TokenData, open_data
from megalina.train import finalize
from megalina.train.finalize import write_samples
from tests.train.small_run import VOCABULARY, checkpoint, config_of, records_of, write_tokens


class Words:
    """A tokenizer whose words are numbers."""

    eod, vocab_size = VOCABULARY - 1, VOCABULARY

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, TokenData, Path]:
    folder = tmp_path_factory.mktemp("trained")
    write_tokens(folder / "tokens")
    config = config_of(folder, "run", steps=1)
    records_of(config)
    config.tracker.samples, config.tracker.sample_tokens = 2, 3
    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    return config, replace(data, tokenizer=Words()), checkpoint(config, 1)  # type: ignore[arg-type]


@pytest.mark.full
def test_texts_go_on_with_validation_texts(trained: tuple[PretrainConfig, TokenData, Path]) -> None:
    config, data, path = trained
    samples = write_samples(config, data, path)
    assert len(samples) == 2 and samples[0] != samples[1]
    for sample in samples:
        assert len(sample.prompt.split()) == config.train.seq_len // 2 and 0 <= len(sample.text.split()) <= 3
    assert write_samples(config, data, path) == samples  # each has a seed of its own


def test_without_a_tokenizer_there_are_none_and_where_they_can_not_be_the_log_says_why(
    trained: tuple[PretrainConfig, TokenData, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, data, path = trained
    assert (
        write_samples(config, replace(data, tokenizer=None), path) == [] == write_samples(config, replace(data, valid=None), path)
    )
    with caplog.at_level(logging.WARNING):
        assert write_samples(config, data, path.parent / "step_00000002") == []
        monkeypatch.setattr(finalize, "MOST_PARAMETERS", 1)
        assert write_samples(config, data, path) == []
    assert [record.message.startswith("no samples in the report: ") for record in caplog.records] == [True, True]
    assert "use tools/generate.py" in caplog.records[-1].message
