"""What is timed: that each call computes what its name says, and that the stopwatch counts the thread's own time."""

import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalina.measure.kernels import experts, kernel_calls, norm, product, tiny_step
from megalina.measure.shapes import CPU, CUDA, ProductShape, expert_key, pass_key
from megalina.measure.stopwatch import BATCH_S, Stopwatch

DEVICE = torch.device("cpu")
SMALL = replace(
    CPU,
    sides=(1, 4),
    large_side=8,
    cold_bytes=1000,
    micro_batch=2,
    seq_len=8,
    d_model=24,
    d_ff=16,
    expert_rows=(1, 3),
    copied_bytes=64,
)
NO_KERNELS = ("view", "_unsafe_view", "unsqueeze", "detach", "split", "chunk", "new_empty", "empty", "empty_like", "slice")


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.places: list[int] = []  # in memory, of what the last argument of each is

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        self.places.append(next((a.data_ptr() for a in reversed(args) if isinstance(a, torch.Tensor)), 0))
        return func(*args, **(kwargs or {}))


def test_every_time_that_figures_need_has_a_call_that_runs() -> None:
    makers = kernel_calls(SMALL, ("float32", "bfloat16"), DEVICE)
    shapes = [s.key for dtype in ("float32", "bfloat16") for of_side in SMALL.products(dtype) for s in of_side]
    passes = [pass_key(name) for name in SMALL.passes("float32")]
    assert set(makers) == {"copy", "tiny", "attention", *shapes, *passes, expert_key("float32", 1), expert_key("float32", 3)}
    for make in makers.values():
        call = make()
        call()
        call()


@pytest.mark.parametrize(
    ("rows", "columns", "inner", "op"), [(4, 8, 16, "mm"), (8, 4, 16, "mm"), (8, 16, 4, "addmm_"), (8, 8, 8, "mm")]
)
def test_a_product_is_what_its_flops_are_counted_for(rows: int, columns: int, inner: int, op: str) -> None:
    shape = ProductShape("bfloat16", rows, columns, inner)
    call = product(shape, 1000, DEVICE)
    with FlopCounterMode(display=False) as counter:
        call()
    if op == "mm":  # it knows no product in place
        assert counter.get_total_flops() == shape.flops
    assert shape.flops == 2 * rows * columns * inner
    with Ops() as ops:
        call()
    assert [name for name in ops.names if name not in (*NO_KERNELS, "t")] == [op]


def test_a_product_takes_other_operands_each_time_until_they_are_more_than_caches_hold() -> None:
    shape = ProductShape("float32", 4, 8, 16)
    a_call_bytes = 4 * (4 * 16 + 8 * 16 + 4 * 8)
    call, places = product(shape, 10 * a_call_bytes, DEVICE), []
    for _ in range(22):
        with Ops() as ops:
            call()
        places.append(ops.places[-1])
    assert len(set(places[:11])) == 11 and places[:11] == places[11:]


def test_each_side_is_measured_in_all_three_places() -> None:
    found = {tuple((s.rows, s.columns, s.inner) for s in of_side) for of_side in SMALL.products("float32")}
    assert found == {((side, 8, 8), (8, side, 8), (8, 8, side)) for side in (1, 4)}


def test_passes_count_as_many_operations_as_they_make() -> None:
    """About: views and allocations are not kernels, and the cost model counts those of a GPU."""
    for name in SMALL.passes("float32"):
        call = kernel_calls(SMALL, ("float32",), DEVICE)[pass_key(name)]()
        with Ops() as ops:
            call()
        made = [op for op in ops.names if op not in NO_KERNELS]
        assert len(made) == pytest.approx(SMALL.passes("float32")[name].kernels, abs=3), (name, made)


def test_experts_add_to_the_gradients_where_training_does_and_count_for_forward_and_backward() -> None:
    run = experts(SMALL, "float32", 3, DEVICE)
    with Ops() as ops:
        run()
    assert sum(op in ("mm", "addmm", "addmm_") for op in ops.names) == 6 * SMALL.num_experts
    work = SMALL.experts("float32", 3)
    assert len(work.products) == 6 * SMALL.num_experts
    assert work.flops == 3 * 2 * (3 * SMALL.num_experts) * 3 * SMALL.d_model * SMALL.d_ff


def test_the_norm_is_timed_forward_and_backward() -> None:
    gradients = norm(SMALL, "float32", DEVICE)()
    assert isinstance(gradients, tuple)
    assert [tuple(g.shape) for g in gradients] == [(16, 24), (24,)]


@pytest.mark.parametrize("sizes", [CPU, CUDA])
def test_sizes_fit_the_cost_model(sizes: object) -> None:
    assert sizes.attention_flops("float32") > 0 and set(sizes.passes("bfloat16")) == {"norm", "activation", "residual"}  # type: ignore[attr-defined]
    assert all(work.moved_bytes > 0 and not work.products for work in sizes.passes("float32").values())  # type: ignore[attr-defined]


def test_the_step_of_next_to_nothing_is_a_whole_step_and_its_instructions_are_counted() -> None:
    step = tiny_step(DEVICE)
    step.run()
    step.run()
    assert step.instructions > 40 and step.kernels > step.instructions


def test_the_stopwatch_leaves_out_when_others_had_the_core() -> None:
    watch = Stopwatch(DEVICE, seconds=0.05)
    busy_s = watch.median_s(lambda: time.sleep(0.002))
    assert busy_s < 0.001  # it slept, and computed nothing
    assert watch.core_share < 0.5
    assert Stopwatch(DEVICE, seconds=0.05).core_share == 1


def test_ranks_that_are_more_than_cores_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]  # the clock goes by what is computed: neighbours on this machine can't slow one of the two down

    def call() -> None:
        now[0] += 0.001

    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    alone_s, shared_s = (Stopwatch(DEVICE, seconds=0.05, threads_a_core=n).median_s(call) for n in (0.5, 3.0))
    assert (alone_s, shared_s) == pytest.approx((0.001, 0.003))


def test_short_calls_are_timed_many_at_once() -> None:
    made = 0

    def call() -> None:
        nonlocal made
        made += 1
        end_s = time.thread_time() + BATCH_S / 10
        while time.thread_time() < end_s:
            pass

    assert Stopwatch(DEVICE, seconds=0.01).median_s(call) == pytest.approx(BATCH_S / 10, rel=0.3)
    assert made > 30
