"""Random legal orders of a pipeline's lists, under random delays on each rank: the bits of the lists as they are made."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.pipelined import pipelined
from megalina.config import OptimConfig, PretrainConfig
from megalina.layout import EMBEDDING
from megalina.mesh import Mesh
from megalina.parallel.meshes import meshes_of
from megalina.parallel.step_result import CollectivesDiffer, StepResult
from megalina.parallel.trainable import Trainable
from megalina.step.pipeline.job import training_steps
from megalina.step.pipeline.together import check_together
from megalina.step.program import Kind, Op, Program, check
from megalina.step.strategy import given
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.verify.recording import SEQUENCES, Layout
from megalina.verify.start import random_batches
from tests.parallel.delays import Delays
from tests.parallel.ranks import run_on_ranks
from tests.parallel.thread_ranks import meshes, on_threads
from tests.step.pipeline.random_orders import reordered
from tests.verify.pipeline_rows import config_of

STEPS = 2  # the second on what the first has updated
Numbers = dict[tuple[int, str], Tensor]  # of each step: losses, and the rank's slices of each bucket's gradients


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Rank:
    """A model on one rank, whose steps are done again and again from the same weights."""

    def __init__(self, config: PretrainConfig, mesh: Mesh):
        cpu, words = torch.device("cpu"), config.model.vocab_size
        self.trainable = Trainable(config, mesh, vocab_size=words, device=cpu, wish_to_stop=lambda: False)
        assert self.trainable.pipelined is not None
        self.job = self.trainable.pipelined
        self.axes = {axis: ranks for axis, ranks in self.job.across.items() if axis == EMBEDDING}
        self.programs = training_steps(self.trainable.setting, self.job)
        own = SEQUENCES // mesh.readers
        self._batches: list[Batch] = [batch.split(own)[mesh.reader] for batch in random_batches(config, STEPS)]
        self._weights = {name: bucket.param.clone() for name, bucket in self.trainable.buckets.items()}

    def run(self, program: Program) -> Numbers:
        trainable, found = self.trainable, Numbers()
        trainable.run_with(program, trainable.functions)
        for name, bucket in trainable.buckets.items():
            bucket.param.copy_(self._weights[name])
        optimizer = BucketOptimizer(OptimConfig(name="sgd", lr=0.5), trainable.buckets)
        for step, batch in enumerate(self._batches):

            def update(name: str, result: StepResult, step: int = step) -> None:
                bucket = trainable.buckets[name]
                found[step, name] = torch.cat([bucket.grad[s.start : s.stop] for s in bucket.slices])
                optimizer.update(name, result)

            trainable.log.position.step += 1
            result = trainable.step(batch, update)
            losses = [result.loss, result.grad_norm, *result.auxiliary.values()]
            found[step, "losses"] = torch.tensor(losses, dtype=torch.float64)
        trainable.settle()
        return found

    def reordered(self, seed: int, *, keep_sums: bool) -> tuple[Program, ...]:
        """Of all ranks, the same on each."""
        found = reordered(self.programs, self.axes, Random(seed), keep_sums=keep_sums)
        check_together(found, self.axes)
        setting = self.trainable.setting
        for program in found:
            used = {name for s in program for name in s.uses}
            buckets = {name: spec for name, spec in setting.buckets.items() if name in used}
            check(program, given(program, replace(setting, buckets=buckets)), buckets)
        return found

    def errors(self, seeds: int) -> list[str]:
        """What is not the same in other orders, under delays."""
        rank, out, plain = self.trainable.mesh.pp_rank, [], self.run(self.programs[self.trainable.mesh.pp_rank])
        slept_s = 0.0
        for seed in range(seeds):
            for keep_sums in (True, False):
                program, delays = self.reordered(seed, keep_sums=keep_sums)[rank], Delays(self.trainable.log, f"{seed}")
                with delays.everywhere():
                    found = self.run(program)
                slept_s += delays.slept_s
                assert found.keys() == plain.keys() and program != self.programs[rank]
                same = torch.equal if keep_sums else _nearly
                out += [f"seed {seed}, {keep_sums}: {key}" for key in plain if not same(found[key], plain[key])]
        assert slept_s > 0
        self.trainable.close()
        return out


def _nearly(a: Tensor, b: Tensor) -> bool:
    """To 1e-12 of the largest element."""
    return float((a - b).abs().max()) <= 1e-12 * float(b.abs().max())


LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "1f1b on 4": (Layout(4, pp=4), {"num_layers": 4, "model": "GPT-2"}),
    "zb_h1, tp": (Layout(4, tp=2, pp=2, pipeline="zb_h1"), {"num_layers": 3}),
    "zbv, ep, ZeRO-1": (Layout(4, ep=2, pp=2, chunks=2, micro_batch=1, zero=1, pipeline="zbv"), {"num_layers": 4}),
    "dualpipev, dp": (Layout(4, pp=2, chunks=2, micro_batch=1, pipeline="dualpipev"), {"num_layers": 4, "model": "ahead"}),
    "interleaved, recompute": (
        Layout(2, pp=2, chunks=2, recompute="full", pipeline="interleaved", strategy="priority_partition", piece_mb=0.002),
        {"num_layers": 4},
    ),
}


def on_thread_ranks(layout: Layout, settings: dict[str, Any], work: Callable[[Rank], Any]) -> list[Any]:
    config = config_of(layout, **settings)
    across = pipelined(config, layout.world).across
    of_ranks = meshes(layout.world, tp=layout.tp, ep=layout.ep, cp=layout.cp, pp=layout.pp, across=across)
    return on_threads(layout.world, lambda rank: work(Rank(config, of_ranks[rank])))


def on_rank(layout: Layout, settings: dict[str, Any], seeds: int) -> list[str]:
    config = config_of(layout, **settings)
    torch.set_num_threads(1)
    return Rank(config, meshes_of(config, layout.world, timeout_s=60.0)[1]).errors(seeds)


@pytest.mark.full
def test_another_order_has_the_same_bits() -> None:
    layout = Layout(2, pp=2, micro_batch=2, pipeline="zb_h1")
    assert on_thread_ranks(layout, {"num_layers": 2}, lambda rank: rank.errors(1)) == [[], []]


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_orders_have_the_same_bits_in_layouts_of_every_kind(name: str) -> None:
    layout, settings = LAYOUTS[name]
    assert on_thread_ranks(layout, settings, lambda rank: rank.errors(6)) == [[]] * layout.world


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_other_orders_have_the_same_bits_on_real_ranks(schedule: str) -> None:
    layout = Layout(2, pp=2, micro_batch=1, pipeline=schedule)
    assert run_on_ranks(2, on_rank, layout, {"num_layers": 4}, 8, time_limit_s=280) == [[], []]


def swapped(program: Program) -> Program:
    """The first two activations that leave go in the other order."""
    first, second = [i for i, s in enumerate(program) if s.op is Op.SEND and s.kind is Kind.START and s.phase == "F"][:2]
    out = list(program)
    out.insert(second, out.pop(first))
    wait = next(i for i, s in enumerate(out) if s.kind is Kind.WAIT and s.key == program[first].key and s.phase == "F")
    if wait < second:
        out.insert(second, out.pop(wait))
    return tuple(out)


def test_messages_swapped_on_one_rank_alone_are_refused_and_would_be_noticed() -> None:
    layout = Layout(2, pp=2, micro_batch=2, pipeline="gpipe")

    def work(rank: Rank) -> str:
        first, second = rank.programs
        check_together((first, second), rank.axes)
        with pytest.raises(ValueError, match=r"rank 0 at position \d+, F:stream>.1.1 \(SEND\), meets F:stream>.1.0 \(RECV\)"):
            check_together((swapped(first), second), rank.axes)
        with pytest.raises(CollectivesDiffer):
            rank.run((swapped(first), second)[rank.trainable.mesh.pp_rank])
        rank.trainable.close()
        return "noticed"

    assert on_thread_ranks(layout, {"num_layers": 2}, work) == ["noticed", "noticed"]
