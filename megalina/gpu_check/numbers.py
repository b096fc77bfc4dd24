"""Kernels against float64 on the CPU: experts, whole steps of published models, updates, experts on their way to the GPU."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalina.blocks.activation import Activation
from megalina.compose import compose
from megalina.config import OptimConfig
from megalina.gpu_check.found import FAILED, OK, TOLERANCES, Found, held, table
from megalina.mesh import build_mesh
from megalina.model.experts import expert_mlp, use_grouped_gemm
from megalina.readiness import has_apex
from megalina.serve.host_experts import ExpertShape, ExpertStream, share_experts
from megalina.train.optim import FlatOptimizer, FlatTensor
from megalina.verify.on_ranks import record_rank, together
from megalina.verify.recording import SEQUENCES, Layout
from megalina.verify.reference import record
from megalina.verify.shrink import shrink
from megalina.verify.start import random_batches

SMALL = 0.03  # of the largest gradient: errors of smaller ones count as if they were so large, as what they are made of is larger
MODELS = ("gpt2_moe", "mixtral_8x7b", "olmoe_1b_7b", "deepseek_v3", "gpt_oss_20b", "qwen3_30b_a3b", "glm_4_5_air")


def experts(device: str, folder: Path) -> Found:
    """The expert MLP: forward and all gradients, some experts without a row.  On CUDA in bfloat16: grouped products."""
    generator, counts, width, hidden = torch.Generator().manual_seed(0), [0, 37, 5, 0, 86, 128], 64, 96
    rows, grouped = [], {}
    for name in ("gelu", "swiglu"):
        activation = Activation(name)
        shapes = [(sum(counts), width), (6, activation.inputs * hidden, width), (6, width, hidden)]
        biases = [(6, activation.inputs * hidden), (6, width)]
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2 for shape in (*shapes, *biases)]
        dy = torch.randn(shapes[0], generator=generator, dtype=torch.float64)

        def run(where: str, dtype: torch.dtype, activation: Any = activation, values: Any = values, dy: Any = dy) -> list[Any]:
            own = [v.to(where, dtype, copy=True).requires_grad_() for v in values]
            grouped[str(dtype)] = use_grouped_gemm(*own[:3])
            y = expert_mlp(own[0], counts, *own[1:], activation=activation)
            y.backward(dy.to(where, dtype))
            return [y, *(v.grad for v in own)]

        wanted = run("cpu", torch.float64)
        for dtype, tolerance in TOLERANCES.items():
            got = run(device, getattr(torch, dtype))
            rows += [held(f"{dtype}/{name} {i}", a, b, tolerance) for i, (a, b) in enumerate(zip(got, wanted, strict=True))]
    found = table(rows)
    found.numbers["grouped"] = grouped
    found.lines.append(f"grouped products: {', '.join(d for d, yes in grouped.items() if yes) or 'in no type'}")
    return found


def models(device: str, folder: Path) -> Found:
    """A training step of published models, shrunk: loss and gradients of every parameter.  In bfloat16 all experts are chosen,
    since another rounding would choose others."""
    rows = []
    for model in MODELS:
        for dtype in ("float32", "bfloat16"):
            config = shrink(compose([f"model={model}", "train.seed=7"]), 1)
            if dtype == "bfloat16":
                every = config.model.num_experts
                router = replace(config.router, top_k=every, capacity_factor=0.0)
                config = replace(config, router=replace(router, groups_per_token=router.num_groups))
            layout, batches = Layout(1, 1, 1, micro_batch=SEQUENCES), random_batches(config, 1)
            wanted = record(config, batches)
            own = replace(config, train=replace(config.train, dtype=dtype))
            held_here = record_rank(own, layout, batches, build_mesh(), device=torch.device(device))
            got = together(own, layout, batches, [held_here])
            gradients = [e for e in wanted.entries if e.kind == "gradient"]
            least = SMALL * max(e.value.abs().max().item() for e in gradients)
            for e in (wanted.entry(0, "loss", "loss"), *gradients):
                value, tolerance = got.entry(0, e.kind, e.name).value, 10 * TOLERANCES[dtype]
                rows.append(held(f"{model} {dtype}/{e.kind} {e.name}", value, e.value, tolerance, least=least))
    return table(rows)


def optimizers(device: str, folder: Path) -> Found:
    """Five updates of fused AdamW and SGD, float32 against float64; with Apex too, where it is."""
    rows, ran = [], []
    for name in ("adamw", "sgd"):
        for implementation in ("torch", *(["apex"] if has_apex() and device == "cuda" and name == "adamw" else [])):
            results = []
            for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
                generator = torch.Generator().manual_seed(1)
                draw = [torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(6)]
                param, grad = draw[0].to(where, dtype), torch.zeros(1000, device=where, dtype=dtype)
                kind = implementation if where == device and dtype == torch.float32 else "torch"
                optimizer = FlatOptimizer(OptimConfig(name=name, implementation=kind), [FlatTensor(param, grad, True)])
                for step, gradient in enumerate(draw[1:]):
                    grad.copy_(gradient.to(where, dtype))
                    optimizer.step(lr=1e-2 / (step + 1), grad_scale=0.5)
                results.append(param)
            rows.append(held(f"{name} of {implementation}/weights", results[1], results[0], TOLERANCES["float32"]))
            ran.append(optimizer.description)
    found = table(rows)
    found.lines.append(f"ran: {'; '.join(dict.fromkeys(ran))}")
    return found


def fetches(device: str, folder: Path) -> Found:
    """Experts from page-locked memory to the GPU, on a stream of their own, while it computes: each must be whole when it is
    used, and not overwritten before."""
    layers, number, size = 2, 8, 1 << 20
    shape = ExpertShape(("w1",), (torch.Size((size,)),), torch.float32)
    values = [{"w1": torch.arange(number, dtype=torch.float32)[:, None].repeat(1, size) + 100 * i} for i in range(layers)]
    host = share_experts(shape, layers, number, lambda i: values[i], build_mesh(), page_locked=True)
    stream, buffer = ExpertStream(torch.device(device)), torch.empty(size, device=device)
    busy, sums, began_s = torch.randn(2048, 2048, device=device), [], time.perf_counter()
    for layer in range(layers):
        for expert in range(number):
            with stream.after(stream.mark()):
                buffer.copy_(host.expert(layer, expert), non_blocking=True)
            stream.hold(stream.asked())
            busy = busy @ busy / 2048
            sums.append((buffer.min(), buffer.max()))
    stream.synchronize()
    torch.cuda.synchronize()
    took_s = time.perf_counter() - began_s
    got = [(float(low), float(high)) for low, high in sums]
    wanted = [(e + 100.0 * i, e + 100.0 * i) for i in range(layers) for e in range(number)]
    rate = layers * number * shape.num_bytes / took_s / 1e9
    line = f"{layers * number} experts of {shape.num_bytes / 1e6:.0f} MB beside products: {rate:.1f} GB/s"
    return Found(OK if got == wanted else FAILED, why="" if got == wanted else "an expert was not whole when it was used",
                 numbers={"gbyte_s": rate}, lines=[line])  # fmt: skip
