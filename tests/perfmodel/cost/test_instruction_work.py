"""What instructions ask of a device: against the FLOPs that MFU counts, and against sums by hand."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from megalina.blocks.counts import model_flops
from megalina.blocks.model import plain_shape, shape_of
from megalina.blocks.work import Product, Work, small
from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_work import InstructionWork, forward_flops
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Instruction, Kind, Program
from megalina.step.strategy import STRATEGIES, Setting, evaluation, training_step
from tests.perfmodel.sim.schedules import SHAPES, buckets_of, setting_of

C = Kind.COMPUTE
WORDS = 1024  # nothing to pad, for 1, 2, 4 tensor-parallel ranks


def config_of(**model: object) -> PretrainConfig:
    """2 sequences of 16 tokens; 4 experts, 2 a token."""
    config = PretrainConfig()
    config.train.micro_batch_size, config.train.seq_len = 2, 16
    for name, value in {"d_model": 32, "d_ff": 48, "activation": "relu", **model}.items():
        setattr(config.model, name, value)
    return config


def work_of(config: PretrainConfig, *, world: int = 1, **more: object) -> InstructionWork:
    return InstructionWork(config, world=world, vocab_rows=WORDS, **{"buckets": {}, **more})  # type: ignore[arg-type]


def instruction(name: str, phase: str = "F", **more: object) -> Instruction:
    return Instruction(phase, C, name, 0, **more)  # type: ignore[arg-type]


# every instruction of every strategy


def programs(name: str) -> Iterator[tuple[str, Program, dict[str, BucketSpec]]]:
    random = Random(name)
    for title, shape in SHAPES.items():
        setting = setting_of(name, shape, random)
        yield title, training_step(name, setting), dict(setting.buckets)
        late = replace(setting, plan=replace(setting.plan, late_layers=1, chunks=(1,)))
        yield title, training_step(name, late), dict(setting.buckets)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_instruction_of_any_strategy_is_unknown(name: str) -> None:
    for title, program, buckets in programs(name):
        shared_d_ff = 64 if SHAPES[title].shared_experts else 0
        config = config_of(positions="learned", shared_d_ff=shared_d_ff)  # RoPE has nothing to do in the instruction of positions
        config.parallel.tp = 2 if SHAPES[title].tp else 1
        work = work_of(config, world=4, buckets=buckets)
        for s in program:
            assert (work(s).kernels > 0) == (s.kind is C), s.tag


def test_parts_of_a_group_and_evaluation_are_known_too() -> None:
    shape = replace(SHAPES["experts in every layer"], micro_batch_groups=True)
    buckets = buckets_of(shape)
    program = training_step("flow", Setting(shape, buckets, Plan(parts=2, yields=True)))
    assert {"sizes_of_group", "balance_of_group"} <= {s.name for s in program}
    work = work_of(config_of(), buckets=buckets)
    assert all(work(s).kernels > 0 for s in (*program, *evaluation(shape, buckets)) if s.kind is C)


@pytest.mark.parametrize("tp", [1, 2])
def test_multi_token_prediction_is_known_too(tp: int) -> None:
    """And costs what it costs more: a layer, a matrix of twice the width, and the output matrix once more."""
    shape = plain_shape(moe=(True,), mtp_layers=1, tp=tp > 1, tied=False)
    buckets = buckets_of(shape)
    program = training_step("eager", Setting(shape, buckets, micro_batches=2))
    config = config_of(num_layers=1, mtp_layers=1, tie_embeddings=False, positions="learned")
    config.parallel.tp = tp
    work = work_of(config, world=4, buckets=buckets)
    computed = [s for s in program if s.kind is C and s.phase == "F"]
    assert all(work(s).kernels > 0 for s in program if s.kind is C)
    flops = {name: sum(work(s).flops for s in computed if s.name == name) for name in {s.name for s in computed}}
    if tp == 1:
        tokens = 2 * config.train.micro_batch_size * config.train.seq_len
        assert flops["mtp"] == 2 * tokens * 2 * config.model.d_model**2
        assert flops["mtp_loss"] == flops["loss"]
    else:
        assert flops["mtp_logits"] == flops["logits"]


@pytest.mark.parametrize("phase", ["F", "U"])
def test_an_instruction_that_no_strategy_makes_is_an_error(phase: str) -> None:
    with pytest.raises(ValueError, match=f"^{phase}:sing.0.0: what this instruction costs isn't known"):
        work_of(config_of())(instruction("sing", phase))


# against MFU


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"activation": "swiglu", "shared_d_ff": 64, "num_kv_heads": 4, "num_heads": 8, "head_dim": 16, "tie_embeddings": False},
        {"num_layers": 3, "moe_every": 2, "positions": "learned", "norm": "layernorm"},
    ],
)
def test_all_ranks_together_do_what_mfu_counts(model: dict[str, object], tp: int, ep: int, late: int) -> None:
    """Shared experts are whole on each rank of tp, which has 1 / tp of the tokens."""
    config = config_of(**model)
    config.parallel.tp, config.parallel.ep = tp, ep
    world, micro_batches = 4, 3
    shape = shape_of(config.model, config.router, tp=tp, sequence=True)
    buckets = buckets_of(shape)
    chunks = tuple(2 if i == 1 else 1 for i, is_moe in enumerate(shape.moe) if is_moe)
    setting = Setting(shape, buckets, Plan(chunks=chunks, late_layers=late), micro_batches=micro_batches)
    work = work_of(config, world=world, buckets=buckets)
    flops = world * sum(work(s).flops for s in training_step("lina", setting))
    counted = model_flops(config.model, config.router, vocab_size=WORDS, seq_len=16).per_token
    assert flops == pytest.approx(counted * 2 * 16 * micro_batches * world / tp, rel=1e-12)


def test_recomputing_costs_the_forward_once_more() -> None:
    work = work_of(config_of())
    for name in ("attention", "experts", "route", "loss"):
        once, again = work(instruction(name, "B")), work(instruction(name, "B", recompute=True))
        assert again.flops == once.flops + work(instruction(name)).flops == 3 * work(instruction(name)).flops
        assert again.kernels == once.kernels + work(instruction(name)).kernels


def test_late_weights_move_half_of_the_products_into_an_instruction_of_their_own() -> None:
    work = work_of(config_of())
    whole = work(instruction("experts", "B"))
    soon, late = work(instruction("experts", "B", late=True)), work(instruction("experts", "W", late=True))
    assert soon.flops == late.flops == whole.flops / 2
    assert soon.num_bytes + late.num_bytes == whole.num_bytes


def test_the_flops_of_emulated_devices_are_those_of_the_instructions() -> None:
    config = config_of(vocab_size=WORDS, moe_every=2, shared_d_ff=32)
    work = work_of(config)
    flops = forward_flops(config)
    assert flops == {name: work(instruction(name)).flops for name in ("attention", "mlp", "experts", "shared", "loss")}
    config.parallel.tp = 2
    halves = forward_flops(config)
    assert halves["logits"] == flops["loss"] / 2 and halves["loss"] == 0  # once, where the logits are
    assert flops["experts"] == 2 * 32 * 2 * (2 * 32 * 48)


# by hand


def test_the_products_of_experts_have_the_rows_of_one_expert() -> None:
    """32 tokens x 2 choices on 2 of 4 experts here: 32 rows each."""
    config = config_of()
    config.parallel.ep, config.train.dtype = 2, "bfloat16"
    first, second = work_of(config)(instruction("experts")).products
    assert (first.rows, first.columns, first.inner, first.count) == (32, 48, 32, 2)
    assert (second.rows, second.columns, second.inner, second.count) == (32, 32, 48, 2)
    assert first.num_bytes == 2 * 2 * (32 * 32 + 48 * 32 + 32 * 48)
    gradient = work_of(config)(instruction("experts", "B")).products[1:4]
    assert {(p.rows, p.columns, p.inner) for p in gradient} >= {(48, 32, 32), (32, 48, 32)}


def test_in_float32_each_expert_has_kernels_of_its_own() -> None:
    config = config_of()
    loop = work_of(config)(instruction("experts"))
    config.train.dtype = "bfloat16"
    grouped = work_of(config)(instruction("experts"))
    assert (len(loop.products), len(grouped.products)) == (2 * 4, 2)
    assert loop.flops == grouped.flops and loop.num_bytes == 2 * grouped.num_bytes
    config.cluster.hardware.host_is_device = True  # the grouped kernel is one of GPUs
    assert len(work_of(config)(instruction("experts")).products) == 2 * 4


def test_packing_gives_each_expert_here_fewer_rows_and_a_loaded_rank_more() -> None:
    config = config_of()
    config.parallel.ep, config.train.dtype = 4, "bfloat16"
    rows = [work_of(config, packing=k)(instruction("experts")).products[0] for k in (1, 2, 4)]
    assert [(p.rows, p.count) for p in rows] == [(64, 1), (32, 2), (16, 4)]
    assert work_of(config)(instruction("experts"), load=1.5).products[0].rows == 96


def test_shares_and_chunks_scale_what_depends_on_tokens_and_not_the_weights() -> None:
    config = config_of()
    config.train.dtype = "bfloat16"
    work = work_of(config)
    whole, half = work(instruction("experts")), work(instruction("experts", share=0.5))
    assert half == work(instruction("experts", chunk=(1, 2)))
    assert half.flops == whole.flops / 2 and half.kernels == whole.kernels
    weight_bytes = 4 * 2 * 32 * 48 * 2
    assert sum(p.num_bytes for p in half.products) - weight_bytes == (sum(p.num_bytes for p in whole.products) - weight_bytes) / 2
    assert work(instruction("attention", share=0.5)).flops == work(instruction("attention")).flops / 2
    assert work(instruction("route", chunk=(0, 2))) == work(instruction("route"))


def test_attention_sees_half_of_its_sequence() -> None:
    config = config_of(num_heads=4, num_kv_heads=2)
    *linears, core = work_of(config)(instruction("attention_heads")).products
    assert core.attention and core.flops == 2 * 2 * 16 * 16 * 32 == 2 * 2 * (16 * 16 * 32 * 2) / 2
    assert core.num_bytes == 4 * 32 * (32 + 16 + 16 + 32)
    assert [(p.columns, p.inner) for p in linears] == [(32, 32), (16, 32), (16, 32), (32, 32)]


def test_routers_compute_in_float32() -> None:
    config = config_of()
    config.train.dtype = "bfloat16"
    assert [p.wide for p in work_of(config)(instruction("route")).products] == [True]
    config.router.kind = "hash"
    assert work_of(config)(instruction("route")).products == ()
    config.router.kind, config.train.dtype = "topk", "float32"
    assert [p.wide for p in work_of(config)(instruction("route")).products] == [False]


@pytest.mark.parametrize(
    ("optimizer", "dtype", "bytes_an_element"),
    [("adamw", "float32", 28 + 4), ("adamw", "bfloat16", 28 + 4 + 6), ("adamw", "float64", 56 + 8), ("sgd", "float32", 12 + 4)],
)
def test_an_update_moves_gradients_weights_and_moments(optimizer: str, dtype: str, bytes_an_element: int) -> None:
    config = config_of()
    config.optim.name, config.train.dtype = optimizer, dtype
    work = work_of(config, world=4, buckets={"dense.0": BucketSpec(640, "dp")})
    assert work(instruction("update dense.0", "U")).moved_bytes == 640 * bytes_an_element


def test_a_sharded_bucket_is_updated_and_measured_in_parts() -> None:
    config = config_of()
    config.parallel.ep = 2
    spec = {"dense.0": BucketSpec(640, "dp", True), "experts.0": BucketSpec(640, "copies", True)}
    work = work_of(config, world=4, buckets=spec)
    assert work(instruction("update dense.0", "U")).moved_bytes == 160 * 28 + 640 * 4
    assert work(instruction("update experts.0", "U")).moved_bytes == 320 * 28 + 640 * 4
    measure = instruction("measure", "U", reads=("loss.-.0", "dense.0'sum", "experts.0'sum"))
    assert work(measure).moved_bytes == (160 + 320) * 4


def test_with_sequence_parallelism_norms_are_cut_and_heads_are_not() -> None:
    config = config_of()
    config.parallel.tp = 2
    cut = work_of(config)(instruction("attention_norm")).num_bytes
    config.parallel.sequence = False
    assert work_of(config)(instruction("attention_norm")).num_bytes == 2 * cut
    assert {p.rows for p in work_of(config)(instruction("attention_heads")).products[:4]} == {32}


def test_work_adds_up() -> None:
    product = Product(2, 3, 4, 5, 100.0)
    both = Work((product,), 10.0, 2) + Work((product,), 1.0, 1)
    assert (both.flops, both.num_bytes, both.kernels) == (2 * 240, 211.0, 5)


def test_selection_biases_cost_a_few_kernels_a_moe_layer() -> None:
    config = config_of()
    config.model.num_layers, config.model.moe_every = 4, 2
    assert work_of(config)(instruction("router_state", "U")) == small(2 * 7)
