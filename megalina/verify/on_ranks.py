"""The steps on ranks, by program: what one rank has of every recorded tensor, and the whole put together from all ranks.

What is seen is what instructions of the program really read and write; the observer changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.dispatch import ONCE_PER_NODE
from megalina.blocks.model import blocks_of
from megalina.blocks.parameter import Parameter
from megalina.blocks.pipelined import pipelined
from megalina.config import PretrainConfig
from megalina.mesh import Mesh, build_meshes
from megalina.model.gpt import GPT
from megalina.model.init import spec_of
from megalina.model.permute import RowOrder
from megalina.parallel.buckets import Bucket
from megalina.parallel.shard import cut_of
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.plan_settings import SEARCH
from megalina.rank_pool import TIME_LIMIT_S, RankPool
from megalina.step.forward import names
from megalina.step.passes import ROUTER_STATE
from megalina.step.program import Instruction
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.verify.recording import (
    INITIAL,
    NOBODY,
    NODES,
    SEQUENCES,
    Entry,
    Layout,
    Recording,
    bias_name,
    bits_of,
    choices_of,
    columns_of,
    order_of,
    stream_name,
    widened,
)
from megalina.verify.searched import walk_searched_list
from megalina.verify.start import shake

Key = tuple[int, str, str]  # step, kind, name
PRELOAD = ("megalina.verify.on_ranks",)


@dataclass(slots=True)
class Held:
    """What one rank has of an entry, in the whole's shape; NaN (integers: NOBODY) where it has nothing."""

    value: Tensor
    note: str


def layout_config(config: PretrainConfig, layout: Layout) -> PretrainConfig:
    """The configuration with a layout's choices in it."""
    return replace(
        config,
        launch=replace(config.launch, ranks=layout.world),
        parallel=replace(
            config.parallel,
            tp=layout.tp,
            ep=layout.ep,
            cp=layout.cp,
            cp_kind=layout.cp_kind,
            sequence=layout.sequence,
            dispatch=layout.dispatch,
            reduce=layout.reduce,
            zero=layout.zero,
            pp=layout.pp,
            pp_chunks=layout.chunks,
            pp_layout=layout.stages,
        ),
        strategy=replace(
            config.strategy,
            name=layout.strategy,
            partition_bytes=str(int(layout.piece_mb * 2**20)),
            pipeline=layout.pipeline,
        ),
        train=replace(config.train, micro_batch_size=layout.micro_batch, recompute=layout.recompute),
    )


def record_rank(
    config: PretrainConfig, layout: Layout, batches: Sequence[Batch], mesh: Mesh, *, device: torch.device, plant: str = ""
) -> dict[Key, Held]:
    """One step for each global batch, on this rank of the mesh.  `plant`: a bug of `megalina.verify.plants` to build in."""
    config = layout_config(config, layout)
    trainable = Trainable(config, mesh, vocab_size=config.model.vocab_size, device=device, wish_to_stop=lambda: False)
    if config.strategy.name == SEARCH and not config.strategy.order:
        walk_searched_list(trainable, seed=config.train.seed)
    shake(trainable.gpt, config.train.seed, cut_of(mesh))
    if plant:
        from megalina.verify.plants import PLANTS  # nobody but a rank that is to have a bug knows of them

        PLANTS[plant].plant(trainable, config)
    observer = _Observer(trainable, config)
    trainable.run_with(trainable.program, observer.observed(trainable.functions))
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    held = {(INITIAL, "weight", name): Held(value.cpu(), "") for name, value in _weights(trainable, mesh).items()}
    own, gpt = SEQUENCES // mesh.readers, trainable.gpt
    for step, batch in enumerate(batches):
        observer.begin(step)
        gradients: dict[str, Tensor] = {}

        def update(name: str, result: StepResult, gradients: dict[str, Tensor] = gradients) -> None:
            gradients.update(_gradients(trainable.buckets[name], mesh))
            optimizer.update(name, result)

        result = trainable.step(batch.split(own)[mesh.reader].to(device), update, directions=optimizer)
        trainable.settle()
        seen = observer.seen
        loads = result.loads[:, : config.model.num_experts + 1]
        for layer, load in zip(gpt.moe_layers, loads, strict=True):
            seen["routing", f"layers.{layer}.load"] = Held(load, "U:verdict.-.0")
            if layer in gpt.layers and (bias_E := gpt.layers[layer].router.bias_E) is not None:
                seen["routing", bias_name(layer)] = Held(bits_of(bias_E), f"U:{ROUTER_STATE}.-.0")
        for name, value in {"loss": result.loss, **result.auxiliary}.items():
            seen["loss", name] = _scalar(value)
        for name in ("loss_tokens", "valid_tokens"):
            seen["loss", name] = _scalar(getattr(result, name))
        for name in ("grad_norm", "grad_scale"):
            seen["norm", name] = _scalar(getattr(result, name))
        where = {m.name: bucket.name for bucket in trainable.buckets.values() for m in bucket.members}
        seen |= {("gradient", name): Held(value, f"B:{where[name]}<") for name, value in gradients.items()}
        seen |= {("weight", name): Held(v, f"U:update {where[name]}") for name, v in _weights(trainable, mesh).items()}
        held |= {(step, kind, name): Held(value.value.cpu(), value.note) for (kind, name), value in seen.items()}
    return held


def together(config: PretrainConfig, layout: Layout, batches: Sequence[Batch], ranks: Sequence[dict[Key, Held]]) -> Recording:
    """A recording from what each rank has; the first rank that has an element gives it to the whole.  Of what is in another stage
    of a pipeline a rank has nothing."""
    there = {name for held in ranks for step, _, name in held if step == INITIAL}
    blocks = blocks_of(config.model, config.router)
    weights = [name for name in _names(config) if name in there]
    keys = [(INITIAL, "weight", name) for name in weights]
    keys += [(step, *key) for step in range(len(batches)) for key in order_of(blocks, weights)]
    entries = []
    for key in keys:
        first = next(held[key] for held in ranks if key in held)
        by_rank = [held[key].value if key in held else _nothing(tuple(first.value.shape), first.value) for held in ranks]
        whole = by_rank[0].clone()
        for value in by_rank[1:]:
            missing = whole.isnan() if whole.is_floating_point() else whole == NOBODY
            whole = torch.where(missing, value, whole)
        entries.append(Entry(*key, whole, by_rank if layout.world > 1 else None, first.note))
    return Recording(layout, layout_config(config, layout), list(batches), entries)


def _names(config: PretrainConfig) -> list[str]:
    """Of all parameters, in the model's order."""
    model, seed = config.model, config.train.seed
    gpt = GPT(model, config.router, vocab_size=model.vocab_size, max_positions=config.train.seq_len, seed=seed)  # on no device
    return [name for name, _ in gpt.named_parameters()]


class _Observer:
    """Notes what forward instructions read and write, by (kind, name); the first that shows a value counts."""

    def __init__(self, trainable: Trainable, config: PretrainConfig):
        self.seen: dict[tuple[str, str], Held] = {}
        self._length, self._columns = config.train.seq_len, columns_of(config.model, config.router)
        self._tp = trainable.mesh.tp
        self._first = 0  # sample number of the step's first sequence
        self._batches: dict[str, Batch] = {}  # by part
        self._instruction: Instruction | None = None  # the forward instruction that runs
        self._noted: set[str] = set()
        blocks, shape = trainable.gpt.blocks, trainable.setting.shape
        self._streams = {"x.0": "embedded"}  # the residual stream's values -> their names
        for layer, block, _, writes in shape.placed():
            if layer >= 0 and writes:
                (value,) = names(writes, layer)
                self._streams[value.rpartition(".")[0]] = stream_name(blocks, layer, block.name)
        for i in trainable.gpt.moe_layers:
            if i in trainable.gpt.layers:
                trainable.gpt.layers[i].router.register_forward_pre_hook(self._logits)

    def begin(self, step: int) -> None:
        self.seen, self._first = {}, step * SEQUENCES
        self._batches, self._noted = {}, set()

    def observed(self, functions: Callable[[Instruction], Callable[..., Any]]) -> Callable[[Instruction], Callable[..., Any]]:
        """The same functions, watched."""

        def of(instruction: Instruction) -> Callable[..., Any]:
            function = functions(instruction)
            if instruction.name == "sizes":  # before all else: a later stage of a pipeline reads a stream before a batch

                def sizes(*batches: Batch) -> Any:
                    parts = (name.rpartition(".")[2] for name in instruction.reads)
                    self._batches |= dict(zip(parts, batches, strict=True))
                    return function(*batches)

                return sizes
            if instruction.phase != "F":
                return function

            def watched(*arguments: Any) -> Any:
                for name, value in zip(instruction.reads, arguments, strict=True):
                    if isinstance(value, Batch):
                        self._batches[instruction.part] = value
                    else:
                        self._note(name, value, instruction)
                self._instruction = instruction
                try:
                    out = function(*arguments)
                finally:
                    self._instruction = None
                for name, value in zip(instruction.writes, out if isinstance(out, tuple) else (out,), strict=True):
                    if isinstance(value, Batch):
                        self._batches[name.split(".")[2]] = value
                    else:
                        self._note(name, value, instruction)
                return out

            return watched

        return of

    def _note(self, value_name: str, value: Any, instruction: Instruction) -> None:
        base, layer, part = value_name.split(".")
        stream = self._streams.get(f"{base}.{layer}")
        if not (stream or base in ("weight", "#order")) or value_name in self._noted or "c" in part:
            return  # a chunk is a part of what is noted
        self._noted.add(value_name)
        if stream:
            self._fill("activation", stream, value, instruction, part)
        elif base == "weight":
            self._fill("activation", f"layers.{layer}.weight", widened(value, self._columns, 0.0), instruction, part)
        else:
            assert isinstance(value, RowOrder)
            self._fill("routing", f"layers.{layer}.expert", choices_of(value, self._columns), instruction, part)

    def _logits(self, router: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before a router runs; also called when an instruction is computed again in backward, which does not count."""
        instruction = self._instruction
        if instruction is not None:
            self._fill("activation", f"layers.{instruction.layer}.logits", arguments[0], instruction, instruction.part)

    def _fill(self, kind: str, name: str, value_TA: Tensor, instruction: Instruction, part: str) -> None:
        """Put a part's tokens where they belong in the global batch."""
        batch = self._batches[part]
        value_TA = value_TA.detach()
        tokens, width = batch.tokens_BS.numel(), value_TA.shape[1]
        if (kind, name) not in self.seen:
            whole = _nothing((SEQUENCES, self._length, width), value_TA)
            self.seen[kind, name] = Held(whole, instruction.tag)
        place_T = ((batch.sample_B[:, None] - self._first) * self._length + batch.place_S).flatten()  # in the global batch
        if len(value_TA) != tokens:
            own = tokens // self._tp.size
            assert len(value_TA) == own, (name, value_TA.shape, tokens)
            place_T = place_T[self._tp.rank * own : (self._tp.rank + 1) * own]
        self.seen[kind, name].value.view(-1, width)[place_T] = value_TA


def _gradients(bucket: Bucket, mesh: Mesh) -> dict[str, Tensor]:
    """Of a bucket's parameters, whole; only this rank's slices are summed where ZeRO-1 shards the bucket."""
    flat = torch.full_like(bucket.grad, float("nan"))
    for s in bucket.slices:
        flat[s.start : s.stop] = bucket.grad[s.start : s.stop]
    return {m.name: _whole(flat[m.start : m.stop], spec_of(m.parameter), mesh) for m in bucket.members}


def _weights(trainable: Trainable, mesh: Mesh) -> dict[str, Tensor]:
    return {name: _whole(p.detach().flatten(), spec_of(p), mesh) for name, p in trainable.gpt.named_parameters()}


def _whole(flat: Tensor, spec: Parameter, mesh: Mesh) -> Tensor:
    """A parameter-like tensor in its place in the whole, without the vocabulary's padding."""
    places = cut_of(mesh).of(spec)
    index = tuple(places.get(d, slice(None)) for d in range(len(spec.shape)))
    whole = _nothing(spec.shape, flat)
    whole[index] = flat.view(whole[index].shape)
    if spec.order:
        whole = whole.index_select(spec.sharded["ep"], torch.tensor(spec.order, device=whole.device).argsort())
    return whole[: spec.rows] if spec.rows else whole


def _nothing(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_full(shape, float("nan") if like.is_floating_point() else NOBODY)


def _scalar(value: float) -> Held:
    return Held(torch.tensor(float(value), dtype=torch.float64), "U:verdict.-.0")


class Pool(RankPool):
    """Runs rows, a layout's steps each, on ranks that stay from row to row: sorted by world size they start each size's ranks
    once."""

    def __init__(self, *, device: str = "cpu", time_limit_s: float = TIME_LIMIT_S):
        super().__init__(device=device, time_limit_s=time_limit_s, preload=PRELOAD)

    def record(self, config: PretrainConfig, layout: Layout, batches: Sequence[Batch], plant: str = "") -> Recording:
        """Run the steps in a layout.  RanksFailed where a rank raises, dies or takes too long."""
        self.start_row(config, layout, batches, plant)
        return self.finish_row(config, layout, batches)

    def start_row(self, config: PretrainConfig, layout: Layout, batches: Sequence[Batch], plant: str = "") -> None:
        """As `record`, without waiting for the ranks."""
        self.start(layout.world, _recorded, self._device, self._time_limit_s, config, layout, list(batches), plant)

    def finish_row(self, config: PretrainConfig, layout: Layout, batches: Sequence[Batch]) -> Recording:
        """The recording of the row that was started with these."""
        ranks = [{key: Held(torch.from_numpy(value), note) for key, (value, note) in held.items()} for held in self.finish()]
        return together(config, layout, batches, ranks)


def _recorded(
    device: str, time_limit_s: float, config: PretrainConfig, layout: Layout, batches: Sequence[Batch], plant: str
) -> dict[Key, tuple[NDArray, str]]:
    """On a rank: what it holds, as arrays, which pickle faster than tensors."""
    mesh = _mesh_of(config, layout, time_limit_s)
    here = torch.device("cuda", mesh.world.rank) if device == "cuda" else torch.device("cpu")
    held = record_rank(config, layout, batches, mesh, device=here, plant=plant)
    return {key: (h.value.numpy(), h.note) for key, h in held.items()}


def _mesh_of(config: PretrainConfig, layout: Layout, timeout_s: float) -> Mesh:
    config = layout_config(config, layout)
    across = pipelined(config, layout.world).across if layout.pp > 1 else {}
    per_node = layout.world // NODES
    by_node = per_node * (layout.reduce == "by_node"), per_node * (layout.dispatch == ONCE_PER_NODE)
    return _mesh(layout.tp, layout.ep, layout.cp, layout.pp, tuple(across.items()), by_node, timeout_s)


@cache
def _mesh(
    tp: int,
    ep: int,
    cp: int,
    pp: int,
    across: tuple[tuple[str, tuple[int, ...]], ...],
    by_node: tuple[int, int],
    timeout_s: float,
) -> Mesh:
    """Of this process's world.  Communicators take longer than a row, so they stay.  `by_node`: ranks on a node for sums, and for
    tokens; 0: flat."""
    sums, tokens = by_node
    how = {"timeout_s": timeout_s, "ranks_per_node": sums, "token_ranks_per_node": tokens}
    return build_meshes(tp=tp, ep=ep, cp=cp, pp=pp, across=dict(across), **how)[1]  # type: ignore[arg-type]
