"""Steps on an emulated cluster, simulated: closed forms, and which way each constant pulls."""

from dataclasses import replace

import pytest

from benchmarks.validation.emulated import HostConstants, simulate_emulated
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.perfmodel.sim.virtual import Timeline
from megalina.plan_settings import plan_of

FREE = HostConstants(
    flops_per_s=1e30,
    bytes_per_s=1e30,
    kernel_s=0.0,
    stage_s=0.0,
    outside_s=0.0,
    link_efficiency=1.0,
    all_to_all_s=0.0,
    collective_s=0.0,
    hop_s=0.0,
    sum_weight=1.0,
)
DEVICE_S = (
    6 * (10e-3 + 14e-3) * 1.02 * 3
)  # six layers; a whole micro-batch costs its time and the floor of 2%; backward is twice forward
NARROW, WIDE = 500.0, 1e9


@pytest.fixture(scope="module")
def ladder() -> PretrainConfig:
    words = ("experiment=ladder", "model.num_experts=4", "parallel.ep=4", "train.global_batch_size=16", "launch.ranks=4")
    return compose([*words, "strategy=eager", "strategy.partition_bytes=0"])


def walked(config: PretrainConfig, host: HostConstants, *, link_mbit: float = WIDE) -> Timeline:
    plan = plan_of(config.strategy)
    return simulate_emulated(config, plan, nodes=4, ranks_per_node=1, link_mbit=link_mbit, vocab_size=320, host=host)


def test_with_free_hosts_and_links_a_step_is_what_the_device_takes(ladder: PretrainConfig) -> None:
    assert walked(ladder, FREE).step_s == pytest.approx(DEVICE_S, rel=1e-3)


def test_links_and_hosts_add_what_closed_forms_say(ladder: PretrainConfig) -> None:
    """24 all-to-alls of 3/4 MiB out of each node under eager, none of them hidden; sums are left out of it by serial."""
    serial = replace(ladder, strategy=replace(ladder.strategy, name="serial"))
    found = walked(serial, FREE, link_mbit=NARROW)
    tokens_s = 24 * 0.75 * 2**20 / (NARROW * 1e6 / 8)
    waited_s = sum(e.exposed_s for e in found.events(0) if e.kind == "wait" and e.op == "tokens")
    assert waited_s == pytest.approx(tokens_s, rel=1e-3)
    late = walked(serial, replace(FREE, all_to_all_s=1e-3), link_mbit=NARROW)
    assert late.step_s - found.step_s == pytest.approx(24e-3, rel=0.1)  # the exchange of sizes is one, too
    assert walked(serial, replace(FREE, outside_s=0.25), link_mbit=NARROW).step_s == pytest.approx(found.step_s + 0.25)


def test_sums_that_weigh_more_slow_the_tokens_beside_them(ladder: PretrainConfig) -> None:
    def waits_s(weight: float) -> float:
        events = walked(ladder, replace(FREE, sum_weight=weight), link_mbit=NARROW).events(0)
        return sum(e.exposed_s for e in events if e.kind == "wait" and e.op == "tokens")

    assert waits_s(1.0) < waits_s(2.0) < waits_s(4.0)


def test_a_slow_host_is_hidden_where_the_device_is_busy_and_not_after_a_wait(ladder: PretrainConfig) -> None:
    slow = replace(FREE, stage_s=0.2e-3)
    alone = walked(ladder, slow).step_s - DEVICE_S
    instructions = sum(1 for e in walked(ladder, FREE).events(0) if e.kind != "send")
    assert 0 < alone < 0.9 * instructions * slow.stage_s


def test_no_emulated_device_is_refused(ladder: PretrainConfig) -> None:
    real = replace(ladder, cluster=replace(ladder.cluster, attention_ms=0.0, experts_ms=0.0))
    with pytest.raises(ValueError, match="attention_ms"):
        walked(real, FREE)
