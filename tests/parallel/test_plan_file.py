"""A plan in a file: what was found is what another run of the same job begins with; all else is refused in one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalina.config import PretrainConfig, StrategyConfig
from megalina.parallel.plan_file import check_order, read_plan, setting_of, with_plan, write_plan
from megalina.plan_settings import overrides_of, plan_of, strategy_of
from megalina.step.order import order_of
from megalina.step.plan import Plan
from megalina.step.strategy import training_step
from megalina.validate import check_config

WORLD, VOCABULARY = 4, 300
FOUND = Plan("flow", parts=2, yields=True, late_layers=2, piece_bytes=2**19, packing=2)


def job(**strategy: object) -> PretrainConfig:
    config = PretrainConfig()
    config.launch.device = "cpu"
    config.parallel.ep, config.train.global_batch_size = WORLD, 2 * WORLD
    return replace(config, strategy=StrategyConfig(**{"name": "auto", "packing": "auto", **strategy}))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan.json", job(), WORLD, FOUND, evidence="tried")
    return tmp_path / "plan.json"


def refusal(config: PretrainConfig, world: int = WORLD) -> str:
    with pytest.raises(ValueError) as error:
        with_plan(config, world)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_with_the_file_begins_with_its_plan_and_asks_nothing(path: Path) -> None:
    config = with_plan(job(plan=str(path)), WORLD)
    check_config(config, WORLD)
    assert plan_of(config.strategy, packing=int(config.strategy.packing)) == FOUND
    assert "auto" not in (config.strategy.name, config.strategy.packing, config.strategy.chunks, config.strategy.partition_bytes)
    config.train.deterministic = True  # nothing is decided by a clock any more
    check_config(config, WORLD)
    named = with_plan(job(plan=str(path), name="flow", parts=4), WORLD)
    assert named.strategy == config.strategy


def test_without_a_file_nothing_changes() -> None:
    config = job()
    assert with_plan(config, WORLD) is config
    with pytest.raises(ValueError, match=r"strategy\.plan=x\.json is not read here"):
        check_config(job(plan="x.json"), WORLD)


def test_a_plan_of_another_job_is_refused_with_what_differs(path: Path) -> None:
    deeper = job(plan=str(path))
    deeper.model.num_layers += 2
    layers = PretrainConfig().model.num_layers
    assert f"is of another job: model.num_layers is {layers} there and {layers + 2} here;" in refusal(deeper)
    assert "is of another job: world is 4 there and 8 here;" in refusal(job(plan=str(path)), world=8)
    wide = job(plan=str(path))
    wide.train.seq_len, wide.parallel.zero, wide.router.top_k, wide.model.d_model = 7, 1, 1, 11
    assert "and 1 more; leave it out and search with strategy=auto" in refusal(wide)
    assert "is a plan of flow: give strategy=auto with it, not lina" in refusal(job(plan=str(path), name="lina"))
    renamed = job(plan=str(path))
    renamed.model.name, renamed.train.seed, renamed.optim.lr = "other", 5, 1.0
    assert with_plan(renamed, WORLD).strategy.name == "flow"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda text: text[: len(text) // 2], "it is no JSON from line "),
        (lambda text: "", "it is no JSON from line 1, column 1 on"),
        (lambda text: "[]", "its 'plan' is missing or damaged"),
        (lambda text: '{"plan": 3}', "its 'plan' is missing or damaged"),
        (lambda text: '{"plan": {"strategy": "flow"}}', "what it is a plan of isn't there under 'of'"),
        (lambda text: text.replace('"late_layers": 2', '"late_layers": "2"'), "late_layers of its 'plan' is no int"),
        (lambda text: text.replace('"late_layers"', '"latest_layers"'), "a plan has no 'latest_layers'"),
        (lambda text: text.replace('"strategy": "flow"', '"strategy": 7'), "strategy of its 'plan' is no str"),
        (lambda text: text.replace('"yields": true', '"gap_bytes": [[1]], "yields": true'), "its 'plan' is missing or damaged"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(path: Path, change: Callable[[str], str], wrong: str) -> None:
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    line = refusal(job(plan=str(path)))
    assert line.startswith(f"strategy.plan={path} is no plan of megalina's, {wrong}") and "Error" not in line
    assert line.endswith(": take a plan.json from a run's folder")


def test_a_file_that_is_not_there_and_one_of_bytes_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere\.json"):
        with_plan(job(plan=str(tmp_path / "nowhere.json")), WORLD)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "is no plan" in refusal(job(plan=str(tmp_path / "bytes.json")))


@given(parts=st.integers(1, 4), piece=st.integers(0, 2**24), merge_mib=st.integers(0, 50), packing=st.integers(1, 8))
def test_a_strategy_of_a_plan_gives_the_plan(parts: int, piece: int, merge_mib: int, packing: int) -> None:
    plan = Plan("flow", parts=parts, piece_bytes=piece, merge_bytes=merge_mib * 2**20, packing=packing, chunks=(1, 2))
    strategy = strategy_of(plan, StrategyConfig(name="auto", packing="auto", packing_memory_gb=1.5))
    assert plan_of(strategy, packing=packing) == plan and strategy.packing_memory_gb == 1.5


def test_the_file_holds_what_people_ask_for(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["evidence"] == "tried" and found["of"]["world"] == WORLD
    assert read_plan(path)[0] == FOUND
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# an order of instructions


def searched(folder: Path, change: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda order: order) -> PretrainConfig:
    """A job with a file whose plan has an order, that of lancet's list; `change`: of it."""
    config = job(name="search", packing="1")
    plan = Plan("lancet", deferred_weights="all")
    order = order_of(training_step("lancet", setting_of(config, WORLD, VOCABULARY).under(plan)))
    write_plan(folder / "plan.json", config, WORLD, replace(plan, order=change(order)), evidence="searched")
    return job(name="search", packing="1", plan=str(folder / "plan.json"))


def test_an_order_is_taken_from_a_file_and_nothing_is_searched(tmp_path: Path) -> None:
    config = with_plan(searched(tmp_path), WORLD)
    config.train.deterministic = True
    check_config(config, WORLD)
    check_order(config, WORLD, vocab_size=VOCABULARY)
    plan = plan_of(config.strategy)
    assert plan == read_plan(tmp_path / "plan.json")[0] and plan.strategy == "lancet"
    assert order_of(training_step("lancet", setting_of(config, WORLD, VOCABULARY))) == plan.order
    with pytest.raises(ValueError, match="has an order of its own: give it to a run as a file"):
        overrides_of(plan)


def test_an_order_that_does_not_fit_is_refused_with_what_differs(tmp_path: Path) -> None:
    lacks = with_plan(searched(tmp_path, lambda order: order[:-1]), WORLD)
    with pytest.raises(ValueError, match=r"can't be followed: the plan's order of instructions lacks U:.*; search anew"):
        check_order(lacks, WORLD, vocab_size=VOCABULARY)
    illegal = with_plan(searched(tmp_path, lambda order: order[::-1]), WORLD)
    with pytest.raises(ValueError, match="can't be followed: .* before it is written"):
        check_order(illegal, WORLD, vocab_size=VOCABULARY)


def test_an_order_that_was_edited_is_refused(tmp_path: Path) -> None:
    config = searched(tmp_path)
    path = tmp_path / "plan.json"
    text = path.read_text()
    path.write_text(text.replace('"F:embed.-.0",', "", 1))
    assert path.read_text() != text
    assert "the order of instructions in its 'plan' is not the one that its checksum is of" in refusal(config)


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ({"name": "search", "order": "F:embed.-.0"}, r"strategy\.order is what strategy\.plan=FILE gives"),
        ({"name": "flow", "search_evaluations": 5}, r"strategy\.search_evaluations=5 does nothing with strategy=flow, only with"),
        ({"name": "search", "chunks": "auto"}, r"strategy=search and auto in strategy\.\* exclude each other"),
        ({"name": "search", "plan": "x.json"}, r"strategy\.plan=x\.json is not read here"),
    ],
)
def test_settings_of_a_search_that_make_no_sense_are_refused(strategy: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_config(job(**{"packing": "1", **strategy}), WORLD)


def test_a_deterministic_run_does_not_search() -> None:
    config = job(name="search", packing="1")
    check_config(config, WORLD)
    config.train.deterministic = True
    with pytest.raises(
        ValueError, match=r"train\.deterministic=true and strategy=search exclude each other.*strategy\.plan=FILE"
    ):
        check_config(config, WORLD)
