"""The contract: a placement never changes an answer, whatever sits where, is split how, and moves when."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalina.config import RouterConfig
from megalina.generate import Sampling, generate
from megalina.parallel.emulated_device import ServingDevice
from megalina.placement.controller import Policy, Split, Trigger
from megalina.placement.placement import Placement
from megalina.placement.planners.identity import identity
from megalina.placement.split import even, load_aware, local_first
from megalina.placement.triggers import always, never
from megalina.serve import functions
from megalina.serve.decoding import write_on
from megalina.serve.engine import TILE_ROWS
from megalina.step.program import Instruction
from tests.parallel.ranks import run_on_ranks
from tests.serve.small_engine import EXPERTS, batch_of, layer_bytes, random_placement, small_engine, small_gpt, tokens_of

SPLITS = {"even": even, "load_aware": load_aware, "local_first": local_first}
OWN = Path(__file__).resolve().parents[2] / "docs" / "examples" / "own_layer.py"
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared experts, biases": {"shared_d_ff": 8, "shared_gate": True, "bias": True, "activation": "gelu", "norm": "layernorm"},
    "every other layer dense": {"moe_every": 2, "activation": "swiglu_clamped", "bias": True},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "windows, sinks": {"attention_sinks": True, "window": 4, "full_attention_every": 2},
    "latent": {
        "attention": "mla", "num_kv_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    },
}  # fmt: skip
OWN_BLOCKS: dict[str, dict[str, Any]] = {
    "own block": {"layer": ["attention", f"{OWN}:Gate", "ffn"]},
    "own block before attention": {"layer": [f"{OWN}:Gate", "attention", "ffn"], "moe_every": 2},
    "own block behind": {"layer": ["attention", "ffn", f"{OWN}:Gate"]},
}


class Uniform:
    """Expects nothing in particular, and learns how many rows there were."""

    def start(self, layer: int) -> int:
        return 0

    def features(self, layer: int, seen: Any) -> np.ndarray[Any, Any]:
        return np.array([float(len(seen.chosen))])

    def expect(self, layer: int, features: Any, state: int) -> np.ndarray[Any, Any]:
        return np.full(EXPERTS, 1 / EXPERTS)

    def evidence(self, layer: int, seen: Any, chosen_TK: Any) -> np.ndarray[Any, Any]:
        return np.array([float(chosen_TK.size)])

    def learn(self, layer: int, features: Any, evidence: Any, state: int) -> int:
        return state + int(evidence[0])


def static(devices: int, slots: int) -> Placement:
    return identity(np.ones(EXPERTS), devices, slots)


def on_one_device(model: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Each rank's batch through the plain model, as an oracle; then through engines."""
    rank, world = dist.get_rank(), dist.get_world_size()
    gpt = small_gpt(dtype=getattr(torch, dtype), **model)
    batch = batch_of(tokens_of(rank))
    with torch.inference_mode():
        expected = gpt.hidden(batch)[0]
    slots = -(-EXPERTS // world) + 1
    residents = [static(world, slots)] * len(gpt.moe_layers)
    engine = small_engine(gpt, Policy(None, None, even, never), residents)
    out = engine.hidden(batch)
    load = [d.rows for d in engine.controller.decided]
    engine.close()
    return {"difference": float((out - expected).abs().max()), "size": float(expected.abs().max()), "rows": load}


def many_placements(number: int, dtype: str) -> dict[str, Any]:
    """The same batch again and again, with another placement in each layer at every step, in both phases."""
    rank, world, slots = dist.get_rank(), dist.get_world_size(), 4
    gpt = small_gpt(dtype=getattr(torch, dtype))
    batch = batch_of(tokens_of(rank, sequences=2 + rank))
    engines = {}
    for tile in (True, False):
        for name, split in SPLITS.items():
            residents = [static(world, slots)] * len(gpt.moe_layers)
            engines[name, tile] = small_engine(gpt, moving(split, always), residents, batch_invariant=tile)
    outs: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    with tiles_tried() as changed:
        for i in range(number):
            name = list(SPLITS)[i % len(SPLITS)]
            for tile in (True, False):
                outs[tile].append(engines[name, tile].hidden(batch).clone())
    done = [engine.slots.done for engine in engines.values()]
    replanned = sum(d.replanned for e in engines.values() for d in e.controller.decided)
    for engine in engines.values():
        engine.close()
    scale = float(outs[True][0].abs().max())
    return {
        "different": sum(not torch.equal(out, outs[True][0]) for out in outs[True]),
        "changed by tiles": sum(changed),
        "rounding": max(float((out - outs[True][0]).abs().max()) for out in outs[False]) / scale,
        "experts": sum(d.experts for d in done),
        "failed": sum(d.failed for d in done),
        "replanned": replanned,
    }


@contextmanager
def tiles_tried() -> Iterator[list[bool]]:
    """Whether tiles would have changed a bit, for each call of the experts without them."""
    whole, changed = functions.expert_rows, list[bool]()

    def rows(*arguments: Any, tile: int, **settings: Any) -> torch.Tensor:
        out = whole(*arguments, tile=tile, **settings)
        if not tile:
            changed.append(not torch.equal(out, whole(*arguments, tile=TILE_ROWS, **settings)))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "expert_rows", rows)
        yield changed


def moving(split: Split, trigger: Trigger) -> Policy:
    """Another placement every time, the same on all ranks."""
    random = np.random.default_rng(0)
    return Policy(Uniform(), lambda share_E, devices, slots: random_placement(random, devices, slots), split, trigger)


class RowsSeen(ServingDevice):
    """Every instruction takes a little, so what is sent leaves through a lane; notes the rows that experts had."""

    def __init__(self) -> None:
        super().__init__(self._note)
        self.rows: list[int] = []

    def _note(self, instruction: Instruction, tokens: int, rows: int) -> float:
        if instruction.name == "experts":
            self.rows.append(rows)
        return 1e-4


def in_chunks(number: int) -> dict[str, Any]:
    """The same batches under the same placements, with rows that go back at once and in chunks, and with tokens that travel once
    to a device; in each batch another rank has no token."""
    rank, world = dist.get_rank(), dist.get_world_size()
    slots = 4 if world > 1 else EXPERTS + 1
    out: dict[str, Any] = {"different": [], "rows": {}, "experts": 0}
    for (name, model), split in zip(MODELS.items(), SPLITS.values(), strict=True):
        gpt = small_gpt(dtype=torch.float32, **model)
        residents = [static(world, slots)] * len(gpt.moe_layers)
        engines = {
            (n, once): small_engine(gpt, moving(split, always), residents, RowsSeen(), combine_chunks=n, once_per_rank=once)
            for n, once in [*((n, False) for n in (1, 2, 3, slots)), (1, True), (3, True)]
        }
        for i in range(number):
            random = np.random.default_rng((i, rank))
            empty = i % (world + 1) == rank
            batch = batch_of(random.integers(0, 97, (1 if empty else int(random.integers(1, 4)), 12)).tolist())
            if empty:  # padding alone, as of a rank without a prompt
                batch = replace(batch, valid_BS=torch.zeros_like(batch.valid_BS), loss_mask_BS=torch.zeros_like(batch.valid_BS))
            outs = {n: engine.run(batch, emulate=True).hidden_TD for n, engine in engines.items()}
            out["different"] += [(name, i, key) for key, o in outs.items() if not torch.equal(o, outs[1, False])]
        out["rows"][name] = {key: np.reshape(engine.device.rows, (-1, key[0])).tolist() for key, engine in engines.items()}
        out["experts"] += engines[slots, False].slots.done.experts
        for engine in engines.values():
            engine.close()
    return out


def broken_swaps(world_slots: int) -> dict[str, Any]:
    """Fetches fail on one rank alone, in phase 1, then in phase 2."""
    rank, world = dist.get_rank(), dist.get_world_size()
    gpt = small_gpt(dtype=torch.float32)
    batch = batch_of(tokens_of(rank))
    out = {}
    for phase, trigger in (("1", never), ("2", always)):
        residents = [static(world, world_slots)] * len(gpt.moe_layers)
        budget = layer_bytes(gpt, world_slots) + 1  # the smallest, and no whole expert more
        engine = small_engine(gpt, moving(even, trigger), residents, batch_invariant=True, swap_bytes=budget)
        first = engine.hidden(batch).clone()

        def fail(to: torch.Tensor, source: torch.Tensor) -> None:
            raise OSError("planted: the copy failed")

        whole = engine.slots.copy
        if rank == world - 1:
            engine.slots.copy = fail
        broken = [engine.hidden(batch).clone() for _ in range(3)]
        failed = engine.slots.done.failed
        engine.slots.copy = whole
        again = [engine.hidden(batch).clone() for _ in range(3)]
        out[phase] = {
            "equal": all(torch.equal(first, o) for o in (*broken, *again)),
            "failed": failed,
            "failed since": engine.slots.done.failed - failed,
            "placements": [engine.slots.placement(layer).slots for layer in range(3)],
        }
        engine.close()
    apart = np.random.default_rng(rank)  # ranks plan otherwise, as on machines that round otherwise
    policy = Policy(Uniform(), lambda share_E, devices, slots: random_placement(apart, devices, slots), even, never)
    engine = small_engine(gpt, policy, residents, batch_invariant=True)
    out["apart"] = [bool(torch.equal(first, engine.hidden(batch))) for _ in range(3)]
    out["moved"] = [engine.slots.placement(layer) != residents[layer] for layer in range(3)]
    engine.close()
    return out


def write(prompts_of_ranks: list[list[list[int]]], model: dict[str, Any]) -> dict[str, Any]:
    """Greedy text of ranks with few and no prompts of different lengths, under placements that move; and each alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    gpt = small_gpt(dtype=torch.float64, **model)
    engine = small_engine(gpt, moving(load_aware, always), [static(world, 4)] * len(gpt.moe_layers))
    fed: list[int] = []
    own = prompts_of_ranks[rank]
    text = write_on(engine, own, GREEDY, each_pass=lambda passes, tokens: fed.append(tokens))
    engine.close()
    return {"text": text, "fed": fed}


GREEDY = Sampling(max_tokens=9, max_positions=14, temperature=0.0)
PROMPTS = [[[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], [], [[11, 12]]]


def incremental(model: dict[str, Any]) -> float:
    """Decoding with a cache gives what the whole pass gives."""
    gpt = small_gpt(dtype=torch.float64, **model)
    world = dist.get_world_size()
    engine = small_engine(gpt, Policy(None, None, even, never), [static(world, 4)] * len(gpt.moe_layers))
    tokens = tokens_of(dist.get_rank())
    whole = engine.hidden(batch_of(tokens)).view(3, 16, -1)
    past = gpt.key_values()
    parts = []
    for begin, end in ((0, 10), (10, 11), (11, 16)):
        batch = batch_of([s[begin:end] for s in tokens])
        batch = type(batch)(*(getattr(batch, n) for n in ("tokens_BS", "labels_BS", "loss_mask_BS", "valid_BS")),
                            batch.position_BS + begin, None, batch.sample_B)  # fmt: skip
        parts.append(engine.hidden(batch, past).view(3, end - begin, -1))
    engine.close()
    return float((torch.cat(parts, 1) - whole).abs().max())


def bad(case: str) -> str:
    gpt, world = small_gpt(), dist.get_world_size()
    try:
        if case == "prompt":
            engine = small_engine(gpt, Policy(None, None, even, never), [static(world, 4)] * 3)
            write_on(engine, [[1] * 60] if dist.get_rank() else [[1]], Sampling(max_tokens=2, max_positions=48))
        if case == "router":
            ahead = small_gpt(RouterConfig(kind="expert_choice"))
            engine = small_engine(ahead, Policy(None, None, even, never), [static(world, 4)] * 3)
            write_on(engine, [[1]], Sampling(max_tokens=2, max_positions=48))
        if case == "layers":
            small_engine(gpt, Policy(None, None, even, never), [static(world, 4)] * 2)
        if case == "devices":
            small_engine(gpt, Policy(None, None, even, never), [static(world + 1, 4)] * 3)
        if case == "chunks":
            small_engine(gpt, Policy(None, None, even, never), [static(world, 4)] * 3, combine_chunks=5)
        if case == "budget":
            small_engine(gpt, Policy(None, None, even, never), [static(world, 4)] * 3, swap_bytes=layer_bytes(gpt, 4) - 1)
    except ValueError as error:
        return str(error)
    return ""


DTYPES = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 0.2}  # what rounding may do without tiles
PLACEMENTS = {"float32": 8, "float64": 4, "bfloat16": 4}
BAD = {
    "prompt": "prompt 0 of rank 1 has 60 tokens, but the model reads at most 48",
    "router": "looks at later tokens",
    "layers": "2 placements for 3 MoE layers",
    "devices": "placed on 3 devices, there are 2 ranks",
    "chunks": "5 chunks of 4 slots: choose 4 or fewer",
    "budget": "73727 bytes for experts on their way: the 4 slots of one layer may be fetched at once and take 73728 bytes; "
    "choose infer.swap_mib=0.071 or more",
}


def jobs() -> dict[str, Any]:
    """All that this file asks of so many ranks: starting them takes longer than what they do."""
    world = dist.get_world_size()
    out: dict[str, Any] = {"oracle": {name: on_one_device(model, "float64") for name, model in (MODELS | OWN_BLOCKS).items()}}
    if world < 3:
        out["chunks"] = in_chunks(4)
    if world == 2:
        out["placements"] = {dtype: many_placements(PLACEMENTS[dtype], dtype) for dtype in DTYPES}
        out["incremental"] = {name: incremental(model) for name, model in ATTENTION.items()}
        out["bad"] = {case: bad(case) for case in BAD}
    if world == 3:
        out["broken"] = broken_swaps(4)
        out["text"] = {name: write(PROMPTS, ATTENTION[name]) for name in ("grouped queries", "windows, sinks")}
    return out


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    return {world: run_on_ranks(world, jobs) for world in (1, 2, 3)}


Found = dict[int, list[dict[str, Any]]]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", [*MODELS, *OWN_BLOCKS])
def test_an_engine_gives_what_the_model_gives_on_one_device(found: Found, world: int, name: str) -> None:
    for rank in found[world]:
        of_model = rank["oracle"][name]
        assert of_model["difference"] < 1e-12 * max(1.0, of_model["size"])
        assert all(rows == world * 3 * 16 * RouterConfig().top_k for rows in of_model["rows"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_placements_splits_and_plans_anew_are_bit_equal(found: Found, dtype: str) -> None:
    check_placements([rank["placements"][dtype] for rank in found[2]], PLACEMENTS[dtype], dtype)


@pytest.mark.full
def test_hundreds_of_random_placements_are_bit_equal() -> None:
    check_placements(run_on_ranks(2, many_placements, 200, "float32"), 200, "float32")


def check_placements(ranks: list[dict[str, Any]], number: int, dtype: str) -> None:
    for found in ranks:
        assert found["different"] == 0
        assert found["rounding"] < DTYPES[dtype]
        assert found["experts"] > 2 * number and found["failed"] == 0
        assert found["replanned"] == 2 * 3 * number  # with and without tiles; each layer, each time
    # without tiles bits differ where a kernel does few rows in another way than many, which is the processor's and the type's
    assert any(found["rounding"] > 0 for found in ranks) == any(found["changed by tiles"] > 0 for found in ranks)


@pytest.mark.parametrize("world", [1, 2])
def test_rows_in_chunks_and_tokens_sent_once_give_the_same_bits(found: Found, world: int) -> None:
    for rank in found[world]:
        assert rank["chunks"]["different"] == []
        assert world == 1 or rank["chunks"]["experts"] > 4  # placements did change
        for of_model in rank["chunks"]["rows"].values():
            for (n, _), rows in of_model.items():
                assert [sum(of_chunks) for of_chunks in rows] == [all_rows for (all_rows,) in of_model[1, False]]
                assert n == 1 or any(sum(map(bool, of_chunks)) > 1 for of_chunks in rows)  # rows of a chunk, not of the layer


def test_experts_that_do_not_come_change_no_answer_and_are_counted(found: Found) -> None:
    ranks = [rank["broken"] for rank in found[3]]
    for phase in "12":
        for rank, by_phase in enumerate(ranks):
            assert by_phase[phase]["equal"] and by_phase[phase]["failed since"] == 0
            assert (by_phase[phase]["failed"] > 0) == (rank == 2)
            assert by_phase[phase]["placements"] == ranks[0][phase]["placements"]


def test_plans_that_differ_between_ranks_are_not_followed(found: Found) -> None:
    for rank in found[3]:
        assert all(rank["broken"]["apart"]) and not any(rank["broken"]["moved"])


@pytest.mark.parametrize("name", ["grouped queries", "windows, sinks"])
def test_text_is_that_of_each_prompt_alone_on_one_device(found: Found, name: str) -> None:
    gpt = small_gpt(dtype=torch.float64, **ATTENTION[name])
    for prompts, rank in zip(PROMPTS, found[3], strict=True):
        alone = [list(generate(gpt, p, GREEDY)) for p in prompts]
        text = rank["text"][name]
        assert text["text"] == alone
        assert len(text["fed"]) == 9 and text["fed"][0] == sum(map(len, prompts))


@pytest.mark.parametrize("name", ATTENTION)
def test_a_cache_changes_nothing(found: Found, name: str) -> None:
    assert max(rank["incremental"][name] for rank in found[2]) < 1e-12


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_on_every_rank(found: Found, case: str) -> None:
    for rank in found[2]:
        assert BAD[case] in rank["bad"][case] and "\n" not in rank["bad"][case]
