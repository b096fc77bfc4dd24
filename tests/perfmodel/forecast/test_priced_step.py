"""A priced step is what one gets by hand, part by part; what is given in place of its own is used."""

from dataclasses import replace

import pytest

from megalina.blocks.model import shape_of
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.layout import ranks_of
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.cost.instruction_seconds import instruction_seconds
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.perfmodel.forecast.network import network_of
from megalina.perfmodel.forecast.priced_step import PricedStep, Shared, sizes_of
from megalina.perfmodel.sim.memory import memory_of
from megalina.perfmodel.sim.virtual import simulate_alike
from megalina.step.plan import Plan
from megalina.step.strategy import Setting, training_step

WORLD, VOCAB = 8, 512
PLANS = (Plan("eager"), Plan("lina", chunks=(2,), yields=True, piece_bytes=2**14, packing=2), Plan("flow", parts=2))


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return compose(
        ["model=tiny", "model.num_experts=8", "cluster=h100_400g", "cluster.nodes=1", "parallel.ep=4", "parallel.tp=2"]
        + ["train.micro_batch_size=2", "train.global_batch_size=32", "train.dtype=bfloat16"]
    )


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("load", [1.0, 1.5])
def test_it_is_what_one_gets_by_hand(config: PretrainConfig, plan: Plan, load: float) -> None:
    numbers = {"packing": plan.packing, "piece_bytes": plan.piece_bytes}
    held = InstructionBytes(config, WORLD, vocab_size=VOCAB, skew=load, cuda=True, **numbers)
    shape = shape_of(config.model, config.router, tp=2, sequence=True)
    setting = Setting(shape, held.buckets, micro_batches=4).under(plan)
    program = training_step(plan.strategy, setting)
    work = InstructionWork(config, world=WORLD, vocab_rows=VOCAB, buckets=held.buckets, packing=plan.packing)
    timeline = simulate_alike(
        program,
        ranks=WORLD,
        ranks_of=ranks_of(held.axes),
        seconds=instruction_seconds(config, work, load=load),
        network=network_of(config.cluster),
        sizes=sizes_of(config, held),
        slowest=True,
    )
    step = PricedStep(config, WORLD, plan, vocab_size=VOCAB, load=load)
    assert step.program == program and step.state_bytes == sum(held.state.values())
    assert step.walk().step_s == timeline.step_s and step.walk().events(0) == timeline.events(0)
    assert step.memory.peak == step.peak[0] == memory_of(held, program).peak
    assert step.rounds == 4 // plan.parts and len(step.listed(1)) < len(step.program)


def test_what_is_given_takes_the_place_of_its_own(config: PretrainConfig) -> None:
    step = PricedStep(config, WORLD, Plan("eager"), vocab_size=VOCAB)
    own_s = step.walk().step_s
    assert step.walk(replace(network_of(config.cluster), hop_s=1e-3, fast_hop_s=1e-3)).step_s > own_s
    assert step.walk(seconds=lambda instruction: 10 * step.seconds(instruction)).step_s > 5 * own_s
    assert step.walk(program=step.listed(1)).step_s < own_s
    assert step.walk(sizes=replace(step.sizes, bytes_of=lambda instruction: 0.0)).step_s < own_s
    assert step.walk(host=lambda instruction: 1e-3).step_s > 0.9e-3 * len(step.program)


def test_steps_that_share_have_one_list(config: PretrainConfig) -> None:
    shared = Shared()
    one, other, alone = (PricedStep(config, WORLD, PLANS[1], vocab_size=VOCAB, shared=s) for s in (shared, shared, None))
    assert one.program is other.program and one.program is not alone.program


def test_bytes_of_tokens_are_those_of_even_routing() -> None:
    """By hand: top-k rows of each token, to each of ep ranks alike, there and back, forward and backward."""
    config = compose(["model=tiny", "cluster=h100_400g", "parallel.ep=4", "cluster.nodes=2", "cluster.ranks_per_node=2"])
    step = PricedStep(config, 4, Plan("flow", parts=2), vocab_size=512)
    between, within = step.token_bytes
    train, moe_layers = config.train, config.model.num_layers
    rows = train.global_batch_size * train.seq_len * config.router.top_k
    sent = rows * config.model.d_model * 4 * 4 * moe_layers
    assert between == pytest.approx(sent / 2) and within == pytest.approx(sent / 4)


def test_bytes_of_tokens_that_all_experts_get(config: PretrainConfig) -> None:
    """By hand: a token and its weights to each of three others, and its sum's parts back; forward and backward."""
    overrides = [
        "model=tiny",
        "router=dense",
        "cluster=h100_400g",
        "parallel.ep=4",
        "cluster.nodes=2",
        "cluster.ranks_per_node=2",
    ]
    config = compose(overrides)
    step = PricedStep(config, 4, Plan("lina_nopack", chunks=(2,), yields=True), vocab_size=512)
    between, within = step.token_bytes
    train, model = config.train, config.model
    sent = train.global_batch_size * train.seq_len * (2 * model.d_model + model.num_experts) * 4 * 2 * model.num_layers
    assert between == pytest.approx(2 * sent) and within == pytest.approx(sent)
    assert step.peak[0] > step.state_bytes
