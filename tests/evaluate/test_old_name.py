"""What docs called `megalina.infer` is refused with its new names."""

import importlib

import pytest


@pytest.mark.parametrize("name", ["megalina.infer", "megalina.infer.harness"])
def test_the_old_name_says_the_new_ones(name: str) -> None:
    with pytest.raises(
        ImportError, match="megalina.infer is gone: its engine is megalina.serve, its evaluation megalina.evaluate"
    ):
        importlib.import_module(name)
