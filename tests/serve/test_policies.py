"""Policies: the files of conf/infer, and what of them can't be."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalina.config import InferConfig
from megalina.placement.routing_trace import RoutingTrace, traced
from megalina.placement.triggers import OrderedTop
from megalina.serve.modes import read_mode
from megalina.serve.policies import Served, check_infer, policy_of, slots_of

CONF = Path(__file__).resolve().parents[2] / "conf" / "infer"
SERVED = Served(num_experts=8, top_k=2, num_devices=4)


def profile(num_experts: int = 8, top_k: int = 2) -> RoutingTrace:
    random = np.random.default_rng(0)
    ids = np.argsort(random.random((300, 5, num_experts)), axis=2)[:, :, :top_k]
    return traced(ids, num_experts, name="made")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_mode_is_ready_for_a_model(name: str) -> None:
    config = read_mode(CONF, name)
    assert config.name == name
    policy = policy_of(config, SERVED, profile())
    assert (policy.predictor is None) == (config.predictor == "none") and (policy.planner is None) == (config.planner == "none")
    if policy.planner is not None:
        placement = policy.planner(np.arange(8) / 28, 4, slots_of(config, SERVED))
        assert placement.num_devices == 4 and placement.num_experts == 8
    if name == "lina_paper":  # the paper's list is of twice the router's top-k
        assert policy.trigger == OrderedTop(4) and policy.first_planned == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"predictor": "gut feeling"}, "infer.predictor is 'gut feeling': choose one of none, static"),
        ({"trigger": "sometimes"}, "infer.trigger is 'sometimes'"),
        ({"slots_per_device": 1}, "infer.slots_per_device is 1: 4 devices then have 4 slots for 8 experts; choose 2 or more"),
        ({"planner": "greedy", "predictor": "none"}, "plans nothing: choose infer.predictor"),
        ({"planner": "none", "trigger": "always"}, "does nothing: choose infer.planner"),
        ({"combine_chunks": 5}, "a chunk is one or more of a device's 4 slots in a layer; choose 1 to 4, or"),
        ({"combine_chunks": 0}, "infer.combine_chunks is 0"),
        ({"swap_mib": -1.0}, "infer.swap_mib is -1.0: choose 0"),
        ({"path_length": 0}, "infer.path_length is 0: choose 1 or more"),
    ],
)
def test_what_cannot_be_is_one_line(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        check_infer(replace(read_mode(CONF, "best"), **change), SERVED)  # type: ignore[arg-type]
    assert said in str(error.value)


def test_a_profile_of_another_model_or_none_is_refused() -> None:
    with pytest.raises(ValueError, match="is of 16 experts and top-2, the model has 8 and top-2"):
        policy_of(read_mode(CONF, "best"), SERVED, profile(num_experts=16))
    with pytest.raises(ValueError, match="needs a profile"):
        policy_of(read_mode(CONF, "best"), SERVED, None)
    assert policy_of(InferConfig(), SERVED, None).predictor is None
