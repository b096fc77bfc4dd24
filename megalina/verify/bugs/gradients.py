"""Bugs in gradients, in how they are summed over ranks, in their norm and in the update of the weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalina.blocks.dispatch import ROWS, dispatch_of
from megalina.config import PretrainConfig
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction, Kind, Op, parts_of
from megalina.verify.bugs.change import Function, after, around, expert_buckets, seeds, with_program


def experts_scaled_by_edp(trainable: Trainable, config: PretrainConfig) -> None:
    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.name != "measure":
            return function

        def scaled(*a: Any) -> Any:
            for name in expert_buckets(trainable):
                trainable.buckets[name].grad.mul_(trainable.mesh.edp.size)
            return function(*a)

        return scaled

    around(trainable, of)


def divided_by_dp_twice(trainable: Trainable, config: PretrainConfig) -> None:
    seeds(trainable, lambda loss, part: 1 / trainable.mesh.dp.size)


def router_detached(trainable: Trainable, config: PretrainConfig) -> None:
    def of(instruction: Instruction, function: Function) -> Function:
        if dispatch_of(config).kind != ROWS:
            return (
                (lambda rows, weight, order: function(rows, weight.detach(), order)) if instruction.name == "pack" else function
            )
        return (
            (lambda h, back, weight, *rest: function(h, back, weight.detach(), *rest)) if instruction.name == "mix" else function
        )

    around(trainable, of)


def bucket_reduced_early(trainable: Trainable, config: PretrainConfig) -> None:
    """The last layer's dense bucket goes out before the last micro-batch's backward."""
    name = f"dense.{config.model.num_layers - 1}"
    moved = tuple(s for s in trainable.program if s.op is Op.GRADS and s.name == name)
    rest = [s for s in trainable.program if s not in moved]
    last = str(trainable.micro_batches - 1)
    place = next(i for i, s in enumerate(rest) if s.phase == "B" and s.part == last and s.op is not Op.GRADS)
    with_program(trainable, (*rest[:place], *moved, *rest[place:]))


def groups_exchanged(trainable: Trainable, config: PretrainConfig) -> None:
    names = expert_buckets(trainable)
    changed = (replace(s, axis="ep") if s.op is Op.GRADS and s.name in names else s for s in trainable.program)
    with_program(trainable, tuple(changed))


def nodes_not_summed(trainable: Trainable, config: PretrainConfig) -> None:
    """Dense gradients are summed over the ranks of each node, and not over nodes."""
    mesh, inside = trainable.mesh, "inside a node"
    assert mesh.dp.nodes is not None
    trainable.mesh = replace(mesh, along_stages={**mesh.along_stages, inside: mesh.dp.nodes.inside})
    dense = (replace(s, axis=inside) if s.op is Op.GRADS and s.axis == "dp" else s for s in trainable.program)
    with_program(trainable, tuple(dense))


def expert_gradient_not_reduced(trainable: Trainable, config: PretrainConfig) -> None:
    names = expert_buckets(trainable)
    with_program(trainable, tuple(s for s in trainable.program if not (s.op is Op.GRADS and s.name in names)))


def last_micro_batch_dropped(trainable: Trainable, config: PretrainConfig) -> None:
    seeds(trainable, lambda loss, part: float(part != str(trainable.micro_batches - 1)))


def micro_batch_counted_twice(trainable: Trainable, config: PretrainConfig) -> None:
    seeds(trainable, lambda loss, part: 2.0 if part == "0" else 1.0)


def z_loss_without_gradient(trainable: Trainable, config: PretrainConfig) -> None:
    seeds(trainable, lambda loss, part: float(loss != "z"))


def balance_loss_without_gradient(trainable: Trainable, config: PretrainConfig) -> None:
    seeds(trainable, lambda loss, part: float(loss not in ("aux", "global_aux")))


def deferred_weights_lost(trainable: Trainable, config: PretrainConfig) -> None:
    """What backward of attention leaves for later is never added."""
    _with_deferred(trainable, lambda add, *rows: None)


def deferred_weights_twice(trainable: Trainable, config: PretrainConfig) -> None:
    """What backward of attention leaves for later is added a second time."""

    def twice(add: Callable[..., None], *rows: Any) -> None:
        add(*rows)
        add(*rows)

    _with_deferred(trainable, twice)


def _with_deferred(trainable: Trainable, run: Callable[..., None]) -> None:
    """`run(add, *rows)` in place of each call that adds a gradient of attention's weights."""

    def of(instruction: Instruction, function: Function) -> Function:
        if instruction.phase != "W" or not instruction.name.startswith("attention"):
            return function
        of_parts = [
            trainable.instruction_functions.late[instruction.name, instruction.layer, part] for part in parts_of(instruction)
        ]

        def changed() -> None:
            for late in of_parts:
                late[:] = [replace(gradient, add=partial(run, gradient.add)) for gradient in late]
            function()

        return changed

    around(trainable, of)


def sequence_norm_not_summed(trainable: Trainable, config: PretrainConfig) -> None:
    """The norms between the parts that tp cuts are reduced apart, over the ranks that hold the same tp coordinate."""
    out: list[Instruction] = []
    done: set[tuple[str, Kind]] = set()
    for instruction in trainable.program:
        if instruction.op is not Op.GRADS or not instruction.name.startswith(("copied.", "ends")):
            out.append(instruction)
            continue
        if (instruction.name, instruction.kind) in done:
            continue  # a further piece
        done.add((instruction.name, instruction.kind))
        bucket = trainable.buckets[instruction.name]
        starts = [m.start for m in bucket.members]
        for m, start, stop in zip(bucket.members, starts, [*starts[1:], bucket.numel], strict=True):
            is_norm = any(n in m.name for n in ("attention_norm", "mlp_norm", "final_norm"))
            wire = (f"{instruction.name}'>{start}",)
            to = {"reads": wire} if instruction.kind is Kind.WAIT else {"writes": wire}
            out.append(replace(instruction, axis="dp" if is_norm else instruction.axis, piece=(start, stop), **to))  # type: ignore[arg-type]
    with_program(trainable, tuple(out))


def norm_without_experts(trainable: Trainable, config: PretrainConfig) -> None:
    def without(out: Tensor, *_: Any) -> Tensor:
        out[len(trainable.gpt.blocks.losses)] -= torch.stack(
            [trainable.buckets[name].square_sum() for name in expert_buckets(trainable)]
        ).sum()
        return out

    after(trainable, "measure", without)


def norm_per_rank(trainable: Trainable, config: PretrainConfig) -> None:
    def own(result: StepResult, *_: Any) -> StepResult:
        squares = sum(b.grad[s.start : s.stop].square().sum().item() for b in trainable.buckets.values() for s in b.slices)
        norm, most = squares**0.5, config.optim.clip_norm
        return replace(result, grad_norm=norm, grad_scale=min(1.0, most / (norm + 1e-6)) if most > 0 else 1.0)

    after(trainable, "verdict", own)


def stale_zero_shard(trainable: Trainable, config: PretrainConfig) -> None:
    with_program(trainable, tuple(s for s in trainable.program if s.op is not Op.PARAMS))


def decay_on_norms(trainable: Trainable, config: PretrainConfig) -> None:
    for bucket in trainable.buckets.values():
        bucket.slices = [replace(s, decay=True) for s in bucket.slices]
