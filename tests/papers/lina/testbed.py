"""One testbed for all tests here: lists are made once."""

from functools import cache

from megalina.compose import compose
from megalina.config import PretrainConfig
from papers.lina.walk import Bed, Constants

PLAIN = Constants(
    inside_factor=1.0,
    between_factor=1.0,
    gradient_factor=1.0,
    experts_factor=1.0,
    gate_factor=1.0,
    attention_factor=1.0,
    outside_ms=1e-9,
)


@cache
def base() -> PretrainConfig:
    return compose(["model=lina_12l_4e", "cluster=lina_testbed"])


@cache
def bed() -> Bed:
    return Bed(base())
