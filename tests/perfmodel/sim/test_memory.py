"""The memory of a rank: walks counted by hand, arithmetic against the model itself, predictions against measured peaks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
import torch

from benchmarks.memory import CASES, error_of, predicted_and_measured
from megalina.blocks.model import shape_of
from megalina.comm import exchange
from megalina.config import ModelConfig, OptimConfig, ParallelConfig, PretrainConfig, RouterConfig, TrainConfig
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.perfmodel.cost.instruction_bytes import DIRECT_BYTES, InstructionBytes
from megalina.perfmodel.sim.memory import Memory, by_instruction, memory_of
from megalina.plan_settings import plan_of
from megalina.step.program import Instruction, Kind, Op, Program, backward
from megalina.step.strategy import STRATEGIES, Setting, evaluation, training_step
from tests.parallel.ranks import run_on_ranks
from tests.perfmodel.sim.schedules import SHAPES, setting_of

TOLERANCE = 0.05  # of a measured peak
QUICK = ("one rank, all recomputed", "ep 2, flow, late weights")
C, F = Kind.COMPUTE, "F"


@dataclass
class Given:
    """Sizes by name, for walks that are counted by hand."""

    values: dict[str, int]
    inside: dict[str, int] = field(default_factory=dict)  # tag -> rise
    kept_by: dict[str, int] = field(default_factory=dict)
    alone: bool = False
    state: dict[str, int] = field(default_factory=dict)

    def ranks(self, axis: str) -> int:
        return 1 if self.alone else 2

    def value(self, name: str, instruction: Instruction) -> int:
        return self.values[name.rstrip("'")]

    def bucket(self, instruction: Instruction) -> int:
        return 0

    def kept(self, instruction: Instruction) -> int:
        return self.kept_by.get(instruction.name, 0)

    def keeps(self, instruction: Instruction) -> tuple[str, ...]:
        return ()

    def rise(self, instruction: Instruction) -> int:
        return self.inside.get(instruction.tag, 0)

    def received(self, instruction: Instruction, sent: int, arrives: int) -> int:
        return arrives


def compute(name: str, reads: str, writes: str, **more: Any) -> Instruction:
    return Instruction(F, C, name, reads=tuple(reads.split()), writes=tuple(writes.split()), **more)


def bytes_of(sizes: Any, program: Program) -> list[int]:
    return [size for _, size in by_instruction(sizes, program)]


# the walk
def test_values_die_at_their_last_reader() -> None:
    program = (compute("a", "", "a"), compute("b", "a", "b"), compute("c", "a", "c"), compute("d", "b c", "#d"))
    given = Given({"a": 100, "b": 10, "c": 1, "#d": 0})
    assert bytes_of(given, program) == [100, 110, 111, 11]
    assert memory_of(given, program) == Memory({}, {}, 111, 0, 0, "F:c.-.0")


def test_what_is_inside_an_instruction_and_what_is_there_throughout_count() -> None:
    program = (compute("a", "", "a"), compute("b", "a", "b"))
    given = Given({"a": 100, "b": 10}, inside={"F:b.-.0": 50}, state={"weights": 1000})
    memory = memory_of(given, program)
    assert memory.rows() == {"weights": 1000, "values": 110, "on the wire": 0, "inside F:b.-.0": 40}
    assert memory.peak == sum(memory.rows().values()) == 1150


@pytest.mark.parametrize("recompute", [False, True])
def test_forward_keeps_what_it_reads_and_more_without_recompute(recompute: bool) -> None:
    """a (100) -> b (30) -> c (300); a is read by the first instruction alone, and stays for its mirror all the same."""
    forward = (compute("f", "a", "b", recompute=recompute), compute("g", "b", "c", recompute=recompute))
    given = Given({"#a": 0, "a": 100, "b": 30, "c": 300}, kept_by={"f": 7, "g": 5})
    program = (
        compute("make", "#a", "a"),
        *forward,
        Instruction("U", C, "seed", reads=("c",), writes=("c'",)),
        *backward(forward),
    )
    f, g = (0, 0) if recompute else (7, 5)
    assert bytes_of(given, program) == [
        100,
        100 + 30 + f,
        100 + 30 + 300 + f + g,
        100 + 30 + 300 + 300 + f + g,  # seed: c and its gradient
        100 + 30 + 300 + 30 + f + g,  # g's mirror: both gradients, and all that is kept
        100 + 30 + 100 + f,  # f's: b and what g kept are gone
    ]


def test_gradients_that_add_up_are_there_three_times() -> None:
    forward = (compute("make", "#a", "a"), compute("f", "a", "b"), compute("g", "a", "c"))
    seed = Instruction("U", C, "seed", reads=("b", "c"), writes=("b'", "c'"))
    given = Given({"#a": 0, "a": 100, "b": 0, "c": 0})
    sizes = bytes_of(given, (*forward, seed, *backward(forward)))
    # g's mirror: a, a'; f's: a, and of a' what was there, what comes and their sum; a is given by nobody with a gradient
    assert sizes[4:6] == [200, 400]


def test_the_wire_holds_what_is_sent_until_it_is_awaited_and_nothing_twice() -> None:
    start = Instruction(F, Kind.START, "send", reads=("a",), writes=("a>",), op=Op.TOKENS, axis="ep")
    program = (compute("make", "", "a"), start, replace(start, kind=Kind.WAIT, reads=("a>",), writes=("b",)))
    program = (*program, compute("use", "b", "#c"))
    values = {"a": 100, "b": 60, "#c": 0}
    assert bytes_of(Given(values), program) == [100, 160, 160, 60]
    values["b"] = 100  # nobody to talk to: what arrives is what was sent
    assert bytes_of(Given(values, alone=True), program) == [100, 100, 100, 100]
    summed = tuple(replace(s, op=Op.SUM) if s.op else s for s in program)
    assert bytes_of(Given(values), summed) == [100, 200, 100, 100]


# the sizes
LAYOUTS: Sequence[tuple[int, dict[str, Any], dict[str, Any]]] = (
    (1, {}, {}),
    (1, {"moe_every": 2, "shared_d_ff": 48, "bias": True, "norm": "layernorm", "positions": "learned"}, {}),
    (1, {"qk_norm": "head", "tie_embeddings": False, "activation": "relu", "dense_layers_first": 1}, {"dtype": "bfloat16"}),
)


def small(model: dict[str, Any], train: dict[str, Any] | None = None, **parallel: Any) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(
            **{"num_layers": 3, "d_model": 40, "num_heads": 4, "num_kv_heads": 2, "num_experts": 4, "d_ff": 24, **model}
        ),
        train=TrainConfig(**{"global_batch_size": 8, "micro_batch_size": 2, "seq_len": 16, **(train or {})}),
        parallel=ParallelConfig(**parallel),
    )


@pytest.mark.parametrize(("world", "model", "train"), LAYOUTS)
def test_buckets_are_those_of_the_model(world: int, model: dict[str, Any], train: dict[str, Any]) -> None:
    config = small(model, train)
    trainable = Trainable(config, build_mesh(), vocab_size=300, device=torch.device("cpu"), wish_to_stop=lambda: False)
    assert InstructionBytes(config, world, vocab_size=300).buckets == {name: b.spec for name, b in trainable.buckets.items()}


def program_of(config: PretrainConfig, sizes: InstructionBytes) -> Program:
    shape = shape_of(config.model, config.router, tp=config.parallel.tp, sequence=config.parallel.sequence)
    train = config.train
    setting = Setting(
        shape,
        sizes.buckets,
        micro_batches=train.global_batch_size // (train.micro_batch_size * sizes.axes["dp"]),
        recompute_mode=train.recompute,
    )
    return training_step(config.strategy.name, setting.under(plan_of(config.strategy)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_instruction_and_value_of_every_strategy_is_known(name: str, subtests: pytest.Subtests) -> None:
    """In every shape; and every strategy and every shape with each of three seeds."""
    for number, (kind, shape) in enumerate(SHAPES.items(), start=list(STRATEGIES).index(name)):
        with subtests.test(kind):
            model = {"num_layers": shape.num_layers, "shared_d_ff": 8 * shape.shared_experts}
            config = small(model, tp=2 if shape.tp else 1, ep=2)
            config.parallel.sequence = shape.sequence
            config.router.group = "global" if kind == "three layers, statistics of all ranks" else "sequence"
            sizes = InstructionBytes(config, 4, vocab_size=300)
            setting = setting_of(name, shape, Random(number % 3))
            sizes.buckets = dict(setting.buckets)
            memory = memory_of(sizes, training_step(name, setting))
            assert memory.peak == sum(memory.rows().values()) > sum(sizes.state.values())
            if number % 3 == 2:
                assert memory_of(sizes, evaluation(shape, setting.buckets)).peak < memory.peak


def peak(config: PretrainConfig, world: int = 2, **more: Any) -> int:
    sizes = InstructionBytes(config, world, vocab_size=300, **more)
    return memory_of(sizes, program_of(config, sizes)).peak


def test_memory_moves_as_it_should() -> None:
    plain = small({"d_model": 256}, {"seq_len": 256}, ep=2)
    assert peak(plain, skew=2) > peak(plain, skew=1.5) > peak(plain)
    assert peak(replace(plain, train=replace(plain.train, recompute="full"))) < peak(plain)
    assert peak(replace(plain, train=replace(plain.train, recompute="selective"))) < peak(plain)
    assert peak(replace(plain, train=replace(plain.train, dtype="bfloat16"))) < peak(plain)
    assert peak(replace(plain, optim=OptimConfig(name="sgd"))) < peak(plain)
    assert peak(replace(plain, router=RouterConfig(top_k=1))) < peak(plain)
    # a step of as many tokens in smaller micro-batches
    assert peak(replace(plain, train=replace(plain.train, micro_batch_size=1))) < peak(plain)
    assert peak(small({"d_model": 256}, {"seq_len": 256}, ep=4), 4) < peak(plain, 2)


def test_zero_shards_moments_and_gloo_takes_buffers_for_its_gradients() -> None:
    sizes = [InstructionBytes(small({}, None, ep=2, zero=zero), 8, vocab_size=300) for zero in (0, 1)]
    dense, experts = (sum(b.numel for b in sizes[1].buckets.values() if b.axis == axis) for axis in ("dp", "copies"))
    assert sizes[1].state["moments"] == 8 * (dense // 8 + experts // 4)
    whole = sum(b.numel for b in sizes[0].buckets.values())
    assert sizes[0].state["moments"] == 8 * whole
    instruction = Instruction("B", Kind.START, "dense.0", op=Op.GRADS, axis="dp", piece=(0, sizes[1].buckets["dense.0"].numel))
    assert (sizes[0].bucket(instruction), sizes[1].bucket(instruction)) == (0, 4 * sizes[1].buckets["dense.0"].numel)


@pytest.mark.parametrize("skew", [0.0, -1.0, float("nan"), float("inf")])
def test_a_skew_that_is_none_is_an_error(skew: float) -> None:
    with pytest.raises(ValueError, match="skew is"):
        InstructionBytes(small({}), 1, vocab_size=300, skew=skew)


def test_skews_of_layers_are_one_for_each() -> None:
    assert peak(small({}, ep=2), skew=[1.0, 1.0, 1.5]) > peak(small({}, ep=2), skew=[1.0, 1.0, 1.0]) == peak(small({}, ep=2))
    with pytest.raises(ValueError, match="skew has 2 numbers: give one, or one for each of 3 layers"):
        InstructionBytes(small({}), 1, vocab_size=300, skew=[1.0, 1.0])


def test_a_world_that_the_layout_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"tp \(2\) x ep \(2\) = 4 must divide the world size \(6\)"):
        InstructionBytes(small({}, tp=2, ep=2), 6, vocab_size=300)


def test_constants_are_those_of_the_code_that_they_describe() -> None:
    assert exchange.DIRECT_BYTES == DIRECT_BYTES


# predicted and measured
def check_cases(world: int, names: Sequence[str]) -> None:
    for rank, found in enumerate(run_on_ranks(world, predicted_and_measured, names, time_limit_s=600)):
        for name, case in zip(names, found, strict=True):
            assert case["same_buckets"], (name, rank)
            assert abs(error_of(case)) < TOLERANCE, (name, rank, case)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
def test_measured_peaks_are_those_predicted(world: int) -> None:
    check_cases(world, [name for name in QUICK if CASES[name][0] == world])


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_more_measured_peaks_are_those_predicted(world: int) -> None:
    check_cases(world, [name for name, case in CASES.items() if case[0] == world and name not in QUICK])
