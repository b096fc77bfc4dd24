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
from megalina.step.pipeline.stages import cut
from megalina.step.program import Kind, Program, check
from megalina.step.strategy import Setting, forward_pass, given
from megalina.train.bucket_optimizer import BucketOptimizer
from tests.step.pipeline.one_process import on_one_process

MICRO_BATCHES, RANKS, STEPS = 4, 2, 3
MODEL = ("model=tiny", "model.num_layers=4", "train.dtype=float64", "train.micro_batch_size=1", "train.global_batch_size=4")


def trained(*overrides: str, schedule: str = "", chunks: int = 1) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and norms of steps, and weights after them.  "" is the list of one process."""
    config = compose([*MODEL, *overrides])
    trainable = Trainable(config, build_mesh(), vocab_size=512, device=torch.device("cpu"), wish_to_stop=lambda: False)
    if schedule:
        trainable.run_with(piped(trainable.setting, schedule, chunks), trainable.functions)
    words = torch.randint(512, (MICRO_BATCHES, 17), generator=torch.Generator().manual_seed(1))
    every = torch.ones(MICRO_BATCHES, 16).bool()
    places = torch.arange(16).expand(MICRO_BATCHES, 16)
    batch = Batch(words[:, :-1], words[:, 1:], every, every, places, None, torch.arange(MICRO_BATCHES))
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    results = [trainable.step(batch, optimizer.update) for _ in range(STEPS)]
    weights = {name: p.detach().clone() for name, p in trainable.gpt.named_parameters()}
    return [r.loss for r in results], [r.grad_norm for r in results], weights


def piped(setting: Setting, schedule: str, chunks: int) -> Program:
    pipeline = with_messages(SCHEDULES[schedule].pipeline(Size(RANKS, chunks, MICRO_BATCHES)))
    shape = setting.shape
    stages = cut([1.0] * len(shape.layers), pipeline.stages)
    late = shape.deferred("all")
    of_ranks = programs(pipeline, stages, forward_pass(setting), setting.buckets, late=late, router_state=shape.router_state)
    program = on_one_process(of_ranks, setting.buckets, router_state=shape.router_state)
    check(program, given(program, setting), setting.buckets)
    if schedule in ("zb_h1", "zbv", "dualpipev", "greedy"):
        assert any(s.phase == "W" for s in program)
    assert not any(s.axis.startswith("pp") for s in program) and any(s.kind is Kind.START for s in program)
    return program


@pytest.mark.full
@pytest.mark.parametrize("overrides", [(), ("router=sigmoid", "model.shared_d_ff=32"), ("train.recompute=full",)], ids=str)
@pytest.mark.parametrize(("schedule", "chunks"), [(n, s.chunks or 2) for n, s in SCHEDULES.items()], ids=str)
def test_a_pipeline_computes_what_one_process_does(schedule: str, chunks: int, overrides: tuple[str, ...]) -> None:
    losses, norms, weights = trained(*overrides)
    piped_losses, piped_norms, piped_weights = trained(*overrides, schedule=schedule, chunks=chunks)
    assert piped_losses == pytest.approx(losses, rel=1e-12, abs=1e-12)
    assert piped_norms == pytest.approx(norms, rel=1e-12, abs=1e-12)
    for name, weight in weights.items():
        assert torch.allclose(piped_weights[name], weight, rtol=0, atol=1e-10), name
