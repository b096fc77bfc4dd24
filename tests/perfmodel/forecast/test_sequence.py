"""The forecast walks the very list that the trainer runs, and in virtual time each rank sends the same as on gloo, to the byte.

Routing is recorded on gloo and given to the simulator: who is sent how much is the one thing that no configuration says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megalina.blocks.model import shape_of
from megalina.config import PretrainConfig, StrategyConfig
from megalina.perfmodel.forecast.search import accepted
from megalina.perfmodel.sim.sizes import Sizes
from megalina.step.program import Instruction, Kind, Op, Program
from megalina.validate import check_config
from megalina.validate_strategy import PACKED
from tests.in_groups import InGroups
from tests.parallel.ranks import run_on_ranks
from tests.perfmodel.forecast.counted import counted, rows_between
from tests.perfmodel.forecast.sequence_ranks import (
    WORLD,
    Forecasted,
    Seen,
    Sequences,
    configs_of,
    counts_of,
    difference,
    forecasted,
    in_virtual_time,
    on_gloo,
    steps_of,
)
from tests.train.small_run import write_tokens

Case = tuple[StrategyConfig, Mapping[str, Any]]
FILES = {path.stem: path for path in sorted((Path(__file__).parents[3] / "conf" / "strategy").glob("*.yaml"))}
NAMES = tuple(FILES)
SMALLER = {"partition_bytes": "2048", "bucket_mb": 0.02}  # where a strategy has such: the model is small, too
PLAIN = {"ep": 4, "shared_d_ff": 16}
FULL = {"ep": 2, "tp": 2, "zero": 1, "accumulate": 4, "recompute": "full", "capacity_factor": 1.0}
SELECTIVE = {"ep": 2, "accumulate": 4, "recompute": "selective", "capacity_factor": 0.75, "dense_layers_first": 1}
ONCE = {  # what differs in other ways, once
    "experts choose": ("flow", {"ep": 4, "kind": "expert_choice", "accumulate": 2}, {}),
    "experts choose, tensor parallel": ("eager", {"ep": 2, "tp": 2, "kind": "expert_choice", "shared_d_ff": 16}, {}),
    "balance over all ranks": ("eager", {"ep": 2, "group": "global", "tie_embeddings": False}, {}),
    "parts of a group": ("flow", {"ep": 4, "group": "micro_batch", "capacity_factor": 1.0, "zero": 1}, {"late_layers": 2}),
    "copied activations": (
        *("lina_zero", {"tp": 2, "ep": 1, "sequence": False, "zero": 1, "bias": True, "positions": "learned"}),
        {"chunks": "3"},
    ),
    "half precision, dense layers": ("flow", {"ep": 4, "dtype": "bfloat16", "moe_every": 2, "zero": 1}, {"yields": True}),
    "hashed, untied": ("ddp", {"ep": 2, "tp": 2, "kind": "hash", "tie_embeddings": False, "qk_norm": "head", "bias": True}, {}),
    "once per rank": ("flow", {"ep": 4, "dispatch": "once_per_rank", "accumulate": 2}, {}),
    "once per rank, packed": ("lina", {"ep": 4, "dispatch": "once_per_rank", "dtype": "bfloat16"}, {"packing": "2"}),
    "by node": ("flow", {"ep": 4, "reduce": "by_node", "accumulate": 2}, {}),
    "shards by node": ("lina_zero", {"ep": 2, "reduce": "by_node", "zero": 1}, {}),
    "uneven chunks": ("lina_nopack", {"ep": 4, "dtype": "float64", "capacity_factor": 1.5}, {"chunks": "1,3"}),
}


def strategy_of(name: str, **more: Any) -> StrategyConfig:
    """As conf/strategy has it, in smaller pieces."""
    plain = StrategyConfig()
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StrategyConfig), OmegaConf.load(FILES[name])))
    assert isinstance(found, StrategyConfig)
    smaller = {key: value for key, value in SMALLER.items() if getattr(found, key) != getattr(plain, key)}
    return replace(found, **{**smaller, **more})


def cases() -> dict[str, Case]:
    """Of each strategy three layouts, in which it meets every value that it may be run with; and some more."""
    out: dict[str, Case] = {}
    for name in NAMES:
        needed = {"zero": 1} if name == "lina_zero" else {"accumulate": 2} if name == "pair" else {}
        packed = {"packing": "2"} if name in PACKED else {}
        chunks, other = ({}, {}) if name == "auto" else ({"chunks": "2"}, {"chunks": "1,3" if name == "eager" else "3"})
        out[f"{name}, plain"] = strategy_of(name), {**PLAIN, **needed}
        out[f"{name}, full"] = strategy_of(name, **packed, **chunks), FULL
        out[f"{name}, selective"] = strategy_of(name, **({} if name == "eager" else other)), {**needed, **SELECTIVE}
    return out | {f"{name}, {what}": (strategy_of(name, **more), values) for what, (name, values, more) in ONCE.items()}


CASES = cases()
PLANTED = ("eager, full", "flow, selective", "lina, plain")
QUICK = {*PLANTED, "eager, plain", "pair, plain", "lancet, selective", "lina_zero, full", "flow, by node"}
every_case = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n not in QUICK)) for n in CASES])


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PretrainConfig]:
    folder = tmp_path_factory.mktemp("run")
    write_tokens(folder / "tokens")
    return configs_of(folder, CASES)


@pytest.fixture(scope="module")
def seen(configs: dict[str, PretrainConfig]) -> dict[str, list[Seen]]:
    """What all ranks saw of each case."""
    groups = [[name for name in CASES if (name in QUICK) == quick] for quick in (True, False)]
    return InGroups(groups, lambda names: real_steps({name: configs[name] for name in names}))


def real_steps(configs: Mapping[str, PretrainConfig]) -> dict[str, list[Seen]]:
    for config in configs.values():
        check_config(config, WORLD)
    by_rank = run_on_ranks(WORLD, steps_of, list(configs.values()), time_limit_s=600)
    return {name: list(own) for name, own in zip(configs, zip(*by_rank, strict=True), strict=True)}


def as_counted(found: Forecasted, seen: Sequence[Seen]) -> Sizes:
    return counted(found.sizes, counts_of(seen), row_bytes=found.row_bytes)


def simulated(found: Forecasted, seen: Sequence[Seen], *, seed: int = 0) -> Sequences:
    return in_virtual_time([found.program] * WORLD, as_counted(found, seen), found.axes, seed=seed)


@pytest.mark.sampled(4)
@every_case
def test_the_forecasts_list_is_the_trainers(name: str, configs: dict[str, PretrainConfig], seen: dict[str, list[Seen]]) -> None:
    program = forecasted(configs[name]).program
    for own in seen[name]:
        assert [instruction.tag for instruction in own.program] == [instruction.tag for instruction in program]
        assert own.program == program


@every_case
def test_each_rank_sends_the_same_in_the_same_order(
    name: str, configs: dict[str, PretrainConfig], seen: dict[str, list[Seen]]
) -> None:
    real = on_gloo(seen[name])
    assert difference(real, simulated(forecasted(configs[name]), seen[name], seed=len(name))) == ""
    uneven = [s for group in real.values() for sent in group.values() for s in sent if s.op == "tokens"]
    assert not uneven or any(len(set(s.sent_bytes)) > 1 for s in uneven)


def test_every_value_is_met_by_every_strategy_that_may_be_run_with_it(configs: dict[str, PretrainConfig]) -> None:
    met = {name: [c for case, c in configs.items() if case.partition(",")[0] == name] for name in NAMES}
    for name, own in met.items():
        assert {c.parallel.zero for c in own} == ({1} if name == "lina_zero" else {0, 1})
        assert {c.train.recompute for c in own} == {"none", "selective", "full"} and {c.parallel.tp for c in own} == {1, 2}
        fewest = 2 if name == "pair" else 1  # micro-batches
        assert {fewest, 4} <= {c.train.global_batch_size // (c.train.micro_batch_size * WORLD // c.parallel.tp) for c in own}
        assert {c.router.capacity_factor > 0 for c in own} == {False, True}
        assert {c.strategy.packing for c in own} >= ({"2"} if name in PACKED else {"1"})
        assert name == "auto" or {c.strategy.chunks for c in own} > {"2"}
    assert any(s.piece[0] > 0 for s in forecasted(configs["lina, plain"]).program)  # buckets are really cut


# planted bugs: what is simulated is changed, and must not look like what was run


def planted(
    change: Callable[[Program, Random], Program],
    ranks: Sequence[int],
    name: str,
    configs: dict[str, PretrainConfig],
    seen: dict[str, list[Seen]],
) -> list[str]:
    """What is said of so many changed lists, which only `ranks` walk."""
    found, out = forecasted(configs[name]), []
    for seed in range(3):
        changed = change(found.program, Random(seed))
        programs = [changed if rank in ranks else found.program for rank in range(WORLD)]
        virtual = in_virtual_time(programs, as_counted(found, seen[name]), found.axes)
        out.append(difference(on_gloo(seen[name]), virtual))
    return out


def starts(program: Program, *ops: Op) -> list[int]:
    """Those that go to other ranks, in these layouts: not along an axis of one."""
    return [i for i, s in enumerate(program) if s.kind is Kind.START and s.axis == "dp" and s.op in (ops or tuple(Op))]


def swapped(program: Program, random: Random) -> Program:
    """Two gradients that follow each other on one axis, the other way round."""
    i, j = random.choice(list(pairwise(starts(program, Op.GRADS))))
    out = list(program)
    out[i], out[j] = out[j], out[i]
    return tuple(out)


def dropped(program: Program, random: Random) -> Program:
    gone = program[random.choice(starts(program))]
    return tuple(s for s in program if s is not gone and not (s.kind is Kind.WAIT and s.reads[0] == gone.writes[0]))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("change", [swapped, dropped])
def test_a_list_with_a_collective_swapped_or_dropped_is_noticed(
    change: Callable[[Program, Random], Program], name: str, configs: dict[str, PretrainConfig], seen: dict[str, list[Seen]]
) -> None:
    for said in planted(change, range(WORLD), name, configs, seen):
        assert said.startswith("('dp', ") and "on gloo         Sent(tag=" in said


def test_two_collectives_swapped_on_one_rank_are_noticed_there(
    configs: dict[str, PretrainConfig], seen: dict[str, list[Seen]]
) -> None:
    for said in planted(swapped, [3], "lina, plain", configs, seen):
        assert said.startswith("('dp', (0, 1, 2, 3)), rank 3, collective ")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", PLANTED)
def test_one_size_doubled_is_noticed(name: str, configs: dict[str, PretrainConfig], seen: dict[str, list[Seen]]) -> None:
    found, random = forecasted(configs[name]), Random(0)
    sizes = as_counted(found, seen[name])
    sent = {
        instruction.op: instruction
        for instruction in random.sample(found.program, len(found.program))
        if instruction.kind is Kind.START
    }
    assert len(sent) >= 4
    for instruction in sent.values():
        if found.axes[instruction.axis] > 1:
            said = difference(
                on_gloo(seen[name]), in_virtual_time([found.program] * WORLD, doubled(sizes, instruction), found.axes)
            )
            assert instruction.tag in said.splitlines()[1] and instruction.tag in said.splitlines()[2]


def doubled(sizes: Sizes, which: Instruction) -> Sizes:
    assert (matrix_of := sizes.matrix_of) is not None

    def twice(instruction: Instruction, ranks: tuple[int, ...]) -> Any:
        found = matrix_of(instruction, ranks)
        return found if found is None else found * (1 + (instruction.tag == which.tag))

    return Sizes(lambda instruction: sizes.bytes_of(instruction) * (1 + (instruction.tag == which.tag)), sizes.scattered, twice)


def test_even_routing_is_not_what_was_sent(configs: dict[str, PretrainConfig], seen: dict[str, list[Seen]]) -> None:
    found = forecasted(configs["eager, plain"])
    virtual = in_virtual_time([found.program] * WORLD, found.sizes, found.axes)
    assert "'F:dispatch>.0.0'" in difference(on_gloo(seen["eager, plain"]), virtual)


def test_rows_that_go_back_go_the_other_way(configs: dict[str, PretrainConfig], seen: dict[str, list[Seen]]) -> None:
    """With the matrix of the way out for the way back totals agree, and who sends does not."""
    found = forecasted(configs["eager, plain"])
    sizes = as_counted(found, seen["eager, plain"])
    assert (matrix_of := sizes.matrix_of) is not None

    def one_way(instruction: Instruction, ranks: tuple[int, ...]) -> Any:
        return matrix_of(replace(instruction, name="dispatch", phase="F"), ranks)

    virtual = in_virtual_time([found.program] * WORLD, replace(sizes, matrix_of=one_way), found.axes)
    assert "'F:combine>.0.0'" in difference(on_gloo(seen["eager, plain"]), virtual)


# counts


def test_rows_go_to_whoever_has_their_experts_chunk_by_chunk() -> None:
    count_NE = np.array([[3, 0, 1, 4], [0, 0, 5, 1]])
    assert rows_between(count_NE).tolist() == [[3, 5], [0, 6]]
    chunks = [rows_between(count_NE, (c, 2)) for c in range(2)]
    assert [chunk.tolist() for chunk in chunks] == [[[1, 2], [0, 2]], [[2, 3], [0, 4]]]  # halves of 3, 1, 4; of 5, 1
    dispatch = Instruction("F", Kind.START, "dispatch", 0, "2c1", op=Op.TOKENS, axis="ep", chunk=(1, 2))
    sizes = counted(Sizes(lambda instruction: 0.0), {(0, "2"): np.vstack([count_NE * 0, count_NE])}, row_bytes=(10, 10))
    assert (matrix_of := sizes.matrix_of) is not None
    for phase, name, out in (("F", "dispatch", True), ("F", "combine", False), ("B", "dispatch", False), ("B", "combine", True)):
        found = matrix_of(replace(dispatch, phase=phase, name=name), (2, 3))
        assert found is not None and found.tolist() == (10 * (chunks[1] if out else chunks[1].T)).tolist()
    assert matrix_of(replace(dispatch, op=Op.COUNTS), (2, 3)) is None
    with pytest.raises(ValueError, match=r"F:dispatch>.1.2c1: no rows were counted in layer 1, part 2"):
        matrix_of(replace(dispatch, layer=1), (2, 3))
    with pytest.raises(ValueError, match="4 experts can't be shared evenly by 3 ranks"):
        rows_between(np.ones((3, 4), int))


# many more


def drawn_cases(folder: Path, examples: int) -> dict[str, PretrainConfig]:
    """Combinations that the trainer accepts."""
    known = {name: strategy_of(name) for name in NAMES}
    found: dict[str, PretrainConfig] = {}

    @settings(max_examples=20 * examples, deadline=None, derandomize=True, database=None)
    @given(
        name=st.sampled_from(NAMES),
        numbers=st.fixed_dictionaries(
            {"chunks": st.sampled_from(["1", "2", "3", "2,1"]), "late_layers": st.sampled_from([0, 0, 1, 2])},
            optional={
                "packing": st.sampled_from(["1", "2", "4"]),
                "partition_bytes": st.sampled_from(["0", "1024", "5000"]),
                "parts": st.sampled_from([1, 2, 4]),
                "yields": st.booleans(),
            },
        ),
        values=st.fixed_dictionaries(
            {
                "tp": st.sampled_from([1, 2, 4]),
                "ep": st.sampled_from([1, 2, 4]),
                "zero": st.sampled_from([0, 1]),
                "accumulate": st.sampled_from([1, 2, 4]),
                "recompute": st.sampled_from(["none", "selective", "full"]),
                "capacity_factor": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
                "num_layers": st.sampled_from([1, 2, 3]),
                "dtype": st.sampled_from(["float32", "bfloat16", "float64"]),
            },
            optional={
                "micro_batch_size": st.sampled_from([1, 3, 4]),
                "top_k": st.sampled_from([1, 3]),
                "kind": st.sampled_from(["topk", "sigmoid", "expert_choice", "hash"]),
                "group": st.sampled_from(["sequence", "micro_batch", "global"]),
                "drop": st.sampled_from(["position", "probability"]),
                "sequence": st.booleans(),
                "num_experts": st.sampled_from([8, 12]),
                "dense_layers_first": st.just(1),
                "moe_every": st.just(2),
                "shared_d_ff": st.just(16),
                "tie_embeddings": st.booleans(),
                "bias": st.booleans(),
                "qk_norm": st.sampled_from(["none", "head", "projection"]),
                "num_kv_heads": st.just(2),
                "positions": st.just("learned"),
                "norm": st.just("layernorm"),
                "activation": st.sampled_from(["gelu", "relu"]),
            },
        ),
    )
    def draw(name: str, numbers: dict[str, Any], values: dict[str, Any]) -> None:
        if len(found) < examples and WORLD % (values["tp"] * values["ep"]) == 0:
            if name == "auto":
                numbers = {key: value for key, value in numbers.items() if key == "packing"}
            if name == "lina_zero":
                values = {**values, "zero": 1}
            (config,) = configs_of(folder, {"": (replace(known[name], **numbers), values)}).values()
            if accepted(config, WORLD) and any(shape_of(config.model, config.router, tp=1, sequence=False).moe):
                found[f"{name} {numbers} {values}"] = config

    draw()
    return found


@pytest.mark.full
def test_any_combination_sends_the_same(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    configs = drawn_cases(tmp_path, 150)
    assert len(configs) == 150 and {config.strategy.name for config in configs.values()} == set(NAMES)
    for name, seen in real_steps(configs).items():
        found = forecasted(configs[name])
        assert all(own.program == found.program for own in seen), name
        assert difference(on_gloo(seen), simulated(found, seen)) == "", name
