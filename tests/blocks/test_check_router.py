"""Settings of a router that contradict each other are refused before anything is built."""

import pytest

from megalina.blocks.routers import check_router
from megalina.config import RouterConfig

NUM_EXPERTS, WIDTH = 6, 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RouterConfig(kind="top2"), "topk, sigmoid"),
        (RouterConfig(kind="nowhere/none.py:Router"), "there is no such file"),
        (RouterConfig(kind="megalina.blocks.moe:MoE"), "is no RouterKind"),
        (RouterConfig(top_k=7), r"top_k \(7\) is more than model.num_experts \(6\)"),
        (RouterConfig(group="global", capacity_factor=1.0), "capacity_factor=1 would need the scores of all ranks"),
        (RouterConfig(group="global", kind="expert_choice"), "router=expert_choice would need the scores of all ranks"),
        (RouterConfig(bias_update_rate=0.1), "works with router=sigmoid or group_limited alone, not with topk"),
        (RouterConfig(noise_std=0.1), "works with router=noisy_topk alone"),
        (RouterConfig(num_groups=2), "works with router=group_limited or group_limited_softmax alone"),
        (RouterConfig(kind="group_limited", num_groups=4), r"num_groups \(4\) must divide model.num_experts \(6\)"),
        (RouterConfig(kind="group_limited", num_groups=3, groups_per_token=4), "is more than router.num_groups"),
        (RouterConfig(kind="group_limited", num_groups=3, groups_per_token=1, top_k=3), "more than the 2 experts"),
        (RouterConfig(kind="group_limited_softmax", num_groups=4), r"num_groups \(4\) must divide model.num_experts \(6\)"),
        (RouterConfig(kind="group_limited_softmax", bias_update_rate=0.1), "works with router=sigmoid or group_limited alone"),
        (RouterConfig(kind="hash", bias=True), r"router.bias \(true\) works with router=topk or sigmoid or group_limited or "),
        (RouterConfig(bias=True, capacity_bound="locmoe"), "is of cosines, and router.bias=true adds to the products"),
        (RouterConfig(kind="sigmoid", bias_update="proportional"), "does nothing with router.bias_update_rate=0"),
        (RouterConfig(kind="sigmoid", bias_centered=True), "bias_centered=true does nothing with router.bias_update_rate=0"),
        (
            RouterConfig(kind="sigmoid", bias_centered=True, bias_update="proportional", bias_update_rate=0.1),
            "does nothing with router.bias_update=proportional",
        ),
    ],
)
def test_contradicting_settings_are_refused_in_one_line(config: RouterConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_router(config, NUM_EXPERTS, WIDTH)
    assert "\n" not in str(error.value)
