"""Sources of batches: order, masks and positions, and what is said about bad settings."""

import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalina.batch import Batch
from megalina.config import DataConfig
from megalina.data.indexed import IndexedWriter, Manifest
from megalina.data.source import TokenData, open_data

EOD = 256  # of the tokenizer of bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a: documents of 1 to 40 tokens that end with EOD; b: long ones of the ids 0 to 9."""
    folder = tmp_path_factory.mktemp("source")
    random = np.random.RandomState(0)
    with IndexedWriter(folder / "a", np.uint16) as writer:
        for length in random.randint(1, 41, size=300):
            writer.add_document([*random.randint(0, 256, size=length - 1), EOD])
    with IndexedWriter(folder / "b", np.uint16) as writer:
        for _ in range(40):
            writer.add_document(random.randint(0, 10, size=500))
    return folder


def config(folder: Path, **fields: object) -> DataConfig:
    defaults: dict[str, object] = {
        "kind": "indexed",
        "prefix": str(folder / "a"),
        "tokenizer": "bytes",
        "cache_dir": str(folder / "cache"),
    }
    return DataConfig(**{**defaults, **fields})  # type: ignore[arg-type]


def opened(folder: Path, *, seed: int = 1, seq_len: int = 32, **fields: object) -> TokenData:
    return open_data(config(folder, **fields), seq_len=seq_len, seed=seed)


def blend(folder: Path) -> list[str]:
    return ["0.7", str(folder / "a"), "0.3", str(folder / "b")]


def assert_same(a: Batch, b: Batch) -> None:
    for name in (f.name for f in fields(Batch)):
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


@given(first=st.integers(0, 2000), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_order_is_the_same_at_any_data_parallel_size_and_after_a_restart(folder: Path, first: int, sizes: list[int]) -> None:
    whole = opened(folder, prefix="", blend=blend(folder)).train.batch(first, sum(sizes))
    fresh = opened(folder, prefix="", blend=blend(folder)).train
    at = first
    for size in reversed(sizes):  # another order of reading, other sizes
        part = fresh.batch(at, size)
        rows = slice(at - first, at - first + size)
        assert torch.equal(part.tokens_BS, whole.tokens_BS[rows]) and torch.equal(part.labels_BS, whole.labels_BS[rows])
        assert torch.equal(part.position_BS, whole.position_BS[rows]) and torch.equal(part.sample_B, whole.sample_B[rows])
        at += size


def test_another_seed_trains_in_another_order_and_validates_on_the_same(folder: Path) -> None:
    one, two = opened(folder, seed=1), opened(folder, seed=2)
    assert not torch.equal(one.train.batch(0, 8).tokens_BS, two.train.batch(0, 8).tokens_BS)
    assert one.valid and two.valid
    assert_same(one.valid.batch(0, 4), two.valid.batch(0, 4))


def test_validation_wraps_around(folder: Path) -> None:
    valid = opened(folder).valid
    assert valid
    size = valid.num_sequences
    assert torch.equal(valid.batch(0, 3).tokens_BS, valid.batch(size, 3).tokens_BS) and valid.batch(
        size, 1
    ).sample_B.tolist() == [size]


def test_labels_are_the_next_tokens(folder: Path) -> None:
    batch = opened(folder).train.batch(5, 16)
    assert torch.equal(batch.labels_BS[:, :-1], batch.tokens_BS[:, 1:])
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
    assert batch.valid_BS.all() and batch.loss_mask_BS.all() and batch.sample_B.tolist() == list(range(5, 21))


def test_an_epoch_has_every_training_token_once(folder: Path) -> None:
    data = opened(folder, split="1", seq_len=7)
    tokens = np.memmap(folder / "a.bin", np.uint16, mode="r")
    got = Counter(data.train.batch(0, data.train.num_sequences).tokens_BS.flatten().tolist())
    missing = Counter(tokens.tolist())
    missing.subtract(got)
    assert min(missing.values()) >= 0 and sum(missing.values()) <= 7


@pytest.mark.parametrize("tokenizer", ["bytes", ""])  # by the end-of-document token, and by the index alone
def test_positions_documents_and_masks_follow_a_plain_loop(folder: Path, tokenizer: str) -> None:
    batch = opened(folder, mask_eod=True, tokenizer=tokenizer).train.batch(0, 20)
    assert batch.document_BS is not None
    for row in range(20):
        position, document = 0, 0
        for at, token in enumerate(batch.tokens_BS[row].tolist()):
            assert batch.position_BS[row, at] == position and batch.document_BS[row, at] == document
            assert bool(batch.loss_mask_BS[row, at]) == (token != EOD)
            position, document = (0, document + 1) if token == EOD else (position + 1, document)


def test_resets_can_be_switched_off(folder: Path) -> None:
    batch = opened(folder, reset_positions=False, reset_attention=False).train.batch(0, 4)
    assert batch.document_BS is None and torch.equal(batch.position_BS, torch.arange(32).expand(4, 32))


def test_a_batch_without_a_boundary_has_plain_attention(folder: Path) -> None:
    train = opened(folder, prefix=str(folder / "b"), tokenizer="").train
    batches = [train.batch(n, 1) for n in range(40)]
    inner = [(batch.document_BS is None, bool((batch.position_BS == torch.arange(32)).all())) for batch in batches]
    assert all(plain == unbroken for plain, unbroken in inner) and {plain for plain, _ in inner} == {True, False}


def test_a_text_shorter_than_a_validation_sequence_is_padded(folder: Path) -> None:
    with IndexedWriter(folder / "short", np.uint16) as writer:
        writer.add_document([1, 2, 3, 4, 5, EOD])
        writer.add_document([6, 7, 8, EOD])
    data = opened(folder, prefix=str(folder / "short"), split="50,50,0", seq_len=8)
    assert data.valid
    batch = data.valid.batch(0, 2)
    assert batch.tokens_BS[0].tolist() == [6, 7, 8, EOD, 0, 0, 0, 0] and batch.labels_BS[1, :3].tolist() == [7, 8, EOD]
    assert batch.valid_BS[0].tolist() == batch.loss_mask_BS[0].tolist() == [True] * 3 + [False] * 5
    assert data.train.batch(0, 3).valid_BS.all()


def test_there_is_no_validation_where_the_split_has_no_share_for_it(folder: Path) -> None:
    assert opened(folder, split="100,0,0").valid is None and opened(folder, split="99,1").valid is not None


def test_a_blend_draws_from_each_by_weight(folder: Path) -> None:
    data = opened(folder, prefix="", blend=blend(folder))
    batch = data.train.batch(0, 200)
    assert abs(sum(bool((row < 10).all()) for row in batch.tokens_BS) - 60) <= 1


def test_unigram_loss_is_the_entropy_of_the_training_tokens(folder: Path) -> None:
    tokens = np.memmap(folder / "b.bin", np.uint16, mode="r")[: 500 * 30]
    shares = [count / len(tokens) for count in Counter(tokens.tolist()).values()]
    expected = -sum(share * math.log(share) for share in shares)
    assert opened(folder, prefix=str(folder / "b"), tokenizer="", split="30,10,0").unigram_loss == pytest.approx(
        expected, rel=1e-12
    )


def test_without_a_tokenizer_the_largest_id_says_the_vocabulary(folder: Path) -> None:
    data = opened(folder, tokenizer="")
    assert data.tokenizer is None and data.vocab_size == 257 and "no tokenizer, 257 ids" in data.description
    assert opened(folder, prefix=str(folder / "b"), tokenizer="").vocab_size == 10


def test_a_tokenizer_with_fewer_ids_than_the_data_is_refused(folder: Path) -> None:
    with IndexedWriter(folder / "wide", np.uint16) as writer:
        writer.add_document([1, 300, 2])
    with pytest.raises(ValueError, match="holds the token id 300, but bytes has only 257 ids"):
        opened(folder, prefix=str(folder / "wide"))


def test_a_tokenizer_that_did_not_make_the_data_is_refused(folder: Path) -> None:
    with IndexedWriter(folder / "made", np.uint16) as writer:
        writer.add_document([1, 30, 2])
    Manifest("other.model", "0" * 64, 4096, 1, 3).write(folder / "made")
    with pytest.raises(ValueError, match="was made with other.model .4096 ids., not with bytes .257 ids."):
        opened(folder, prefix=str(folder / "made"))
    Manifest("other.model", "0" * 64, 4096, 1, 99).write(folder / "made")  # of an earlier dataset of that name
    assert opened(folder, prefix=str(folder / "made")).vocab_size == 257


def test_negative_ids_are_refused(folder: Path) -> None:
    with IndexedWriter(folder / "negative", np.int32) as writer:
        writer.add_document([1, -5, 2])
    with pytest.raises(ValueError, match="holds the token id -5"):
        opened(folder, prefix=str(folder / "negative"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blend": ["0.7", "A", "-0.3", "B"]}, "not negative"),
        ({"blend": ["0", "A"]}, "not all zero"),
        ({"blend": ["nan", "A", "1", "B"]}, "finite"),
        ({"blend": ["0.7", "A", "0.3"]}, "a weight and a corpus in turn"),
        ({"blend": ["A", "0.7"]}, "a weight and a corpus in turn.*could not convert"),
        ({"prefix": ""}, "needs data.prefix"),
        ({"kind": "web"}, "data.kind must be stdlib, prose or indexed, not 'web'"),
        ({"split": "0,30,1"}, "the first positive"),
        ({"split": "969,x"}, "data.split='969,x'"),
        ({"split": "969,-30,1"}, "data.split='969,-30,1'"),
        ({"split": "1,1,1,1"}, "data.split='1,1,1,1'"),
        ({"prefix": "nowhere/a"}, "nowhere/a.idx does not exist"),
    ],
)
def test_bad_settings_are_answered_in_one_line(folder: Path, fields: dict[str, object], message: str) -> None:
    prefix = {"prefix": ""} if "blend" in fields else {}
    with pytest.raises(ValueError, match=message) as caught:
        open_data(replace(config(folder), **{**prefix, **fields}), seq_len=8, seed=0)
    assert "\n" not in str(caught.value)


def test_prefix_and_blend_exclude_each_other(folder: Path) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        opened(folder, blend=blend(folder))
