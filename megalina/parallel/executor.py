"""The executor: runs a program with torch.distributed.  It decides nothing: each instruction runs when its turn comes; what its
instruction says may be held back is held by the links.

Forward instructions run on detached leaves and keep a gradient edge, which keeps no output alive (with `recompute` only the
leaves).  Backward instructions call `torch.autograd.backward` and hand on the leaves' gradients.  Exchanges have no autograd.
A value dies at its last reader.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalina.collective_log import CollectiveLog
from megalina.comm import exchange
from megalina.comm.by_node import Relay, start_gather_by_node, start_scatter_by_node, start_sum_by_node
from megalina.comm.device_clock import DeviceClock
from megalina.comm.exchange import Pending
from megalina.comm.links import Later, Links, Sent
from megalina.comm.rows_by_node import start_rows_back, start_rows_outward
from megalina.mesh import Axis, Mesh
from megalina.model.dispatcher import Counts
from megalina.model.permute import RowOrder
from megalina.parallel.buckets import Bucket, side_by_side
from megalina.parallel.emulated_device import EmulatedDevice
from megalina.parallel.token_bytes import TokenBytes
from megalina.step.program import Instruction, Kind, Op, Program, has_gradient
from megalina.timeline.recorder import COMPUTE, WAIT, Recorder

Functions = Callable[[Instruction], Callable[..., Any]]
Watch = Callable[[Instruction], AbstractContextManager[object]]
Kept = tuple[list[Any], list[GradientEdge | None] | None]  # leaves; edges of the outputs, None with recompute


class Executor:
    """One program, ready to run.  `log`: where collectives are noted, and the program's place; None: one of its own.
    `device`: an emulated one, or None; `token_bytes`: counts what is sent; `stream`: memory for what a stage of a pipeline gets
    of another."""

    def __init__(
        self,
        program: Program,
        functions: Functions,
        mesh: Mesh,
        buckets: Mapping[str, Bucket],
        *,
        log: CollectiveLog | None = None,
        device: EmulatedDevice | None = None,
        token_bytes: TokenBytes | None = None,
        stream: Callable[[], Tensor] | None = None,
    ):
        self._stream = stream
        self.program, self.mesh, self.buckets, self.device = program, mesh, buckets, device
        self._token_bytes = token_bytes
        self._log = log or CollectiveLog(mesh.world.rank)
        self._recorder: Recorder | None = None
        cuda = any(b.grad.is_cuda for b in buckets.values())
        self._marks = DeviceClock() if cuda and device is None else None
        self._links = Links(self._log, cuda=cuda, marks=self._marks, urgent=device is not None)
        self._relay = Relay(urgent=device is not None)
        self._links.watched = any(s.yields_to or s.credit for s in program)
        self.watch: Watch | None = None  # is entered around each instruction, on the host
        last = {v: i for i, s in enumerate(program) for v in s.reads}
        self._late_sizes = set() if cuda else {s.key for s in program if _may_be_late(program, s)}
        self._values: dict[str, Any] = {}
        self._kept: dict[tuple[str, int, str], Kept] = {}
        self._autograd = any(s.phase == "B" for s in program)
        self._lines: list[tuple[Callable[[], None], Instruction, list[str], str, bool]] = []
        for i, instruction in enumerate(program):
            dead = [v for v in instruction.reads if last[v] == i]
            run = self._bound(instruction, functions)
            self._lines.append((run, instruction, dead, instruction.tag, instruction.kind is Kind.WAIT))

    def run(self, given: Mapping[str, Any], *, keep: Collection[str] = (), record: Recorder | None = None) -> dict[str, Any]:
        """Run the program once; returns the values that nobody read, and those in `keep`, which outlive their readers.

        `record` gets an event for each instruction; None: none are made."""
        self._values, self._kept, self._recorder = dict(given), {}, record
        position, device = self._log.position, self.device
        marks = self._marks if record is not None else None
        if marks is not None:
            marks.begin()
        watch = self.watch
        clock: Callable[[], Any] = marks.now if marks is not None else time.perf_counter  # CUDA: when its stream gets there
        for run, instruction, dead, tag, waits in self._lines:
            position.enter(tag, waits)
            began_s = clock()
            try:
                if watch is None:
                    run()
                else:
                    with watch(instruction):
                        run()
            except Exception as error:
                error.add_note(f"in instruction {tag}")
                raise
            for value in dead:
                if value not in keep:
                    self._values.pop(value, None)
            if instruction.kind is Kind.COMPUTE:
                ended_s = clock()
                start_s, end_s = device.ran(instruction, began_s, ended_s) if device is not None else (began_s, ended_s)
                if record is not None:
                    record.add(COMPUTE, instruction, 0, began_s, start_s, end_s, 0.0)
            elif waits and record is not None:
                ended_s = clock()
                exposed_s = None if device is None else max(0.0, ended_s - max(began_s, device.free_s))
                record.add(WAIT, instruction, 0, began_s, began_s, ended_s, exposed_s)
        if device is not None:
            device.synchronize()
        position.leave()
        assert not self._kept, "forward instructions without backward"
        out, self._values, self._recorder = self._values, {}, None
        return out

    def close(self) -> None:
        """End the threads of the lanes, and those of exchanges by node."""
        self._links.close()
        self._relay.close()

    def _bound(self, instruction: Instruction, functions: Functions) -> Callable[[], None]:
        """What runs the instruction: all that follows from it alone is found once, not step after step."""
        match instruction.kind, instruction.phase:
            case Kind.START, _:
                return partial(self._start, instruction, self.mesh.axis(instruction.axis))
            case Kind.WAIT, _:
                return partial(self._wait, instruction)
            case _, "F":
                return self._forward(instruction, functions(instruction))
            case _, "B":
                return self._backward(instruction, functions(instruction))
            case _, "W":
                return torch.no_grad()(functions(instruction))
            case _:
                return partial(self._without_autograd, instruction.reads, instruction.writes, functions(instruction))

    # compute
    def _forward(self, instruction: Instruction, function: Callable[..., Any]) -> Callable[[], None]:
        reads = [(name, has_gradient(name)) for name in instruction.reads]
        writes = [(name, has_gradient(name)) for name in instruction.writes]
        graph = self._autograd and not instruction.recompute
        keeps, key = self._autograd and any(has for _, has in writes), instruction.key

        def run() -> None:
            leaves = [self._leaf(name, has) for name, has in reads]
            outputs = _outputs(function, leaves, graph)
            values, edges = self._values, list[GradientEdge | None]()
            for (name, has), out in zip(writes, outputs, strict=True):
                if has:
                    values[name] = out.detach()
                    if keeps and graph:
                        edges.append(get_gradient_edge(out) if out.requires_grad else None)
                else:
                    values[name] = out
            if keeps:
                self._kept[key] = leaves, edges if graph else None

        return run

    def _leaf(self, name: str, has_a_gradient: bool) -> Any:
        value = self._values[name]
        if has_a_gradient and isinstance(value, Tensor):
            return value.detach().requires_grad_(self._autograd)
        return value.get() if isinstance(value, Later) else value

    def _backward(self, instruction: Instruction, function: Callable[..., Any]) -> Callable[[], None]:
        reads, writes = ([v for v in names if has_gradient(v)] for names in (instruction.reads, instruction.writes))
        key = instruction.key

        def run() -> None:
            leaves, edges = self._kept.pop(key)
            values = self._values
            if edges is None:
                outputs = _outputs(function, leaves, True)
                edges = [get_gradient_edge(o) if o.requires_grad else None for o in outputs[: len(reads)]]
            pairs = [(e, values[v]) for e, v in zip(edges, reads, strict=True) if e is not None]
            if pairs:
                torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
            with_gradient = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad)
            for name, leaf in zip(writes, with_gradient, strict=True):
                gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                leaf.grad = None
                values[name] = values[name] + gradient if name in values else gradient

        return run

    def _without_autograd(self, reads: Sequence[str], writes: Sequence[str], function: Callable[..., Any]) -> None:
        outputs = _outputs(function, [self._values.get(v) for v in reads], False)
        self._values.update(zip(writes, outputs, strict=True))

    # exchanges
    def _start(self, instruction: Instruction, axis: Axis) -> None:
        self._values[instruction.writes[0]] = self._send(instruction, axis)

    def _send(self, instruction: Instruction, axis: Axis) -> Any:
        assert instruction.op is not None
        send = partial(
            self._links.send, instruction, at_s=self.device.free_s if self.device is not None else 0.0, recorder=self._recorder
        )
        if instruction.op in (Op.GRADS, Op.PARAMS):
            return send(lambda: self._start_piece(instruction, axis))
        if instruction.op is Op.RECV:
            assert self._stream is not None
            name, out = instruction.writes[0], self._stream()
            return send(lambda: exchange.start_receive(out, name, axis, self._log))
        value = self._values[instruction.reads[0]]
        if instruction.op is Op.SEND:
            name = instruction.writes[0]
            return send(lambda: exchange.start_send(value, name, axis, self._log))
        if instruction.op is Op.COUNTS:
            assert isinstance(value, RowOrder)
            even = [value.count_E.numel() // axis.size] * axis.size
            return (
                value.count_E,
                value.new_way,
                send(lambda: exchange.start_all_to_all(value.count_E, even, even, axis, self._log)),
            )
        if instruction.op is Op.TOKENS:
            counts: Counts | Later = self._values[instruction.reads[1]]

            def start_tokens() -> Pending:
                known: Counts = counts.get() if isinstance(counts, Later) else counts
                splits = known.sizes(instruction.chunk).splits(outward=instruction.outward)
                if axis.nodes is not None:
                    return self._start_by_node(value, splits, known, instruction, axis)
                if self._token_bytes is not None and axis.size > 1:
                    self._token_bytes.add(axis, splits[0], value.element_size() * value.shape[1])
                return exchange.start_all_to_all(value, *splits, axis, self._log)

            return send(start_tokens, after=counts if isinstance(counts, Later) else None)
        if self._token_bytes is not None and instruction.carries_tokens and axis.size > 1:
            rows = len(value) if instruction.op is Op.GATHER else len(value) // axis.size
            self._token_bytes.add(axis, [rows] * axis.size, value.element_size() * value.shape[1])
        if instruction.op is Op.GATHER and instruction.phase == "U":  # ranks own matrices of other sizes
            return send(lambda: exchange.start_uneven_gather(value, [len(value)] * axis.size, axis, self._log))
        start = {
            Op.GATHER: exchange.start_gather,
            Op.SCATTER: exchange.start_scatter,
            Op.SUM: exchange.start_sum,
            Op.MAX: exchange.start_max,
            Op.EVEN: exchange.start_even,
        }[instruction.op]
        return send(lambda: start(value, axis, self._log))

    def _start_by_node(
        self, x: Tensor, splits: tuple[list[int], list[int]], counts: Counts, instruction: Instruction, axis: Axis
    ) -> Pending:
        way = counts.way(instruction.chunk, anew=instruction.outward and instruction.phase == "F")
        start = start_rows_outward if instruction.outward else start_rows_back
        count = self._token_bytes.add if self._token_bytes is not None else None
        return start(x, *splits, way, axis, self._log, self._relay, count)

    def _start_piece(self, instruction: Instruction, axis: Axis) -> Pending:
        if len(instruction.buckets) > 1:
            return self._sum_in_place(side_by_side([self.buckets[name] for name in instruction.buckets]), axis)
        bucket = self.buckets[instruction.name]
        flat = bucket.grad if instruction.op is Op.GRADS else bucket.param
        piece, own = flat[slice(*instruction.piece)], flat[bucket.own(instruction.piece)]
        if not bucket.sharded:
            return self._sum_in_place(piece, axis)
        sizes = [stop - start for start, stop in bucket.parts(instruction.piece)]
        if axis.nodes is not None:
            by_node = start_gather_by_node if instruction.op is Op.PARAMS else start_scatter_by_node
            return by_node(piece, own, sizes, axis, self._log, self._relay)
        if bucket.layout.shares:
            if instruction.op is Op.PARAMS:
                return exchange.start_uneven_gather_in_place(piece, own, sizes, axis, self._log)
            return exchange.start_uneven_scatter_in_place(piece, own, sizes, axis, self._log)
        if instruction.op is Op.PARAMS:
            return exchange.start_gather_in_place(piece, own, axis, self._log)
        return exchange.start_scatter_in_place(piece, own, axis, self._log)

    def _sum_in_place(self, flat: Tensor, axis: Axis) -> Pending:
        if axis.nodes is not None:
            return start_sum_by_node(flat, axis, self._log, self._relay)
        return exchange.start_sum_in_place(flat, axis, self._log)

    def _wait(self, instruction: Instruction) -> None:
        sent = self._values[instruction.reads[0]]
        if instruction.op is Op.SEND:
            sent.wait()
            return
        name = instruction.writes[0]
        if instruction.op is Op.COUNTS:
            count_E, new_way, counted = sent
            ranks = self.mesh.axis(instruction.axis).size

            def counts() -> Counts:
                return Counts(count_E, counted.wait(), ranks, new_way)

            self._values[name] = Later(counts) if instruction.key in self._late_sizes else counts()
            return
        assert isinstance(sent, Sent)
        arrived = sent.wait()
        if instruction.op in (Op.GRADS, Op.PARAMS):
            arrived = None  # it is in the bucket
        elif instruction.phase == "B" and name in self._values:
            arrived = self._values[name] + arrived
        self._values.update(dict.fromkeys(instruction.writes, arrived))


def _may_be_late(program: Program, counts: Instruction) -> bool:
    """Whether something is computed before the tokens arrive whose sizes a counts exchange tells: then a lane waits for them,
    not the program."""
    if counts.kind is not Kind.WAIT or counts.op is not Op.COUNTS:
        return False
    after = program[program.index(counts) + 1 :]
    until = next((i for i, s in enumerate(after) if s.kind is Kind.WAIT and s.layer == counts.layer and s.name == "dispatch"), 0)
    return any(s.kind is Kind.COMPUTE for s in after[:until])


def _outputs(function: Callable[..., Any], arguments: list[Any], graph: bool) -> tuple[Any, ...]:
    with torch.set_grad_enabled(graph):
        out = function(*arguments)
    if out is None:
        return (None,)
    return out if isinstance(out, tuple) else (out,)
