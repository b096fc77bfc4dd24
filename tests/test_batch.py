"""A batch can be cut and moved, and nothing is lost."""

from dataclasses import fields, replace

import pytest
import torch

from megalina.batch import Batch


def batch_of(sequences: int, length: int = 5, *, documents: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (sequences, length + 1), generator=generator)
    mask = torch.rand(sequences, length, generator=generator) < 0.5
    return Batch(
        tokens_BS=tokens[:, :-1],
        labels_BS=tokens[:, 1:],
        loss_mask_BS=mask,
        valid_BS=~mask,
        position_BS=torch.arange(length).repeat(sequences, 1),
        document_BS=mask.long().cumsum(1) if documents else None,
        sample_B=torch.arange(sequences) + 70,
        replay_BSLK=torch.randint(-1, 4, (sequences, length, 3, 2), generator=generator).short(),
    )


TENSORS = [f for f in fields(Batch) if f.name not in ("cut_from", "contexts", "context")]


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(("sequences", "size", "sizes"), [(6, 2, [2, 2, 2]), (5, 2, [2, 2, 1]), (3, 8, [3])])
def test_the_parts_of_a_batch_put_together_are_the_batch(sequences: int, size: int, sizes: list[int], documents: bool) -> None:
    batch = batch_of(sequences, documents=documents)
    parts = batch.split(size)
    assert [len(part.tokens_BS) for part in parts] == sizes
    for f in TENSORS:
        whole, cut = getattr(batch, f.name), [getattr(part, f.name) for part in parts]
        if whole is None:
            assert cut == [None] * len(parts)
        else:
            assert torch.equal(torch.cat(cut), whole), f.name


def test_moving_to_a_device_moves_every_tensor_and_keeps_what_is_not_there() -> None:
    moved = batch_of(2, documents=False).to(torch.device("meta"))
    assert moved.document_BS is None
    assert all(getattr(moved, f.name).is_meta for f in TENSORS if f.name != "document_BS")


def test_a_batch_is_a_value() -> None:
    batch = batch_of(2)
    with pytest.raises(AttributeError):
        batch.sample_B = torch.zeros(2)  # type: ignore[misc]
    assert replace(batch, document_BS=None).tokens_BS is batch.tokens_BS
