"""What a device computes, as calls to be timed: products, a copy, tiny operations, and the model's own functions.

What the host needs for an instruction is a real training step whose tensors are next to nothing, on this rank alone.  It is run
before there is a process group, so nothing waits for another rank.

Letters: B sequences, S tokens, T = B x S, D model width, F hidden width, H query heads, G key heads, d numbers a head, N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.activation import Activation
from megalina.config import PretrainConfig
from megalina.measure.shapes import ProductShape, Sizes, expert_key, pass_key
from megalina.mesh import build_mesh
from megalina.model.activation import activate, activate_backward
from megalina.model.attend import attend
from megalina.model.experts import expert_mlp
from megalina.model.norm import rms_norm
from megalina.parallel.trainable import DTYPES, Trainable
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.step.program import Kind
from megalina.train.bucket_optimizer import BucketOptimizer

Call = Callable[[], object]
TINY_OPS = 50
VOCAB = 128
TOKENS = 8


def kernel_calls(sizes: Sizes, dtypes: tuple[str, ...], device: torch.device) -> dict[str, Callable[[], Call]]:
    """What makes each call: tensors are there only while it is timed.  `dtypes`: the first one is not for products alone."""
    own = dtypes[0]
    makers: dict[str, Callable[[], Call]] = {
        "copy": lambda: copy(sizes.copied_bytes, device),
        "tiny": lambda: tiny(device),
        pass_key("norm"): lambda: norm(sizes, own, device),
        pass_key("activation"): lambda: activation(sizes, own, device),
        pass_key("residual"): lambda: residual(sizes, own, device),
        "attention": lambda: attention(sizes, own, device),
    }
    for dtype in dtypes:
        for shape in (s for of_side in sizes.products(dtype) for s in of_side):
            makers[shape.key] = lambda shape=shape: product(shape, sizes.cold_bytes, device)  # type: ignore[misc]
    for rows in sizes.expert_rows:
        makers[expert_key(own, rows)] = lambda rows=rows: experts(sizes, own, rows, device)  # type: ignore[misc]
    return makers


def product(shape: ProductShape, cold_bytes: int, device: torch.device) -> Call:
    """As a layer makes it: forward with a weight of [columns, inner]; of little depth, as a weight's gradient, [rows, columns].

    Each call takes other operands, so many that they come from memory."""
    gradient = shape.inner < min(shape.rows, shape.columns)
    left = (shape.inner, shape.rows) if gradient else (shape.rows, shape.inner)
    right = (shape.inner, shape.columns) if gradient else (shape.columns, shape.inner)
    x, y, out = _made(shape.dtype, device, left, right, (shape.rows, shape.columns))
    turns = 1 + cold_bytes // (x.nbytes + y.nbytes + out.nbytes)
    operands = cycle([(x.clone(), y.clone(), out.clone()) for _ in range(turns)])

    def forward() -> None:
        x, y, out = next(operands)
        torch.mm(x, y.t(), out=out)

    def backward() -> None:
        x, y, out = next(operands)
        out.addmm_(x.t(), y)

    return backward if gradient else forward


def copy(num_bytes: int, device: torch.device) -> Call:
    """Reads as many bytes as it writes."""
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.zeros_like(source)  # written once, so that its pages are there
    return lambda: target.copy_(source)


def tiny(device: torch.device) -> Call:
    """`TINY_OPS` operations on next to nothing."""
    x = torch.ones(8, device=device)

    def run() -> None:
        for _ in range(TINY_OPS):
            x.mul_(1.0)

    return run


def norm(sizes: Sizes, dtype: str, device: torch.device) -> Call:
    """Forward and backward."""
    x_TD, dy_TD = _made(dtype, device, *[(sizes.micro_batch * sizes.seq_len, sizes.d_model)] * 2)
    weight_D = torch.ones(sizes.d_model, dtype=DTYPES[dtype], device=device, requires_grad=True)
    leaf_TD = x_TD.requires_grad_()
    return lambda: torch.autograd.grad(rms_norm(leaf_TD, weight_D, 1e-5), (leaf_TD, weight_D), dy_TD)


def activation(sizes: Sizes, dtype: str, device: torch.device) -> Call:
    """SwiGLU, forward and backward."""
    tokens = sizes.micro_batch * sizes.seq_len
    h, da, out = _made(dtype, device, (tokens, 2 * sizes.d_ff), (tokens, sizes.d_ff), (tokens, sizes.d_ff))
    dh = torch.empty_like(h)

    def run() -> None:
        activate(h, Activation("swiglu"), out)
        activate_backward(da, h, Activation("swiglu"), dh, out)

    return run


def residual(sizes: Sizes, dtype: str, device: torch.device) -> Call:
    x_TD, added_TD = _made(dtype, device, *[(sizes.micro_batch * sizes.seq_len, sizes.d_model)] * 2)
    return lambda: x_TD + added_TD


def attention(sizes: Sizes, dtype: str, device: torch.device) -> Call:
    """Forward and backward."""
    batch, length, size = sizes.micro_batch, sizes.seq_len, sizes.d_model // sizes.num_heads
    q, k, v = _made(dtype, device, *((batch, length, n, size) for n in (sizes.num_heads, *[sizes.num_kv_heads] * 2)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    (dout,) = _made(dtype, device, (batch, length, sizes.d_model))
    return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


def experts(sizes: Sizes, dtype: str, rows: int, device: torch.device) -> Call:
    """All experts of a layer with `rows` rows each, forward and backward, gradients of weights where training adds them."""
    number, width, hidden = sizes.num_experts, sizes.d_model, sizes.d_ff
    x_ND, dy_ND, w1, w2 = _made(
        dtype, device, *[(number * rows, width)] * 2, (number, 2 * hidden, width), (number, width, hidden)
    )
    leaf_ND = x_ND.requires_grad_()
    for weight in (w1, w2):
        weight.requires_grad_()
        weight.main_grad = torch.zeros(weight.shape, device=device)  # type: ignore[attr-defined]
    counts = [rows] * number

    def run() -> None:
        out_ND = expert_mlp(leaf_ND, counts, w1, w2, activation=Activation("swiglu"))
        torch.autograd.backward(out_ND, dy_ND, inputs=[leaf_ND, w1, w2])
        leaf_ND.grad = None

    return run


def _made(dtype: str, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device).mul_(0.1).to(DTYPES[dtype]) for shape in shapes]


@dataclass(frozen=True, slots=True)
class TinyStep:
    """`run` makes a step of so many instructions that compute, of so many kernels as the cost model counts them."""

    run: Callable[[], object]
    instructions: int
    kernels: float


def tiny_step(device: torch.device) -> TinyStep:
    config = PretrainConfig()
    model, train = config.model, config.train
    model.d_model, model.d_ff, model.num_heads, model.num_kv_heads, model.num_experts = 16, 8, 2, 2, 2
    model.num_layers, model.vocab_size = 4, VOCAB
    train.global_batch_size = train.micro_batch_size = 1
    train.seq_len = TOKENS
    trainable = Trainable(config, build_mesh(), vocab_size=VOCAB, device=device, wish_to_stop=lambda: False)
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    batch = _batch().to(device)
    buckets = {name: bucket.spec for name, bucket in trainable.buckets.items()}
    work = InstructionWork(config, world=1, vocab_rows=VOCAB, buckets=buckets)
    computed = [instruction for instruction in trainable.program if instruction.kind is Kind.COMPUTE]
    return TinyStep(
        lambda: trainable.step(batch, optimizer.update, directions=optimizer),
        len(computed),
        sum(work(instruction).kernels for instruction in computed),
    )


def _batch() -> Batch:
    tokens_BS = torch.arange(TOKENS).unsqueeze(0)  # and their positions
    true_BS = torch.ones(1, TOKENS, dtype=torch.bool)
    return Batch(tokens_BS, tokens_BS, true_BS, true_BS, tokens_BS, None, torch.zeros(1, dtype=torch.int64))
