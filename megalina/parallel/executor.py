"""The executor: runs a program with torch.distributed.  It decides nothing: each stage runs when its turn comes.

Forward stages run on detached leaves and keep a gradient edge, which keeps no output alive (with `recompute` only the
leaves).  Backward stages call `torch.autograd.backward` and hand on the leaves' gradients.  Exchanges have no autograd.
A value dies at its last reader.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalina.comm import exchange
from megalina.comm.exchange import Pending
from megalina.mesh import Axis, Mesh
from megalina.model.permute import RowOrder
from megalina.parallel.buckets import Bucket
from megalina.parallel.dispatcher import Sizes, sizes_of
from megalina.step.program import Kind, Op, Program, Stage, has_gradient

Functions = Callable[[Stage], Callable[..., Any]]
Kept = tuple[list[Any], list[GradientEdge | None] | None]  # leaves; edges of the outputs, None with recompute


class Executor:
    """One program, ready to run."""

    def __init__(self, program: Program, functions: Functions, mesh: Mesh, buckets: Mapping[str, Bucket]):
        self.program, self.mesh, self.buckets = program, mesh, buckets
        last = {v: i for i, s in enumerate(program) for v in s.reads}
        self._lines: list[tuple[Callable[[Stage, Any], None], Stage, Any, list[str], str, bool]] = []
        for i, stage in enumerate(program):
            run = getattr(
                self, f"_{stage.kind.name.lower()}_{stage.phase}" if stage.kind is Kind.COMPUTE else f"_{stage.kind.name.lower()}"
            )
            function = functions(stage) if stage.kind is Kind.COMPUTE else None
            dead = [v for v in stage.reads if last[v] == i]
            self._lines.append((run, stage, function, dead, stage.tag, stage.kind is Kind.WAIT))
        self._values: dict[str, Any] = {}
        self._kept: dict[tuple[str, int, str], Kept] = {}
        self._autograd = any(s.phase == "B" for s in program)

    def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Run the program once; returns the values that nobody read."""
        self._values, self._kept = dict(given), {}
        position = self.mesh.log.position
        for run, stage, function, dead, tag, waits in self._lines:
            position.enter(tag, waits)
            try:
                run(stage, function)
            except Exception as error:
                error.add_note(f"in stage {tag}")
                raise
            for value in dead:
                self._values.pop(value, None)
        position.leave()
        assert not self._kept, "forward stages without backward"
        out, self._values = self._values, {}
        return out

    # compute
    def _compute_F(self, stage: Stage, function: Callable[..., Any]) -> None:
        leaves = [self._leaf(v) for v in stage.reads]
        graph = self._autograd and not stage.recompute
        outputs = _outputs(function, leaves, graph)
        for name, out in zip(stage.writes, outputs, strict=True):
            self._values[name] = out.detach() if has_gradient(name) else out
        if self._autograd and any(map(has_gradient, stage.writes)):
            self._kept[stage.key] = leaves, _edges(stage, outputs) if graph else None

    def _leaf(self, name: str) -> Any:
        value = self._values[name]
        return value.detach().requires_grad_(self._autograd) if has_gradient(name) else value

    def _compute_B(self, stage: Stage, function: Callable[..., Any]) -> None:
        leaves, edges = self._kept.pop(stage.key)
        if edges is None:
            outputs = _outputs(function, leaves, True)
            edges = [get_gradient_edge(o) if o.requires_grad else None for o in outputs[: sum(map(has_gradient, stage.reads))]]
        gradients = [self._values[v] for v in stage.reads if has_gradient(v)]
        pairs = [(e, g) for e, g in zip(edges, gradients, strict=True) if e is not None]
        if pairs:
            torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
        with_gradient = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad)
        for name, leaf in zip(stage.writes, with_gradient, strict=True):
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = None
            self._values[name] = self._values[name] + gradient if name in self._values else gradient

    def _compute_U(self, stage: Stage, function: Callable[..., Any]) -> None:
        outputs = _outputs(function, [self._values.get(v) for v in stage.reads], False)
        self._values.update(zip(stage.writes, outputs, strict=True))

    # exchanges
    def _start(self, stage: Stage, _: None) -> None:
        assert stage.op is not None
        axis: Axis = getattr(self.mesh, stage.axis)
        if stage.op in (Op.GRADS, Op.PARAMS):
            self._values[stage.writes[0]] = self._start_piece(stage, self.buckets[stage.name], axis)
            return
        value = self._values[stage.reads[0]]
        if stage.op is Op.COUNTS:
            assert isinstance(value, RowOrder)
            even = [value.count_E.numel() // axis.size] * axis.size
            pending = exchange.start_all_to_all(value.count_E, even, even, axis)
            self._values[stage.writes[0]] = value.count_E, pending
            return
        if stage.op is Op.TOKENS:
            sizes: Sizes = self._values[stage.reads[1]]
            send, receive = sizes.splits(outward=(stage.name == "dispatch") == (stage.phase == "F"))
            pending = exchange.start_all_to_all(value, send, receive, axis)
        else:
            start = {Op.GATHER: exchange.start_gather, Op.SCATTER: exchange.start_scatter, Op.SUM: exchange.start_sum}[stage.op]
            pending = start(value, axis)
        self._values[stage.writes[0]] = pending

    def _start_piece(self, stage: Stage, bucket: Bucket, axis: Axis) -> Pending:
        flat = bucket.grad if stage.op is Op.GRADS else bucket.param
        piece, own = flat[slice(*stage.piece)], flat[bucket.own(stage.piece)]
        if stage.op is Op.PARAMS:
            return exchange.start_gather_in_place(piece, own, axis)
        return exchange.start_scatter_in_place(piece, own, axis) if bucket.sharded else exchange.start_sum_in_place(piece, axis)

    def _wait(self, stage: Stage, _: None) -> None:
        sent = self._values[stage.reads[0]]
        if stage.op is Op.COUNTS:
            count_E, pending = sent
            self._values[stage.writes[0]] = sizes_of(count_E, pending.wait(), getattr(self.mesh, stage.axis).size)
            return
        arrived = sent.wait()
        name = stage.writes[0]
        if stage.op in (Op.GRADS, Op.PARAMS):
            arrived = None  # it is in the bucket
        elif stage.phase == "B" and name in self._values:
            arrived = self._values[name] + arrived
        self._values[name] = arrived


def _outputs(function: Callable[..., Any], arguments: list[Any], graph: bool) -> tuple[Any, ...]:
    with torch.set_grad_enabled(graph):
        out = function(*arguments)
    if out is None:
        return (None,)
    return out if isinstance(out, tuple) else (out,)


def _edges(stage: Stage, outputs: tuple[Any, ...]) -> list[GradientEdge | None]:
    return [
        get_gradient_edge(o) if o.requires_grad else None for n, o in zip(stage.writes, outputs, strict=True) if has_gradient(n)
    ]
