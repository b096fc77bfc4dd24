"""The benchmark of one long sequence: memory falls, losses stay, on real ranks."""

import pytest

from benchmarks.long_context import KINDS, config_of, on_ranks

LENGTH = 2048


@pytest.mark.full
def test_a_rank_of_two_has_less_memory_and_the_same_losses() -> None:
    (alone,) = on_ranks(config_of([], length=LENGTH, cp=1, kind=KINDS[0]), 1)
    for kind in KINDS:
        ranks = on_ranks(config_of([], length=LENGTH, cp=2, kind=kind), 1)
        for rank in ranks:
            assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
            assert rank["measured"] < 0.8 * alone["measured"] and rank["predicted"] < 0.8 * alone["predicted"]


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.seq_len \(2050\) must be a multiple of 2 x parallel.cp \(2\)"):
        config_of([], length=2050, cp=2, kind=KINDS[0])
