"""What a step gives: its result comes back from the list, whoever runs it; selection biases follow it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.collective_log import CollectiveLog
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.timeline.recorder import Recorder
from megalina.train.bucket_optimizer import BucketOptimizer
from tests.train.small_run import VOCABULARY, config_of, random_batch

RATE = 0.25


def trainable_of(
    folder: Path, is_spike: Callable[[float], bool] = lambda loss: False, **settings: Any
) -> tuple[Trainable, BucketOptimizer]:
    config = config_of(folder, "run", micro_batch_size=4, **settings)
    trainable = Trainable(
        config,
        build_mesh(),
        vocab_size=VOCABULARY,
        device=torch.device("cpu"),
        wish_to_stop=lambda: False,
        is_spike=is_spike,
    )
    return trainable, BucketOptimizer(config.optim, trainable.buckets)


def biased(folder: Path, **more: Any) -> tuple[Trainable, BucketOptimizer]:
    return trainable_of(folder, kind="sigmoid", bias_update_rate=RATE, **more)


def biases(trainable: Trainable) -> list[torch.Tensor]:
    found = [trainable.gpt.layers[i].router.bias_E for i in trainable.gpt.moe_layers]
    return [b.clone() for b in found if b is not None]


def test_biases_follow_the_loads_of_each_step(tmp_path: Path) -> None:
    """Whoever runs the list: no trainer is here."""
    trainable, optimizer = biased(tmp_path)
    want = [torch.zeros_like(b) for b in biases(trainable)]
    for step in range(3):
        result = trainable.step(random_batch(first=8 * step), optimizer.update)
        for bias, load in zip(want, result.loads[:, :-1].double(), strict=True):
            bias += RATE * torch.sign(load.mean() - load).float()
        assert len(want) == 2 and any(b.any() for b in want)
        assert all(torch.equal(a, b) for a, b in zip(want, biases(trainable), strict=True))


@pytest.mark.parametrize("why", ["spike", "not finite"])
def test_biases_stay_where_a_step_is_skipped(tmp_path: Path, why: str) -> None:
    trainable, optimizer = biased(tmp_path, is_spike=lambda loss: why == "spike")
    if why == "not finite":
        trainable.buckets["experts.1"].grad[5] = float("inf")
    result = trainable.step(random_batch(), optimizer.update)
    assert not result.updates and not any(b.any() for b in biases(trainable))
    assert trainable.step(random_batch(), optimizer.update).updates == (why != "spike")


def test_the_result_names_the_parameters_whose_gradients_are_not_finite(tmp_path: Path) -> None:
    trainable, optimizer = trainable_of(tmp_path)
    bucket = trainable.buckets["dense.1"]
    for member in bucket.members[:2]:
        bucket.grad[member.start] = float("nan")
    result = trainable.step(random_batch(), optimizer.update)
    assert not result.finite and result.non_finite == tuple(m.name for m in bucket.members[:2])
    again = trainable.step(random_batch(), optimizer.update)  # the optimizer has cleared them
    assert again.finite and again.non_finite == ()


def test_a_list_without_buckets_gives_its_result(tmp_path: Path) -> None:
    trainable, optimizer = trainable_of(tmp_path)
    want = trainable.step(random_batch(), lambda *_: None)

    for bucket in trainable.buckets.values():
        bucket.grad.zero_()
    program = tuple(s for s in trainable.program if not s.name.startswith("update "))
    trainable.run_with(program, trainable.functions)
    found = trainable.step(random_batch(), optimizer.update)
    assert (found.loss, found.grad_norm, found.tokens_digest) == (want.loss, want.grad_norm, want.tokens_digest)
    assert optimizer.step_count == 0


def test_only_the_step_that_a_recorder_was_handed_to_is_in_it(tmp_path: Path) -> None:
    trainable, optimizer = trainable_of(tmp_path)
    recorder = Recorder()
    trainable.step(random_batch(), optimizer.update)
    trainable.step(random_batch(), optimizer.update, record=recorder)
    trainable.step(random_batch(), optimizer.update)
    computed = [e.tag for e in recorder.events() if e.kind == "compute"]
    assert computed == [s.tag for s in trainable.program if s.op is None]


def test_two_trainables_on_one_mesh_have_logs_of_their_own_unless_they_are_given_one(tmp_path: Path) -> None:
    config, mesh, log = config_of(tmp_path, "run"), build_mesh(), CollectiveLog(0)
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "device": torch.device("cpu"), "wish_to_stop": lambda: False}
    one, other = (Trainable(config, mesh, **options) for _ in range(2))
    given = Trainable(config, mesh, log=log, **options)
    assert one.log is not other.log and given.log is log and given.instruction_functions.log is log
