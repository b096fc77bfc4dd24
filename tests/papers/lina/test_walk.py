"""The paper's steps in virtual time: those of the trainer, and what each constant does."""

from dataclasses import replace

import pytest

from megalina.perfmodel.forecast.forecast import forecast
from megalina.plan_settings import strategy_of
from megalina.step.plan import Plan
from papers.lina.models import DDP, GPT2, PARTITION, PIPELINE, TRAINED, TXL, Model, config_of, lina, txl
from papers.lina.walk import Bed
from tests.papers.lina.testbed import PLAIN, base, bed

SMALL = replace(txl(2), name="small")


@pytest.mark.parametrize("experts", [2, 4, 8, 16])
@pytest.mark.parametrize("plan", [DDP, PARTITION, PIPELINE, "lina"], ids=str)
def test_without_constants_a_step_is_the_forecast_of_the_trainers(experts: int, plan: Plan | str) -> None:
    plan = lina(SMALL, experts) if isinstance(plan, str) else plan
    config = config_of(base(), SMALL, experts)
    config = replace(config, strategy=strategy_of(plan, config.strategy))
    found = forecast(config, experts, vocab_size=SMALL.vocab_size, plan=plan)
    assert bed().step(SMALL, experts, plan, PLAIN).step_s == pytest.approx(found.step_s, rel=1e-6)
    assert bed().memory(SMALL, experts, plan).peak == found.memory.peak


def test_parameters_are_those_of_table_1() -> None:
    for experts, sizes in ((4, (117, 233, 349)), (16, (419, 838, 1255))):
        for layers, millions in zip((12, 24, 36), sizes, strict=True):
            model = config_of(base(), txl(layers), experts).model
            assert model.num_experts == experts and model.d_model == 512
            fifth = 5 * model.d_model**2  # TXL's, where ours has four
            found = layers * (fifth + experts * 2 * model.d_model * model.d_ff)
            assert found / 1e6 == pytest.approx(millions, rel=0.01)


def test_each_constant_moves_what_it_is_of() -> None:
    def walk(experts: int, **changes: float):  # type: ignore[no-untyped-def]
        return bed().step(SMALL, experts, DDP, replace(PLAIN, **changes))

    for experts, own, other in ((4, "inside_factor", "between_factor"), (16, "between_factor", "inside_factor")):
        sent = walk(experts).all_to_all_s("F")
        assert walk(experts, **{own: 10.0}).all_to_all_s("F") > 5 * sent
        assert walk(experts, **{other: 10.0}).step_s == walk(experts).step_s
    assert walk(16, gradient_factor=5.0).all_to_all_s("F") == pytest.approx(walk(16).all_to_all_s("F"))
    gradients = [sum(e.end_s - e.start_s for e in walk(16, gradient_factor=f).sends("grads")) for f in (1.0, 5.0)]
    assert gradients[1] > 2 * gradients[0]
    for name, instruction in (("experts_factor", "experts"), ("gate_factor", "route"), ("attention_factor", "attention")):
        for seen in ("experts", "route", "attention"):
            times = 3.0 if seen == instruction else 1.0
            assert walk(16, **{name: 3.0}).compute_s(seen) == pytest.approx(times * walk(16).compute_s(seen)), (name, seen)
    assert walk(16, outside_ms=100.0).step_s == pytest.approx(walk(16).step_s + 0.1)


def test_a_batch_sends_half_the_rows_once_and_no_gradients() -> None:
    step, batch = bed().step(SMALL, 16, DDP, PLAIN), bed().batch(SMALL, 16, PLAIN)
    assert len(step.sends("tokens")) == 4 * SMALL.layers and len(batch.sends("tokens")) == 2 * SMALL.layers
    assert 2 * batch.sends("tokens")[0].num_bytes == step.sends("tokens")[0].num_bytes
    assert step.sends("grads") and not batch.sends("grads")


def test_the_layer_s_time_covers_its_exchanges_and_not_attention() -> None:
    walk = bed().step(SMALL, 16, DDP, replace(PLAIN, attention_factor=500.0))
    least_s = walk.all_to_all_s("F") / SMALL.layers
    assert least_s < walk.moe_layer_s("F") < least_s + walk.compute_s("attention", phase="F") / SMALL.layers


def test_models_are_what_the_module_says() -> None:
    assert [m.packed(16) for m in TRAINED] == [4, 2, 2] and all(m.packed(8) == 2 for m in TRAINED)
    assert (TXL.layers, GPT2.layers) == (24, 12)
    weights = {m: m.layers * m.d_model**2 for m in (TXL, GPT2)}
    assert weights[GPT2] / weights[TXL] == pytest.approx(1.125)


def test_lists_are_made_once_and_walks_of_other_constants_are_others() -> None:
    own = Bed(base())
    first = own.step(SMALL, 4, DDP, PLAIN)
    assert own.step(SMALL, 4, DDP, PLAIN) is first
    other: Model = replace(SMALL, d_model=1024, num_heads=16)
    assert own.step(other, 4, DDP, PLAIN).all_to_all_s("F") > first.all_to_all_s("F")
