"""Settings of any value: accepted, or refused in one line; absurd sizes are told from a dry run without memory for them."""

import copy
import math
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import setup_globals
from hypothesis import given
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from megalina.cli import train
from megalina.config import PretrainConfig, settings
from megalina.credentials import text_values
from megalina.dry_run import describe
from megalina.validate import check_config, has_wandb_key
from megalina.worker import load_config

INTS = [0, 1, 2, 3, -1, 7, 2**31, 2**53, 10**12, 10**18, 2**63, 10**400]
FLOATS = [0.0, -0.0, 1.0, 0.5, -1.0, 5e-324, 1e-300, 1e38, 1e300, 1.7e308, math.nan, math.inf, -math.inf]
WORDS = [
    "",
    " ",
    "none",
    "None",
    "\0",
    "a\nb",
    "../..",
    "x" * 5000,
    "ü漢\U0001f600",
    "${a}",
    "1e999",
    "nan,nan",
    "1,2,3,4",
    ",",
    "-",
]
LISTS = [
    [], ["a"], ["1", "a", "1e999", "b"], ["nan", "a"], [[1], [2]], [["1"], "a"], ["1", ["a"]], [None, None], [1, 2], [10**400, 1],
]  # fmt: skip
NUMBER_LISTS = [
    [1, 2], [2, 1], [-1, 5], [0, 10**30], ["1", "2"], [[1], [2]], [1.5, 2.5], [math.nan, 1.0], [None, None], [True, 2],
]  # fmt: skip
YAML = [
    "nan", ".inf", "-1", "1e999", "9" * 400, "9" * 5000, "''", "null", "[]", "{}", "[[[[1]]]]", "{a: {b: 1}}", "[.nan]", "0x10",
    "1_0", "on", "2020-01-01", "!!python/object/apply:os.system ['touch HARM']", "!!binary aGk=", "&a [*a]", "${oc.env:NO_SUCH}",
    "${run.dir}", "${oc.decode:'['}", "'${'", "\t", "a: b: c", "'\\\\${run.dir}'", "?", "ü",
]  # fmt: skip


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


KEYS = dict(leaves(PretrainConfig()))
BASE = PretrainConfig()
LOWS = {key: may_be["low"] for key, _, may_be in settings(BASE) if "low" in may_be}


def changed(key: str, value: Any) -> PretrainConfig:
    config = copy.deepcopy(BASE)
    *groups, name = key.split(".")
    group: Any = config
    for part in groups:
        group = getattr(group, part)
    setattr(group, name, value)
    return config


def accepted(config: PretrainConfig) -> bool:
    """Whether it passes the check; then it can be described as well."""
    try:
        check_config(config, config.launch.ranks)
    except ValueError as error:
        assert type(error) is ValueError, repr(error)[:200]
        assert "\n" not in str(error).replace("a\nb", "")  # a word that was typed may be shown
        return False
    assert "parameters" in describe(config, config.launch.ranks, vocab_size=config.model.vocab_size or config.data.vocab_size)
    return True


def odd_values(key: str) -> list[Any]:
    value = KEYS[key]
    if isinstance(value, bool):
        return [not value]
    kind = LISTS if key == "data.blend" else NUMBER_LISTS
    return {int: INTS, float: FLOATS, str: WORDS, list: kind}[type(value)]


@pytest.mark.sampled(60)
def test_every_setting_is_accepted_or_refused_in_one_line(subtests: pytest.Subtests) -> None:
    for key, default in KEYS.items():
        if type(default) is not int:
            with subtests.test(key):
                outcomes = [(value, accepted(changed(key, value))) for value in odd_values(key)]
                if isinstance(default, float):
                    low = min(-0.5, LOWS.get(key, 0.0))
                    assert not any(good for value, good in outcomes if not math.isfinite(value) or value < low)


@pytest.mark.full
def test_every_integer_is_accepted_or_refused_without_memory_for_it(subtests: pytest.Subtests) -> None:
    tracemalloc.start()
    try:
        for key in (key for key, default in KEYS.items() if type(default) is int):
            with subtests.test(key):
                tracemalloc.reset_peak()
                outcomes = [(value, accepted(changed(key, value))) for value in INTS]
                assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
                assert not any(good for value, good in outcomes if value < 0 or value > 2**63 - 1)
    finally:
        tracemalloc.stop()


NUMBERS = [key for key, value in KEYS.items() if isinstance(value, int | float) and not isinstance(value, bool)]


@given(
    st.dictionaries(st.sampled_from(NUMBERS), st.sampled_from([0, 1, 2, 3, 4, 6, 64, 2**20, 2**31 - 1]), min_size=2, max_size=8)
)
def test_settings_that_are_odd_together_are_accepted_or_refused(values: dict[str, Any]) -> None:
    config = copy.deepcopy(BASE)
    for key, value in values.items():
        *groups, name = key.split(".")
        group: Any = config
        for part in groups:
            group = getattr(group, part)
        setattr(group, name, float(value) if isinstance(KEYS[key], float) else value)
    config.launch.ranks = min(config.launch.ranks, 64)
    accepted(config)


def test_a_batch_that_fits_nothing_is_refused_at_once() -> None:
    config = changed("train.global_batch_size", 2**24 - 3)  # a prime number
    config.train.micro_batch_size = 2**24
    with pytest.raises(ValueError, match="must be a multiple of train.micro_batch_size"):
        check_config(config, 1)


@pytest.fixture(autouse=True, scope="module")
def resolvers() -> None:
    """What Hydra adds to OmegaConf: ${now:...}, as run.dir has it."""
    setup_globals()


def refusal(text: str) -> str | None:
    """What the command would say of a configuration file; None: it is read."""
    try:
        config = load_config(text)
    except (ValueError, OmegaConfBaseException) as error:
        line = train.explain(error, [])
        assert "\n" not in line, line
        return line
    assert isinstance(config, PretrainConfig)
    assert not any("${" in value for value in text_values(config).values())
    return None


@pytest.mark.full
def test_a_key_of_each_group_may_have_any_yaml_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = sorted(KEYS)
    for number, value in enumerate(YAML):
        with subtests.test(value[:30]):
            for key in keys[number % 9 :: 9]:  # each value meets every ninth key, each key every ninth value
                *groups, name = key.split(".")
                text = "".join(f"{'  ' * depth}{group}:\n" for depth, group in enumerate(groups))
                refusal(f"{text}{'  ' * len(groups)}{name}: {value}\n")
            assert list(tmp_path.iterdir()) == []


@given(st.one_of(st.text(max_size=30), st.binary(max_size=30).map(lambda raw: raw.decode("latin-1"))))
def test_a_configuration_may_be_any_text(text: str) -> None:
    refusal(text)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "text", ["[" * 1000, "a: " * 50, "{" * 600 + "}" * 600, "\0", "[1, 2]", "train: [1]", "- a", "model: *x", "\ud800"]
)
def test_what_is_no_configuration_is_refused(text: str) -> None:
    assert refusal(text) is not None


def test_a_reference_is_resolved_once_and_none_is_left_for_the_next_reader() -> None:
    assert load_config("{model: {name: 'of ${train.steps}'}}").model.name == "of 100"
    line = refusal("{model: {name: 'of \\${train.steps}'}}")
    assert line == "model.name is still a reference after it was resolved: take the backslashes away"


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """A dry run in this process: (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        code = train.main([*arguments, "launch.dry_run=true"])
        return code, capsys.readouterr().err

    return run


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=" + "9" * 400, "optim.lr: int too large to convert to float"),
        ("train.steps=" + "9" * 400, "train.steps=999"),
        ("train.steps=" + "9" * 5000, "Exceeds the limit"),
        ("model.d_model=1000000000000", "model.d_model=1000000000000 must be at least 1 and at most 2147483647"),
        ("launch.ranks=1000000000000", "launch.ranks=1000000000000 must be at least 1 and at most 1000000"),
        ("optim.lr=nan", "optim.lr=nan must be a finite number"),
        ("data.skip_samples=[[1],[2]]", "data.skip_samples=[[1], [2]] must be pairs"),
        ("data.blend=[[a],b]", "data.blend=[['a'], 'b'] must be a list of words"),
        ("model.name=${oc.env:NO_SUCH_VARIABLE}", "model.name: KeyError raised while resolving"),
        ("model.name=${model.name}", "model.name: Recursive interpolation detected"),
        ("model=../../../etc/passwd", "model=../../../etc/passwd"),
        ("train=[1]", "train: "),
    ],
    ids=lambda text: text[:30],
)
def test_the_command_refuses_in_one_line(
    command: Callable[..., tuple[int, str]], tmp_path: Path, override: str, message: str
) -> None:
    code, err = command(override)
    assert (code, err.count("\n")) == (2, 1), err[-2000:]
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_a_model_that_no_memory_holds_can_be_looked_at(command: Callable[..., tuple[int, str]]) -> None:
    assert command("model.d_model=2147483640", "model.num_layers=100000", "model.d_ff=2147483647") == (0, "")


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"machine", b"machine a login b password", b"default\n", b"macdef x", b"\0" * 9])
def test_a_netrc_file_may_be_anything(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / ".netrc").write_bytes(raw)
    try:
        assert not has_wandb_key({}, tmp_path)
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path}/.netrc can't be read as a netrc file")
