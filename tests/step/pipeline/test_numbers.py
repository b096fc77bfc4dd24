"""What the lists of all ranks compute is what one process computes, to the last digits of float64."""

import pytest
import torch

from megalina.batch import Batch
from megalina.compose import compose
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.step.pipeline.fill import programs
from megalina.step.pipeline.messages import with_messages
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.step.pipeline.stages import cut, stages_from
from megalina.step.program import Program, check
from megalina.step.strategy import Setting, forward_pass, given
from megalina.train.bucket_optimizer import BucketOptimizer
from tests.step.pipeline.one_process import on_one_process

MICRO_BATCHES, RANKS, STEPS = 4, 2, 2
MODEL = ("model=tiny", "model.num_layers=4", "train.dtype=float64", "train.micro_batch_size=1", "train.global_batch_size=4")


def trained(
    *overrides: str, schedule: str = "", chunks: int = 1, layout: str = "", paired: bool = False
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and norms of steps, and weights after them.  "" is the list of one process."""
    config = compose([*MODEL, *overrides])
    trainable = Trainable(config, build_mesh(), vocab_size=512, device=torch.device("cpu"), wish_to_stop=lambda: False)
    if schedule:
        trainable.run_with(piped(trainable.setting, schedule, chunks, layout, paired), trainable.functions)
    words = torch.randint(512, (MICRO_BATCHES, 17), generator=torch.Generator().manual_seed(1))
    every = torch.ones(MICRO_BATCHES, 16).bool()
    places = torch.arange(16).expand(MICRO_BATCHES, 16)
    batch = Batch(words[:, :-1], words[:, 1:], every, every, places, None, torch.arange(MICRO_BATCHES))
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    results = [trainable.step(batch, optimizer.update) for _ in range(STEPS)]
    weights = {name: p.detach().clone() for name, p in trainable.gpt.named_parameters()}
    return [r.loss for r in results], [r.grad_norm for r in results], weights


def piped(setting: Setting, schedule: str, chunks: int, layout: str, paired: bool) -> Program:
    pipeline = with_messages(SCHEDULES[schedule].pipeline(Size(RANKS, chunks, MICRO_BATCHES, paired=paired)))
    shape = setting.shape
    stages = stages_from(layout) if layout else cut([1.0] * len(shape.layers), pipeline.stages)
    late = shape.deferred("all")
    of_ranks = programs(pipeline, stages, forward_pass(setting), setting.buckets, late=late, router_state=shape.router_state)
    program = on_one_process(of_ranks, setting.buckets, router_state=shape.router_state)
    check(program, given(program, setting), setting.buckets)
    if schedule in ("zb_h1", "zbv", "dualpipev", "greedy"):
        assert any(s.phase == "W" for s in program)
    return program


def held(schedule: str, chunks: int, overrides: tuple[str, ...], layout: str = "", *, paired: bool = False) -> None:
    losses, norms, weights = trained(*overrides)
    piped_losses, piped_norms, piped_weights = trained(*overrides, schedule=schedule, chunks=chunks, layout=layout, paired=paired)
    assert piped_losses == pytest.approx(losses, rel=1e-12, abs=1e-12)
    assert piped_norms == pytest.approx(norms, rel=1e-12, abs=1e-12)
    for name, weight in weights.items():
        assert torch.allclose(piped_weights[name], weight, rtol=0, atol=1e-10), name


def test_a_pipeline_computes_what_one_process_does() -> None:
    held("dualpipev", 2, (), paired=True)


@pytest.mark.full
@pytest.mark.parametrize("overrides", [(), ("router=sigmoid", "model.shared_d_ff=32"), ("train.recompute=full",)], ids=str)
@pytest.mark.parametrize(("schedule", "chunks"), [(n, s.chunks or 2) for n, s in SCHEDULES.items()], ids=str)
def test_every_schedule_computes_what_one_process_does(schedule: str, chunks: int, overrides: tuple[str, ...]) -> None:
    held(schedule, chunks, overrides)


@pytest.mark.full
@pytest.mark.parametrize("overrides", [(), ("router=sigmoid", "model.shared_d_ff=32"), ("train.recompute=full",)], ids=str)
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 1), ("interleaved", 2), ("dualpipev", 2)], ids=str)
def test_pairs_compute_what_one_process_does(schedule: str, chunks: int, overrides: tuple[str, ...]) -> None:
    held(schedule, chunks, overrides, paired=True)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["E|t*4L", "Et*4|L", "Et|t*3L"])
def test_stages_may_be_as_uneven_as_they_like(layout: str) -> None:
    held("zb_h1", 1, (), layout)


@pytest.mark.full
def test_layers_of_multi_token_prediction_are_in_the_stage_of_the_head() -> None:
    held("1f1b", 1, ("model.mtp_layers=1",), "Ettt|tmL")
