"""Pipeline ranks: the axes of their mesh, the parts of a model that they hold, what they send, and mix-ups that are found."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megalina.blocks.pipelined import pipelined
from megalina.collective_log import CollectiveLog, agree, first_difference
from megalina.comm import exchange
from megalina.config import PretrainConfig
from megalina.layout import axis_of_group, axis_sizes, rows_across, rows_of_stages
from megalina.parallel.trainable import Trainable
from megalina.step.pipeline.together import check_together
from megalina.step.program import Kind, Op, Program, check
from megalina.train.recovery import first_bad_instruction
from megalina.verify.recording import SEQUENCES, Layout
from megalina.verify.start import random_batches
from tests.parallel.thread_ranks import meshes, on_threads
from tests.verify.pipeline_rows import config_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainables(config: PretrainConfig, world: int) -> list[Trainable]:
    """One a rank; what they send goes nowhere until threads run them."""
    parallel = config.parallel
    across = pipelined(config, world).across if parallel.pp > 1 else {}
    made = meshes(world, tp=parallel.tp, ep=parallel.ep, pp=parallel.pp, across=across)
    words, cpu = config.model.vocab_size, torch.device("cpu")
    return [Trainable(config, mesh, vocab_size=words, device=cpu, wish_to_stop=lambda: False) for mesh in made]


def test_stages_are_outermost_and_all_other_axes_stay_inside() -> None:
    shape = axis_sizes(4, tp=2, ep=2)
    table = rows_of_stages(shape, 2)
    assert table["world"] == [list(range(8))] and table["stage"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert table["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]] and table["ep"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert rows_across(shape, (0, 1)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert rows_across(shape, (0, 1), "dp") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    axes = [
        axis_of_group(g, pipeline=True, shared_embedding=True) for g in ("embedding", "head", "ends", "copied.1", "experts.0")
    ]
    assert axes == ["embedding", "dp", "stage", "stage", "copies"]


def test_ranks_hold_their_stages_and_together_the_whole_model_with_its_initial_values() -> None:
    layout = Layout(4, pp=4, stages="E|tt|t|tmmL")
    config = config_of(layout, model="ahead", num_layers=4, tie_embeddings=False, positions="learned")
    ranks = trainables(config, 4)
    (alone,) = trainables(replace(config, parallel=replace(config.parallel, pp=1, pp_layout="")), 1)
    whole = dict(alone.gpt.named_parameters())
    held = [dict(t.gpt.named_parameters()) for t in ranks]
    assert set().union(*held) == whole.keys()
    assert all(torch.equal(p, whole[name]) for own in held for name, p in own.items())
    assert set(held[0]) == {"embedding", "positions"} and {n.split(".")[1] for n in held[1]} == {"0", "1"}
    assert {"embedding", "head", "final_norm.weight"} < set(held[3]) and "positions" not in held[3]  # words are looked up again
    assert [name for name in whole if sum(name in own for own in held) > 1] == ["embedding"]
    assert all(t.gpt.moe_layers == alone.gpt.moe_layers for t in ranks)
    assert ranks[0].buckets["embedding"].axis.ranks == ranks[3].buckets["embedding"].axis.ranks == (0, 3)
    assert list(ranks[1].mesh.along_stages) == ["pp0-1", "pp1-2", "stage"]


def test_evaluation_goes_through_all_stages() -> None:
    layout = Layout(4, ep=2, pp=2, chunks=2, pipeline="zbv")
    config = config_of(layout, model="ahead", num_layers=4)
    ranks = trainables(config, 4)
    batch = random_batches(config, 1)[0]

    def evaluated(rank: int) -> Any:
        own = SEQUENCES // ranks[rank].mesh.dp.size
        parts = batch.split(own)[ranks[rank].mesh.dp.rank].split(config.train.micro_batch_size)
        return torch.stack([ranks[rank].evaluate(part) for part in parts]).sum(0)

    found = on_threads(4, evaluated)
    (alone,) = trainables(replace(config, parallel=replace(config.parallel, pp=1, ep=1, pp_chunks=1)), 1)
    wanted = torch.stack([alone.evaluate(part) for part in batch.split(config.train.micro_batch_size)]).sum(0)
    assert all(torch.allclose(value, wanted, rtol=1e-12) for value in found)


def test_one_rank_that_wishes_to_stop_stops_all_after_the_same_step() -> None:
    config = config_of(Layout(2, pp=2, micro_batch=2), num_layers=2)
    ranks = trainables(config, 2)
    ranks[1].instruction_functions.wish_to_stop = lambda: True
    batch = random_batches(config, 1)[0]
    results = on_threads(2, lambda rank: ranks[rank].step(batch, lambda name, result: None))
    assert [result.stop for result in results] == [True, True]
    assert results[0].loads.equal(results[1].loads) and (results[0].loads[:, :-1].sum(1) > 0).all()  # of both layers, on both
    assert results[0].loss == results[1].loss and results[0].grad_norm == results[1].grad_norm


@pytest.mark.parametrize("stage", [0, 1])
def test_the_first_value_that_is_not_finite_is_looked_for_over_all_stages(stage: int) -> None:
    config = config_of(Layout(2, pp=2, micro_batch=2), num_layers=2)
    ranks = trainables(config, 2)
    with torch.no_grad():
        ranks[stage].gpt.layers[stage].attention_norm.weight.fill_(float("nan"))
    batch = random_batches(config, 1)[0]
    found = on_threads(2, lambda rank: first_bad_instruction(ranks[rank], batch))
    _, rank, tag = min((place, rank, tag) for rank, (place, tag) in enumerate(found))
    assert (rank, tag) == (stage, f"F:attention.{stage}.0")


# mix-ups


def swapped(program: Program, axis: str) -> Program:
    """The first two messages that go out along an axis change places."""
    sent = [i for i, s in enumerate(program) if s.op is Op.SEND and s.axis == axis and s.phase == "F"]
    starts = [i for i in sent if program[i].kind is Kind.START][:2]
    waits = [next(i for i in sent if program[i].kind is Kind.WAIT and program[i].part == program[s].part) for s in starts]
    out = list(program)
    for a, b in (starts, waits):
        out[a], out[b] = program[b], program[a]
    return tuple(out)


def test_a_swapped_send_is_named_before_anything_runs() -> None:
    config = config_of(Layout(2, pp=2, micro_batch=1, pipeline="gpipe"), num_layers=2)
    first, second = (t.program for t in trainables(config, 2))
    check_together((first, second), {"embedding": (0, 1)})
    with pytest.raises(
        ValueError, match=r"rank 0 at position \d+, F:stream>.1.1 \(SEND\), meets F:stream>.1.0 \(RECV\) of rank 1"
    ):
        check_together((swapped(first, "pp0-1"), second), {"embedding": (0, 1)})


def test_a_weights_cell_that_is_missing_is_named_before_anything_runs() -> None:
    config = config_of(Layout(2, pp=2, micro_batch=1, pipeline="zb_h1"), num_layers=2)
    trainable = trainables(config, 2)[0]
    program = tuple(s for s in trainable.program if not (s.phase == "W" and s.part == "3"))
    specs = {name: bucket.spec for name, bucket in trainable.buckets.items()}
    with pytest.raises(ValueError, match=r"no instruction computes these deferred gradients of weights: W:.*\.0\.3"):
        check(program, {*(f"#batch.-.{i}" for i in range(8)), *specs}, specs)


def submitted(log: CollectiveLog, rank: int, tag: str, *, sends: bool, rows: int = 4) -> None:
    sizes = [0, 0]
    sizes[1 - rank] = rows
    log.position.step = 1
    log.position.enter(tag, False)
    log.submit("pp0-1", (0, 1), exchange.MESSAGE, "torch.float32", (8,), None, *((sizes, [0, 0]) if sends else ([0, 0], sizes)))


def agreed(logs: list[CollectiveLog]) -> bool:
    return agree([sum(column) for column in zip(*(log.riders() for log in logs), strict=True)], len(logs))


def test_ranks_with_lists_of_their_own_agree_row_by_row() -> None:
    logs = [CollectiveLog(rank, alike=False) for rank in range(2)]
    submitted(logs[0], 0, "F:stream>.1.0", sends=True)
    submitted(logs[1], 1, "F:stream>.1.0", sends=False)
    for log in logs:  # what stages do by themselves differs
        log.submit("dp", (log.rank,), "sum", "torch.float32", (), 3 + log.rank)
    assert agreed(logs) and first_difference({log.rank: log.entries() for log in logs}) == ""


@pytest.mark.parametrize(
    ("tag", "sends", "rows", "told"),
    [
        ("F:stream>.1.1", False, 4, "is not the same on all ranks"),
        ("F:stream>.1.0", False, 6, "rank 0 sends 4 rows to rank 1"),
        ("F:stream>.1.0", True, 4, "has sizes that don't match"),
    ],
)
def test_messages_that_do_not_fit_are_known_to_all_and_named(tag: str, sends: bool, rows: int, told: str) -> None:
    logs = [CollectiveLog(rank, alike=False) for rank in range(2)]
    submitted(logs[0], 0, "F:stream>.1.0", sends=True)
    submitted(logs[1], 1, tag, sends=sends, rows=rows)
    assert not agreed(logs)
    found = first_difference({log.rank: log.entries() for log in logs})
    assert "on axis pp0-1" in found and told in found
