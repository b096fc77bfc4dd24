"""Context parallelism is priced: what its instructions ask and keep, held against what their functions do; and it saves memory.

One process plays a rank: what would come from others has its own tokens' shape."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megalina.batch import Batch
from megalina.blocks.model import step_shape
from megalina.blocks.sizes import Rank
from megalina.config import ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.model.tokens import TokenShare
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.perfmodel.sim.memory import peak_of
from megalina.plan_settings import plan_of
from megalina.step.forward import plain
from megalina.step.program import Kind, Op
from megalina.step.strategy import STRATEGIES, Setting, training_step
from megalina.validate import check_config
from tests.verify.cases import strategy

LATENT = {
    **{"attention": "mla", "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8},
    "v_head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2, "qk_norm": "head"},
    "one key head": {"num_kv_heads": 1, "attention_sinks": True, "window": 200},
    "experts": {"attention_experts": 2},
    "latent": LATENT,
    "latent, sinks, a window": {**LATENT, "attention_sinks": True, "window": 50},
}
KINDS = ("all_gather", "all_to_all")
WORLD, LENGTH, VOCABULARY = 2, 128, 300  # so short that attention is one kernel, whose FLOPs torch does not count


def config_of(model: dict[str, Any], kind: str, *, cp: int = WORLD, length: int = LENGTH, **train: Any) -> PretrainConfig:
    sizes = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "num_experts": 4, "d_ff": 32}
    config = PretrainConfig(
        model=ModelConfig(**(sizes | model)),  # type: ignore[arg-type]
        parallel=ParallelConfig(cp=cp, cp_kind=kind),
        train=TrainConfig(**({"global_batch_size": 2, "micro_batch_size": 2, "seq_len": length} | train)),
    )
    check_config(config, cp)
    return config


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_flops_and_kept_bytes_are_those_of_the_functions(kind: str, model: str) -> None:
    config = config_of(MODELS[model], kind)
    gpt = GPT(config.model, config.router, vocab_size=VOCABULARY, max_positions=LENGTH, seed=0, share=TokenShare(contexts=WORLD))
    initialize(gpt, seed=0, dtype=torch.float32)
    batch = Batch.whole(torch.arange(2 * LENGTH).view(2, -1) % VOCABULARY).part_of(WORLD, 0)
    rank = Rank(config=config, ep=1, vocab_rows=VOCABULARY)
    values: dict[str, Any] = {"#batch.-.0": batch, "x.0.0": torch.randn(LENGTH, config.model.d_model, requires_grad=True)}
    seen = []
    for instruction in (s for s in plain(step_shape(config)) if s.layer == 0 and s.name.startswith("attention")):
        if instruction.kind is Kind.START:
            value = values[instruction.reads[0]]
            values[instruction.writes[0]] = torch.cat([value] * WORLD) if instruction.op is Op.GATHER else value
        elif instruction.kind is Kind.WAIT:
            values[instruction.writes[0]] = values[instruction.reads[0]].detach().requires_grad_()
        else:
            out, flops, kept = measured(
                gpt.functions_of(instruction).bind(instruction, None), [values[v] for v in instruction.reads]
            )
            values |= {v: x.detach().requires_grad_() for v, x in zip(instruction.writes, out, strict=True)}
            block = gpt.blocks.block_of(instruction)
            declared = sum(p.flops for p in block.work(rank.at(instruction)).forward.products if not p.attention)
            assert abs(declared - flops) <= 0.05 * flops, (instruction.tag, declared, flops)
            promised = block.memory(rank.shapes(instruction)).kept
            assert abs(promised - kept) <= max(0.05 * kept, 32 * LENGTH), (instruction.tag, promised, kept)
            seen.append(instruction.name)
    assert len(seen) == 3 and values["h.0.0"].shape == (LENGTH, config.model.d_model)


def measured(function: Callable[..., Any], arguments: list[Any]) -> tuple[tuple[Tensor, ...], float, int]:
    """Results, FLOPs of products, and bytes kept besides arguments, results and what the batch has."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = function(*arguments)
    out = out if isinstance(out, tuple) else (out,)
    batch: Batch = arguments[-1]
    known = [*out, *(x for x in arguments if isinstance(x, Tensor))]
    known += [x for made in batch._made.values() for x in made if isinstance(x, Tensor)]
    there = {x.untyped_storage().data_ptr() for x in known}
    parameters = {p.untyped_storage().data_ptr() for p in _parameters(function)}
    return out, counter.get_total_flops(), sum(n for at, n in saved.items() if at not in there | parameters)


def _parameters(function: Any) -> list[Tensor]:
    holder = function.__self__.holder
    return list(holder.parameters())


@pytest.mark.parametrize(("tp", "model"), [(1, {}), (2, {"qk_norm": "projection"}), (2, LATENT)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_is_priced(kind: str, tp: int, model: dict[str, Any]) -> None:
    for name in STRATEGIES:
        config = config_of(model, kind, global_batch_size=4)
        parallel = replace(config.parallel, tp=tp, zero=int(name == "lina_zero"))
        config = replace(config, strategy=strategy(name), parallel=parallel)
        held = InstructionBytes(config, tp * WORLD, vocab_size=VOCABULARY)
        setting = Setting(step_shape(config), held.buckets, micro_batches=2, kept_bytes=held.kept_back)
        program = training_step(name, setting.under(plan_of(config.strategy)))
        work = InstructionWork(config, world=tp * WORLD, vocab_rows=VOCABULARY, buckets=held.buckets)
        assert all(work(s).kernels >= 0 for s in program if s.kind is Kind.COMPUTE)
        assert peak_of(held, program)[0] > sum(held.state.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["grouped", "latent"])
def test_activations_of_a_long_sequence_fall_with_the_ranks(kind: str, model: str) -> None:
    above = []
    for cp in (1, 2, 4):
        config = config_of(
            MODELS[model], kind if cp > 1 else "all_gather", cp=cp, length=16384, global_batch_size=1, micro_batch_size=1
        )
        held = InstructionBytes(config, cp, vocab_size=VOCABULARY)
        program = training_step("eager", Setting(step_shape(config), held.buckets))
        above.append(peak_of(held, program)[0] - sum(held.state.values()))
    assert above[1] < 0.65 * above[0] and above[2] < 0.45 * above[0], above


def test_products_of_a_step_are_as_many_however_sequences_are_cut() -> None:
    def flops(cp: int, kind: str) -> float:
        config = config_of({}, kind, cp=cp)
        work = InstructionWork(config, world=cp, vocab_rows=VOCABULARY, buckets={})
        compute = (s for s in plain(step_shape(config)) if s.kind is Kind.COMPUTE)
        return cp * sum(work.piece(s).forward.flops for s in compute)

    assert flops(2, "all_gather") == pytest.approx(flops(1, "all_gather")) == pytest.approx(flops(4, "all_to_all"))
