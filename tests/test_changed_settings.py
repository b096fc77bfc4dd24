"""A run that goes on says which settings have changed, and refuses those that its saved state doesn't allow."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megalina.changed_settings import KINDS, Kind, as_json, change_line, changes, check_changes, flat, kind_of, row_of
from megalina.checkpoint import files
from megalina.config import PretrainConfig
from megalina.validate import value_at


def changed(**values: Any) -> PretrainConfig:
    """`changed(optim__lr=1)`"""
    config = PretrainConfig()
    for key, value in values.items():
        head, _, name = key.replace("__", ".").rpartition(".")
        setattr(value_at(config, head), name, value)
    return config


SAVED = asdict(PretrainConfig())
SETTINGS = list(flat(SAVED))


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    for setting in SETTINGS:
        row_of(setting)
    names = {".".join(setting.split(".")[:n]) for setting in SETTINGS for n in range(1, 5)}
    assert set(KINDS) <= names
    groups = {f.name for f in fields(PretrainConfig) if isinstance(f.type, type) and is_dataclass(f.type)}
    assert groups <= set(KINDS), "a new group of settings says what a change of it does to a run that goes on"
    with pytest.raises(KeyError):
        row_of("nosuch.setting")


def test_what_may_change_is_told_and_nothing_else() -> None:
    config = changed(optim__lr=0.003, parallel__ep=2, run__dir="other", train__resume="x", train__exit_step=7)
    found = check_changes("C", SAVED, config)
    assert [(c.setting, c.old, c.new, c.kind) for c in found] == [
        ("parallel.ep", 1, 2, Kind.FREE),
        ("optim.lr", 0.001, 0.003, Kind.FREE),
    ]
    assert change_line(30, as_json(found)) == "changed since step 30: parallel.ep 1 -> 2, optim.lr 0.001 -> 0.003"
    assert check_changes("C", SAVED, PretrainConfig()) == []


def test_values_are_shown_as_they_are_typed() -> None:
    pairs = {"a": [True, False], "b": ["", "x"], "c": [1e-8, 0.1234567890123], "d": [[], ["A", 1]]}
    assert (
        change_line(1, pairs) == "changed since step 1: a true -> false, b '' -> x, c 1e-08 -> 0.1234567890123, d [] -> ['A', 1]"
    )


MEANING = {
    "train.seed": 7,
    "train.seq_len": 64,
    "train.dtype": "float64",
    "router.z_loss": 0.5,
    "router.group": "global",
    "data.prefix": "elsewhere",
    "data.split": "1",
    "data.blend": ["1", "stdlib"],
    "model.dropout": 0.1,
    "model.window": 64,
    "model.rope_factor": 4.0,
}


@pytest.mark.parametrize("setting", MEANING)
def test_another_order_or_meaning_needs_a_word(setting: str) -> None:
    config = changed(**{setting.replace(".", "__"): MEANING[setting]})
    with pytest.raises(
        ValueError, match=rf"checkpoint C is of another run: {setting} .* -> .*train.allow_changes=true"
    ) as raised:
        check_changes("C", SAVED, config)
    assert "\n" not in str(raised.value) and "set it back" in str(raised.value) and "another run.dir" in str(raised.value)
    config.train.allow_changes = True
    assert [c.setting for c in check_changes("C", SAVED, config)] == [setting]


STATE = {
    "model.d_model": (128, "another model"),
    "model.num_heads": (2, "another model"),
    "router.kind": ("sigmoid", "another model"),
    "router.bias_update_rate": (0.1, "another model"),
    "train.dtype": ("bfloat16", "number type"),
    "optim.name": ("sgd", "another optimizer"),
    "optim.muon_routers": (True, "another optimizer"),
}


@pytest.mark.parametrize("setting", STATE)
def test_another_state_is_refused_whatever_is_allowed(setting: str) -> None:
    value, what = STATE[setting]
    config = changed(**{setting.replace(".", "__"): value, "train__allow_changes": True})
    shown = str(value).lower() if isinstance(value, bool) else value
    with pytest.raises(ValueError, match=rf"^checkpoint C is of .*{what}.*: {setting} \S+ -> {shown}: set back") as raised:
        check_changes("C", SAVED, config)
    assert "\n" not in str(raised.value)
    assert ("train.init_from=C" in str(raised.value)) == (not setting.startswith(("model", "router")))


def test_learned_positions_are_tensors() -> None:
    assert kind_of("model.max_positions", 0, 64, positions="learned") is Kind.STATE
    assert kind_of("model.max_positions", 0, 64) is Kind.MEANING


def test_a_checkpoint_that_lacks_a_setting_had_its_default() -> None:
    saved = asdict(PretrainConfig())
    del saved["train"]["allow_changes"], saved["optim"]["beta1"], saved["profile"]
    saved["optim"]["gone"] = 1
    assert changes(saved, PretrainConfig()) == []
    assert [str(c) for c in changes(saved, changed(optim__beta1=0.5))] == ["optim.beta1 0.9 -> 0.5"]


def test_more_than_three_are_counted() -> None:
    with pytest.raises(ValueError, match=r"train.seq_len 128 -> 64 and 1 more: this changes"):
        check_changes("C", SAVED, changed(train__seed=7, train__seq_len=64, router__z_loss=0.5, router__scale=2.0))


@pytest.mark.parametrize("before, now", [(True, "head"), (False, "none"), ("projection", "projection")])
def test_a_checkpoint_of_before_there_were_several_norms_says_which_one_it_has(
    before: object, now: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {**SAVED, "model": {**SAVED["model"], "qk_norm": before}}
    monkeypatch.setattr(files, "read_description", lambda path: {"values": {"config": saved}, "tensors": {}})
    assert check_changes("C", files.read_values(Path("C"))["config"], changed(model__qk_norm=now)) == []
