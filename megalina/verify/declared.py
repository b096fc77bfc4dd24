"""What blocks declare, held against what their functions do: FLOPs of forward, and bytes kept for backward, by instruction."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megalina.batch import Batch
from megalina.blocks.sizes import Rank
from megalina.config import PretrainConfig, training_layers
from megalina.layout import axis_sizes
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction, Kind
from megalina.train.bucket_optimizer import BucketOptimizer


@dataclass(frozen=True, slots=True)
class Declared:
    """Of one forward instruction on one rank."""

    block: str
    instruction: str  # tag
    flops: float  # as declared, without attention's core: in short sequences that is one kernel, which torch does not count
    counted_flops: float
    kept_bytes: int  # as declared, besides the values that it reads
    counted_bytes: int


def declared_and_counted(config: PretrainConfig) -> list[Declared]:
    """Of every compute instruction of a forward pass with its graph, on this process alone: no tensor parallelism.

    Tokens are random and none is padding; experts' rows are counted over all experts, however routing spreads them."""
    vocab_size = config.model.vocab_size
    trainable = Trainable(config, build_mesh(), vocab_size=vocab_size, device=torch.device("cpu"), wish_to_stop=lambda: False)
    rank = Rank(
        config=config,
        ep=axis_sizes(1, tp=1, ep=1)["ep"],
        vocab_rows=trainable.gpt.blocks.whole.padded_vocab,
        padded=vocab_size < trainable.gpt.blocks.whole.padded_vocab,
        skew_L=[1.0] * len(training_layers(config.model)),
        expert_skew_L=[1.0] * len(training_layers(config.model)),
    )
    counted: dict[Instruction, tuple[float, int]] = {}
    functions = trainable.functions

    def watched(instruction: Instruction) -> Callable[..., Any]:
        function = functions(instruction)
        if instruction.phase != "F" or instruction.kind is not Kind.COMPUTE:
            return function

        def run(*arguments: Any) -> Any:
            if instruction in counted:  # computed again in backward
                return function(*arguments)
            there = {_storage(t) for t in _tensors(arguments)}
            there |= {_storage(flat) for b in trainable.buckets.values() for flat in (b.param, b.grad)}
            saved: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                if _storage(tensor) not in there:
                    saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
                return tensor

            with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                out = function(*arguments)
            for tensor in _kept_by_functions(out):
                note(tensor)
            values = {_storage(t) for t in _tensors(out)}  # they are values of the list, even if something else keeps them too
            facts = {_storage(t) for b in arguments if isinstance(b, Batch) for t in _tensors(list(b._made.values()))}
            counted[instruction] = counter.get_total_flops(), sum(n for at, n in saved.items() if at not in values | facts)
            return out

        return run

    trainable.run_with(trainable.program, watched)
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    trainable.step(_batch(config), optimizer.update, directions=optimizer)
    trainable.close()
    rows = []
    for instruction, (flops, kept) in counted.items():
        block = trainable.gpt.blocks.block_of(instruction)
        products = block.work(rank.at(instruction)).forward.products
        declared = sum(p.flops for p in products if not p.attention)
        rows.append(Declared(block.name, instruction.tag, declared, flops, block.memory(rank.shapes(instruction)).kept, kept))
    return rows


def _batch(config: PretrainConfig) -> Batch:
    train = config.train
    sequences, length = train.global_batch_size, train.seq_len
    words = torch.randint(0, config.model.vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    every = torch.ones(sequences, length, dtype=torch.bool)
    position = torch.arange(length).repeat(sequences, 1)
    return Batch(words[:, :-1], words[:, 1:], every, every, position, None, torch.arange(sequences))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    """All there are in arguments and results, also inside batches and orders of rows."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif hasattr(values, "__dataclass_fields__"):
        for name in values.__dataclass_fields__:
            yield from _tensors(getattr(values, name, None))


def _kept_by_functions(out: Any) -> Iterator[Tensor]:
    """What autograd functions keep as attributes, past the hooks."""
    nodes = [t.grad_fn for t in _tensors(out) if t.grad_fn is not None]
    known = set()
    while nodes:
        node = nodes.pop()
        if node in known:
            continue
        known.add(node)
        yield from _tensors([v for v in getattr(node, "__dict__", {}).values() if isinstance(v, Tensor)])
        nodes += [following for following, _ in node.next_functions if following is not None]
