"""What whole matrices cost: FLOPs as torch counts them, state, bytes in between; every list with them has a price."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalina.blocks.optimizers import matrix_flops
from megalina.config import ClusterConfig, HardwareConfig, OptimConfig, PretrainConfig, training_layers
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.perfmodel.forecast.searched_list import Job, searched_list
from megalina.perfmodel.sim.network import one_level
from megalina.plan_settings import plan_of
from megalina.step.program import Instruction, Kind, Op
from megalina.step.strategy import STRATEGIES
from megalina.timeline.recorder import COMPUTE, Recorder
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.muon import Muon
from megalina.verify.start import random_batches
from tests.verify.cases import config_with, strategy

WORLD = 4


def config_of(**settings: Any) -> PretrainConfig:
    config = config_with(model="dense first, shared experts")
    parallel = {key: settings.pop(key) for key in ("tp", "ep", "zero") if key in settings}
    return replace(config, optim=OptimConfig(**({"name": "muon"} | settings)), parallel=replace(config.parallel, **parallel))


def held_of(config: PretrainConfig) -> InstructionBytes:
    return InstructionBytes(config, WORLD, vocab_size=config.model.vocab_size)


def work_of(config: PretrainConfig) -> InstructionWork:
    rows = config.model.vocab_size
    return InstructionWork(config, world=WORLD, vocab_rows=rows, buckets=held_of(config).buckets)


def instruction(name: str, **fields: Any) -> Instruction:
    return Instruction("U", Kind.COMPUTE, name, **fields)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_flops_are_those_that_torch_counts(shape: tuple[int, int, int]) -> None:
    config = OptimConfig(name="muon", muon_steps=4)
    with FlopCounterMode(display=False) as counter:
        Muon(config).direction(torch.randn(shape))
    assert counter.get_total_flops() == shape[0] * matrix_flops(*shape[1:], config)


@pytest.mark.parametrize("zero", [0, 1])
def test_the_work_of_a_bucket_is_that_of_the_rank_with_the_most(zero: int) -> None:
    config = config_of(ep=2, zero=zero)
    spec = held_of(config).buckets["experts.1"]
    owned = [spec.own_matrices(rank) for rank in range(len(spec.shares) or 1)]
    flops = [sum(m.count * matrix_flops(m.rows, m.columns, config.optim) for m in own) for own in owned]
    assert work_of(config)(instruction("newton_schulz experts.1")).flops == max(flops)
    matrices = sum(m.count for m in spec.matrices)
    assert matrices == 2 * 3  # of each expert here gate, up and down
    assert [sum(m.count for m in own) for own in owned] == ([3, 3] if zero else [6])


def test_matrices_that_tp_cuts_are_computed_as_wholes_unless_by_blocks() -> None:
    """Layer 0 has a dense MLP, and under tp nothing else but what tp cuts."""
    whole, gathered = (work_of(config_of(tp=tp))(instruction("newton_schulz dense.0")).flops for tp in (1, 2))
    blocks = work_of(config_of(tp=2, muon_tp="blocks"))(instruction("newton_schulz dense.0")).flops
    assert blocks < gathered == whole


def test_state_is_one_momentum_of_matrices_and_two_moments_of_the_rest() -> None:
    muon, adamw = held_of(config_of()), held_of(config_of(name="adamw"))
    matrices = sum(m.count * m.numel for spec in muon.buckets.values() for m in spec.matrices)
    assert adamw.state["moments"] - muon.state["moments"] == matrices * 8
    assert all(muon.state[key] == adamw.state[key] for key in ("weights", "gradients", "batches"))


def test_values_between_gradient_and_update_have_their_bytes() -> None:
    config = config_of(tp=2, zero=1)
    held = held_of(config)
    spec = held.buckets["dense.1"]
    most = max(sum(m.count * m.numel for m in spec.own_matrices(rank)) for rank in range(2))
    at = instruction("newton_schulz dense.1", writes=("#direction dense.1",))
    assert held.value("#direction dense.1", at) == most * 8
    assert held.value("#momentum dense.1", at) == most * 8 and held.value("#whole dense.1", at) == 2 * most * 8
    early = held_of(replace(config, strategy=replace(config.strategy, newton_schulz_after=1)))
    assert early.value("#momentum dense.1", at) == 2 * most * 8  # gradients and momenta
    assert held.rise(at) > held.value("#direction dense.1", at)


LISTS = [(name, tp, after) for name in STRATEGIES for tp in (1, 2) for after in (0, 2)]
QUICK = [("eager", 2, 0), ("eager", 1, 2), ("flow", 2, 2), ("lancet", 2, 2), ("lina_zero", 1, 0)]


@pytest.mark.parametrize(
    ("name", "tp", "after"), [pytest.param(*of, marks=[] if of in QUICK else [pytest.mark.full]) for of in LISTS]
)
def test_every_list_has_a_price_and_a_peak(name: str, tp: int, after: int) -> None:
    config = config_of(name="muon_clip", tp=tp, zero=int(name in ("lina_zero", "eager")))
    config = replace(config, strategy=replace(strategy(name), newton_schulz_after=after, packing="1", windows="none"))
    plan = plan_of(config.strategy, packing=1)
    work = work_of(config)
    seconds = lambda s: 1e-9 * work(s).flops if s.kind is Kind.COMPUTE else 0.0  # noqa: E731
    network = one_level(1e8, 1e-4)
    step = PricedStep(config, WORLD, plan, vocab_size=config.model.vocab_size, network=network, seconds=seconds)
    assert step.walk(program=step.program).step_s > 0 and step.memory.peak > 0
    gathers = [s for s in step.program if s.phase == "U" and s.op is Op.GATHER and s.kind is Kind.START]
    assert all(step.sizes.bytes_of(s) > 0 for s in gathers) and bool(gathers) == (tp > 1)
    (logits,) = [s for s in step.program if s.op is Op.MAX and s.kind is Kind.START]
    assert step.sizes.bytes_of(logits) == len(training_layers(config.model)) * config.model.num_kv_heads * 8


def test_an_emulated_device_takes_in_a_step_what_the_simulator_says() -> None:
    links = HardwareConfig(nics_per_node=1, oversubscription=1.0, collective_efficiency=1.0)
    cluster = ClusterConfig(device_gflops=0.05, nodes=1, ranks_per_node=1, link_gbit=1.0, hardware=links)
    config = replace(config_of(), cluster=cluster)
    rows = config.model.vocab_size
    trainable = Trainable(config, build_mesh(), vocab_size=rows, device=torch.device("cpu"), wish_to_stop=lambda: False)
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    (batch,), recorder = random_batches(config, 1), Recorder()
    trainable.step(batch, optimizer.update, directions=optimizer, record=recorder)
    priced = PricedStep(config, 1, trainable.plan, vocab_size=rows)
    directions = [s for s in priced.program if s.name.startswith("newton_schulz ")]
    took_s = {e.name: e.end_s - e.start_s for e in recorder.events() if e.kind == COMPUTE}
    assert len(directions) == 5 and trainable.device is not None
    for s in directions:
        assert took_s[s.name] == pytest.approx(priced.seconds(s)) and priced.seconds(s) > 0.001
        assert trainable.device.seconds(s) == priced.seconds(s)


def test_a_search_of_lists_keeps_directions_before_the_verdict_movable() -> None:
    config = config_of(lr=1e-3)
    config = replace(config, strategy=replace(strategy("search"), newton_schulz_after=1))
    work = work_of(config)
    seconds = lambda s: 1e-9 * work(s).flops if s.kind is Kind.COMPUTE else 0.0  # noqa: E731
    job = Job(config, WORLD, config.model.vocab_size, one_level(1e8, 1e-4), seconds)
    found = searched_list(job, evaluations=60, deferred=False)
    directions = [s for s in found.program if s.name.startswith("newton_schulz ")]
    assert found.plan.newton_schulz_after == 1 and directions
    assert all("#verdict.-.0" not in s.reads for s in directions)
