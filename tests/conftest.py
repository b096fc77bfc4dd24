"""The order of the modules, what they take, and hypothesis's profiles."""

import math

import pytest

import tests.profiles  # noqa: F401  (registers them)
from tests.durations import FILE, Durations, recorded


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"write what each module takes to tests/{FILE.name}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Durations())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first, and those that aren't recorded: workers take one after another, and the last ones should be short."""
    known_s = recorded()
    items.sort(key=lambda item: -known_s.get(item.nodeid.split("::")[0], math.inf))
