"""The executor does what the list says: gradients are autograd's, values die at their last reader, the wire sees the STARTs."""

import gc
import os
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalina.blocks.sizes import LIMBS
from megalina.comm import exchange
from megalina.mesh import Axis, Mesh, build_mesh
from megalina.parallel.executor import Executor
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction, Kind, Op, Program, backward
from megalina.train.bucket_optimizer import BucketOptimizer
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import GROUPS, LENGTH, VOCABULARY, config_of, random_batch

F, U = "F", "U"
C = Kind.COMPUTE
LAYOUTS: dict[str, dict[str, Any]] = {
    "experts cut": {"ep": 2, "micro_batch_size": 2},
    "experts cut, ZeRO-1": {"ep": 2, "zero": 1, "micro_batch_size": 4, "gradient_piece_mb": 0.01},
    "copies, global balance": {"group": "global", "micro_batch_size": 4},
    "heads cut": {"tp": 2, "micro_batch_size": 4, "dense_layers_first": 1},
    "heads cut, activations copied": {"tp": 2, "sequence": False, "micro_batch_size": 8, "zero": 1},
}


# a program of a few instructions
def small_program(*, recompute: bool = False) -> Program:
    """x -> a -> (b, c) -> loss: the gradients of a and x have two writers each."""
    forward = (
        Instruction(F, C, "square", reads=("x",), writes=("a",), recompute=recompute),
        Instruction(F, C, "scale", reads=("a", "#k"), writes=("b",), recompute=recompute),
        Instruction(F, C, "times", reads=("a", "x"), writes=("c",), recompute=recompute),
        Instruction(F, C, "loss", reads=("b", "c"), writes=("loss",)),
    )
    seed = Instruction(U, C, "seed", reads=("loss",), writes=("loss'",))
    return (*forward, seed, *backward(forward))


SMALL: dict[str, Callable[..., Any]] = {
    "square": lambda x: x * x,
    "scale": lambda a, k: a.sin() * k,
    "times": lambda a, x: a * x.exp(),
    "loss": lambda b, c: (b * c).sum(),
    "seed": lambda loss: torch.full_like(loss, 0.5),
}


def executor_of(program: Program, functions: dict[str, Callable[..., Any]]) -> Executor:
    return Executor(program, lambda instruction: functions[instruction.name], build_mesh(), {})


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_with_several_writers_are_those_of_autograd(recompute: bool) -> None:
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = executor_of(small_program(recompute=recompute), SMALL).run({"x": x, "#k": 3.0})
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(0.5 * (((leaf * leaf).sin() * 3.0) * (leaf * leaf * leaf.exp())).sum(), leaf)
    assert found.keys() == {"x'"}  # nobody read it; all else is gone
    torch.testing.assert_close(found["x'"], want, rtol=1e-14, atol=0)
    assert not x.requires_grad and x.grad is None


def test_a_gradient_from_the_wire_adds_to_one_that_was_there() -> None:
    """`a` is sent and read here too; in backward the wait is the second writer of its gradient."""
    forward = (
        Instruction(F, C, "square", reads=("x",), writes=("a",)),
        Instruction(F, Kind.START, "send", reads=("a",), writes=("a>",), op=Op.SUM, axis="tp"),
        Instruction(F, C, "scale", reads=("a", "#k"), writes=("b",)),
        Instruction(F, Kind.WAIT, "send", reads=("a>",), writes=("c",), op=Op.SUM, axis="tp"),
        Instruction(F, C, "loss", reads=("b", "c"), writes=("loss",)),
    )
    program = (*forward, Instruction(U, C, "seed", reads=("loss",), writes=("loss'",)), *backward(forward))
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(0.5 * ((leaf * leaf).sin() * 3.0 * leaf * leaf).sum(), leaf)
    torch.testing.assert_close(executor_of(program, SMALL).run({"x": x, "#k": 3.0})["x'"], want, rtol=1e-14, atol=0)


class Thing:
    """A value that can be watched."""


def test_a_value_dies_at_its_last_reader() -> None:
    watched: list[Any] = []
    alive: dict[str, bool] = {}

    def make() -> Thing:
        watched.append(weakref.ref(thing := Thing()))
        return thing

    def note(instruction: str) -> Callable[..., int]:
        def function(*_: Any) -> int:
            alive[instruction] = watched[0]() is not None
            return 0

        return function

    program = (
        Instruction(U, C, "make", writes=("#thing",)),
        Instruction(U, C, "first", reads=("#thing",), writes=("#1",)),
        Instruction(U, C, "last", reads=("#thing", "#1"), writes=("#2",)),
        Instruction(U, C, "after", reads=("#2",), writes=("#3",)),
    )
    out = executor_of(program, {"make": make} | {n: note(n) for n in ("first", "last", "after")}).run({})
    assert alive == {"first": True, "last": True, "after": False}
    assert out == {"#3": 0}


def test_a_value_that_is_to_be_kept_outlives_its_readers() -> None:
    given = {"x": torch.linspace(-1, 1, 7), "#k": 3.0}
    found = executor_of(small_program(), SMALL).run(given, keep=("a", "#k"))
    assert found.keys() == {"x'", "a", "#k"} and found["#k"] == 3.0
    assert torch.equal(found["a"], given["x"] ** 2)


def test_an_error_in_an_instruction_is_raised_with_its_name_and_the_next_run_is_whole() -> None:
    fail = True

    def times(a: Tensor, x: Tensor) -> Tensor:
        if fail:
            raise ZeroDivisionError("planted")
        return a * x.exp()

    executor = executor_of(small_program(), SMALL | {"times": times})
    given = {"x": torch.ones(3), "#k": 1.0}
    with pytest.raises(ZeroDivisionError, match="planted") as caught:
        executor.run(given)
    assert caught.value.__notes__ == ["in instruction F:times.-.0"]
    fail = False
    assert torch.equal(executor.run(given)["x'"], executor_of(small_program(), SMALL).run(given)["x'"])


def test_a_forward_instruction_without_backward_is_noticed() -> None:
    program = small_program()
    with pytest.raises(AssertionError, match="without backward"):
        executor_of(program[:-1], SMALL).run({"x": torch.ones(3), "#k": 1.0})


# a whole model
def trainable_of(folder: Path, **settings: Any) -> tuple[Trainable, BucketOptimizer]:
    piece_mb = settings.pop("gradient_piece_mb", 0.0)
    config = config_of(folder, "run", **settings)
    config.strategy.partition_bytes = str(int(piece_mb * 2**20))
    mesh = build_mesh(tp=config.parallel.tp, ep=config.parallel.ep)
    trainable = Trainable(config, mesh, vocab_size=VOCABULARY, device=torch.device("cpu"), wish_to_stop=lambda: False)
    return trainable, BucketOptimizer(config.optim, trainable.buckets)


class Held:
    """A tensor that autograd saved for backward."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()


def gradients_and_peak(folder: Path, recompute: str) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step, and the most bytes that autograd held at once, parameters apart."""
    trainable, _ = trainable_of(folder, recompute=recompute, dtype="float64", micro_batch_size=8)
    parameters = {b.param.untyped_storage().data_ptr() for b in trainable.buckets.values()}
    held: weakref.WeakSet[Held] = weakref.WeakSet()
    peak = 0

    def pack(tensor: Tensor) -> Held:
        nonlocal peak
        saved = Held(tensor)
        if tensor.untyped_storage().data_ptr() not in parameters:
            held.add(saved)
            peak = max(peak, sum(h.bytes for h in held))
        return saved

    gradients: dict[str, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        trainable.step(random_batch(), lambda name, _: gradients.update({name: trainable.buckets[name].grad.clone()}))
    assert len(held) == 0
    return gradients, peak


def test_recompute_gives_the_same_gradients_and_holds_fewer_bytes(tmp_path: Path) -> None:
    none, selective, full = (gradients_and_peak(tmp_path, mode) for mode in ("none", "selective", "full"))
    for gradients, _ in (selective, full):
        assert gradients.keys() == none[0].keys()
        assert all(torch.equal(g, none[0][name]) and g.any() for name, g in gradients.items())
    assert full[1] < 0.6 * none[1] and selective[1] < 0.85 * none[1]


# two ranks
def calls_of(trainable: Trainable) -> dict[str, list[tuple[str, int]]]:
    """What a step asks of torch.distributed: per group (kind, elements sent), in order."""
    seen: dict[str, list[tuple[str, int]]] = defaultdict(list)
    axes = {name: getattr(trainable.mesh, name) for name in Mesh.__dataclass_fields__}
    names = {id(axis.group): name for name, axis in axes.items() if isinstance(axis, Axis) and axis.group is not None}

    def spied(kind: str, call: Callable[..., Any], which: int) -> Callable[..., Any]:
        def spy(*arguments: Any, **options: Any) -> Any:
            seen[names[id(options["group"])]].append((kind, arguments[which].numel()))
            return call(*arguments, **options)

        return spy

    before = dist.all_to_all_single, dist.all_reduce, exchange._all_gather
    dist.all_to_all_single = spied("all_to_all", before[0], 1)
    dist.all_reduce = spied("all_reduce", before[1], 0)
    exchange._all_gather = spied("all_gather", before[2], 1)
    try:
        rank, share = trainable.mesh.dp.rank, 8 // trainable.mesh.dp.size
        trainable.step(random_batch(share, first=rank * share), lambda *_: None)
    finally:
        dist.all_to_all_single, dist.all_reduce, exchange._all_gather = before
    return seen


def expected_calls(trainable: Trainable) -> dict[str, list[tuple[str, int | None]]]:
    """What the list says, for gloo, where a reduce-scatter is an all-to-all; None: as many as the tokens decide."""
    experts, width = GROUPS["model"]["num_experts"], GROUPS["model"]["d_model"]
    tokens = trainable.micro_batch_size * LENGTH
    scores = tokens // trainable.mesh.tp.size * experts
    elements = {"counts": experts, "divisor": 2 + LIMBS, "stat_gather": 2 * tokens, "scores": scores}
    out: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
    for s in trainable.program:
        axis = getattr(trainable.mesh, s.axis) if s.kind is Kind.START else None
        if axis is None or axis.size == 1:
            continue
        size, (start, stop) = axis.size, s.piece
        if s.op is Op.GRADS:
            out[s.axis].append(("all_to_all" if trainable.buckets[s.name].sharded else "all_reduce", stop - start))
        elif s.op is Op.PARAMS:
            out[s.axis].append(("all_gather", (stop - start) // size))
        elif s.op in (Op.TOKENS, Op.COUNTS):
            out[s.axis].append(("all_to_all", elements.get(s.name)))
        elif s.op is Op.SUM:
            whole = tokens * width if s.name in ("attention_sum", "mlp_sum", "embedding_sum") else None
            out[s.axis].append(("all_reduce", elements.get(s.name, whole)))
        else:
            part = tokens * width // (size if s.op is Op.GATHER else 1)
            sent = elements.get(s.name, part)
            direct = s.op is Op.GATHER and sent * 8 <= exchange.DIRECT_BYTES  # in float64
            if direct or (s.name in elements and s.op is Op.SCATTER):
                sent *= size
            out[s.axis].append(("all_gather" if s.op is Op.GATHER and not direct else "all_to_all", sent))
    return out


def differences(folder: Path) -> dict[str, Any]:
    """Per layout: what the wire saw that the list does not say."""
    found: dict[str, Any] = {}
    for layout, settings in LAYOUTS.items():
        trainable, _ = trainable_of(folder, **settings)
        want, got = expected_calls(trainable), calls_of(trainable)
        assert want.keys() == got.keys() and min(map(len, want.values())) > 0, (layout, want.keys(), got.keys())
        for axis, calls in got.items():
            pairs = zip(calls, want[axis], strict=True)
            wrong = [(i, g, w) for i, (g, w) in enumerate(pairs) if g[0] != w[0] or (w[1] is not None and g[1] != w[1])]
            if wrong:
                found[f"{layout}, {axis}"] = wrong[:3]
            if axis == "ep":  # rows of the model's width
                assert all(count % GROUPS["model"]["d_model"] == 0 for _, count in calls)
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(folder: Path, steps: int) -> dict[str, int]:
    """Over so many steps, after as many in which the allocator has settled: tensors that Python knows, resident bytes."""
    trainable, optimizer = trainable_of(folder, ep=2, zero=1, d_model=64, seq_len=128, micro_batch_size=2)
    batch = random_batch(4, first=4 * dist.get_rank(), length=128)

    def tensors() -> int:
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    for _ in range(steps):
        trainable.step(batch, optimizer.update)
    gc.collect()
    gc.disable()  # nothing may hang in reference cycles until the collector comes
    before, resident = tensors(), resident_bytes()
    for _ in range(steps):
        trainable.step(batch, optimizer.update)
    grown = {"tensors": tensors() - before, "bytes": resident_bytes() - resident}
    gc.enable()
    return grown


def on_two_ranks(folder: Path) -> dict[str, Any]:
    return {"differences": differences(folder), "growth": growth(folder, 20)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(2, on_two_ranks, tmp_path_factory.mktemp("two"))


def test_the_wire_sees_the_starts_of_the_list_in_their_order(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["differences"] for rank in two_ranks] == [{}, {}]


def test_no_tensor_stays_from_step_to_step(two_ranks: list[dict[str, Any]]) -> None:
    """One kept at each step would be 20.  The thread of the last exchange may still hold its tensors when they are counted."""
    for rank in two_ranks:
        assert rank["growth"]["tensors"] < 10


@pytest.mark.full
def test_memory_does_not_grow_over_a_hundred_steps(tmp_path: Path) -> None:
    """One activation of a micro-batch, 64 KiB, kept at each step would be 100 tensors and 6 MiB."""
    for grown in run_on_ranks(2, growth, tmp_path, 100):
        assert grown["tensors"] < 10
        assert grown["bytes"] < 3 * 2**20
