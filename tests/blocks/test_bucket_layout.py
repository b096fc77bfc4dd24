"""Layouts of buckets: shards are whole matrices, as even as they can be; what costs are based on is what is built."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalina.blocks.bucket_layout import ALIGNMENT, Member, in_turns, lay_out_bucket, shared_out
from megalina.blocks.model import step_shape
from megalina.blocks.parameter import Parameter
from megalina.config import OptimConfig, padded_vocab_size
from megalina.layout import axis_of_group, axis_sizes
from megalina.mesh import Axis
from megalina.model.gpt import GPT
from megalina.model.init import Cut, initialize
from megalina.parallel.buckets import Bucket
from megalina.parallel.shard import parameter_groups
from megalina.perfmodel.cost.instruction_bytes import bucket_specs
from tests.verify.cases import config_with


def work_of(rows: int, columns: int) -> float:
    return float(rows * columns * min(rows, columns))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 5))
def test_the_heaviest_share_is_as_light_as_runs_of_units_can_be(work: list[int], ranks: int) -> None:
    ends = tuple(itertools.accumulate(work))
    shares = shared_out(ends, tuple(map(float, work)), ranks)
    assert 1 <= len(shares) <= ranks and [a for a, _ in shares] == [0, *(b for _, b in shares)][:-1] and shares[-1][1] == ends[-1]
    assert {b for _, b in shares} <= set(ends)
    heaviest = max(b - a for a, b in shares)  # units are as long as they are heavy
    cuts = itertools.combinations_with_replacement([0, *ends], ranks - 1)
    best = min(max(b - a for a, b in itertools.pairwise([0, *cut, ends[-1]])) for cut in cuts)
    assert heaviest == best


@pytest.mark.parametrize(("ranks", "runs"), [(4, 3), (8, 3), (5, 5), (6, 1)])
def test_layer_after_layer_every_rank_gets_as_much(ranks: int, runs: int) -> None:
    cuts = [(10 * i, 10 * i + 10) for i in range(runs)]
    owners = [in_turns(cuts, ranks, turn) for turn in range(ranks)]
    assert all([share for share in of if share[0] < share[1]] == cuts for of in owners)
    assert all([a for a, _ in of] == [0, *(b for _, b in of)][:-1] and of[-1][1] == 10 * runs for of in owners)
    assert {sum(of[rank][0] < of[rank][1] for of in owners) for rank in range(ranks)} == {runs}


MEMBERS = [
    Member(Parameter("norm.weight", (16,), None), (16,)),
    Member(Parameter("q", (8, 16), 1.0, {"tp": 0}), (4, 16), whole=True),
    Member(Parameter("proj", (16, 8), 1.0, {"tp": 1}), (16, 4), whole=True),
    Member(Parameter("w1", (4, 12, 16), 1.0, stacked=2), (4, 12, 16), whole=True),
    Member(Parameter("router", (4, 16), 1.0), (4, 16)),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("tp", [1, 2])
def test_shards_tile_the_bucket_and_cut_no_matrix(ranks: int, tp: int) -> None:
    layout = lay_out_bucket("dense.3", MEMBERS, ranks=ranks, tp=tp, matrix_work=work_of)
    assert [MEMBERS[i].parameter.name for i in layout.order] == ["proj", "q", "w1", "router", "norm.weight"]
    assert all(start % ALIGNMENT == 0 for start in layout.starts)
    proj, q, w1 = layout.matrices
    assert (q.count, q.rows, q.columns, q.cut) == (1, 4, 16, 0 if tp > 1 else -1)
    assert (proj.cut, w1.cut) == (1 if tp > 1 else -1, -1)
    assert (w1.count, w1.rows, w1.columns) == (8, 6, 16)  # gate and up apart
    assert len(layout.shares) == (ranks if ranks > 1 else 0)
    for start, _ in layout.shares:
        assert all((start - m.start) % m.numel == 0 for m in layout.matrices if m.start < start < m.stop)


def test_a_bucket_without_whole_matrices_has_even_shares() -> None:
    layout = lay_out_bucket("ends", [MEMBERS[0], MEMBERS[4]], ranks=3, tp=1, matrix_work=work_of)
    assert (layout.matrices, layout.shares, layout.numel) == ((), (), 96)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("model", ["dense first, shared experts", "GPT-2", "modern"])
@pytest.mark.parametrize(("tp", "ep", "zero"), [(1, 1, 0), (1, 2, 1), (2, 2, 1), (2, 1, 0)])
def test_costs_know_the_buckets_that_are_built(optimizer: str, model: str, tp: int, ep: int, zero: int) -> None:
    config = config_with(model=model)
    config = replace(config, optim=OptimConfig(name=optimizer), parallel=replace(config.parallel, tp=tp, ep=ep, zero=zero))
    sizes, cut = axis_sizes(4, tp=tp, ep=ep), Cut({"tp": (0, tp), "ep": (0, ep)})
    words, positions = config.model.vocab_size, config.model.max_positions or config.train.seq_len
    padded = padded_vocab_size(words, tp)
    gpt = GPT(config.model, config.router, vocab_size=words, max_positions=positions, seed=1, padded_vocab=padded)
    initialize(gpt, seed=1, dtype=torch.float64, cut=cut)
    found = bucket_specs(config, 4, vocab_size=words)
    groups = parameter_groups(gpt, step_shape(config))
    assert list(found) == list(groups)
    for name, members in groups.items():
        axis, tp_ranks = Axis(axis_of_group(name), tuple(range(sizes[axis_of_group(name)]))), Axis("tp", tuple(range(tp)))
        built = Bucket(name, members, axis, sharded=zero == 1, piece=None, optim=config.optim, tp=tp_ranks)
        assert found[name] == built.spec, name
        if not name.startswith("copied"):  # which may have shared experts
            assert bool(built.spec.matrices) == (optimizer == "muon" and name.startswith(("dense", "experts")))
        assert bool(built.spec.shares) == (bool(built.spec.matrices) and built.sharded)
