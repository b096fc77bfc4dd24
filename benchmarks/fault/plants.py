"""Plants of faults: the public command with ranks in which, from one step on, something is wrong.  The product has no plants.

    python benchmarks/fault/plants.py command PLANT OVERRIDE ...     pretrain_gpt_moe.py; its ranks have the plant
    python benchmarks/fault/plants.py rank PLANT CONFIG [RESUME]     one such rank, which the command starts

Launcher, worker and trainer are the product's own; a plant wraps one function of theirs on one rank.  When its fault begins it
writes the time to RUN/fault_s.  If a step raises, RUN/weights.RANK says whether that step has changed a weight.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEP = 3  # in which a fault begins
MARK = "fault_s"
FOREVER_S = 600


@dataclass(frozen=True)
class Place:
    """The rank that a plant may be in."""

    rank: int
    run: Path

    def mark(self) -> None:
        """The fault begins, for the first time or not."""
        if not (self.run / MARK).exists():
            part = self.run / f"{MARK}.{self.rank}"
            part.write_text(repr(time.time()))
            part.rename(self.run / MARK)


def before_experts(place: Place, on: int, fault: Callable[[Any], None]) -> None:
    """On rank `on` call `fault(instruction functions)` once, in the first experts' instruction of step STEP."""
    from megalina.parallel.functions import InstructionFunctions
    from megalina.step.program import Instruction

    of, left = InstructionFunctions.__call__, [fault]

    def faulty(self: InstructionFunctions, instruction: Instruction) -> Callable[..., Any]:
        function = of(self, instruction)
        if instruction.name != "experts" or instruction.phase != "F":
            return function

        def run(*arguments: Any) -> Any:
            if place.rank == on and self.log.position.step == STEP and left:
                begin = left.pop()
                place.mark()
                begin(self)
            return function(*arguments)

        return run

    InstructionFunctions.__call__ = faulty  # type: ignore[method-assign]


def stall(place: Place) -> None:
    before_experts(place, 2, lambda _: time.sleep(FOREVER_S))


def loop(place: Place) -> None:
    def endless(_: Any) -> None:
        while True:
            pass

    before_experts(place, 0, endless)


def raise_error(place: Place) -> None:
    def fail(_: Any) -> None:
        raise KeyError("the lost key")

    before_experts(place, 1, fail)


def extra_collective(place: Place) -> None:
    """Rank 1 waits for a sum that nobody else has asked for."""

    def one_more(functions: Any) -> None:
        import torch

        from megalina.comm import exchange

        exchange.start_sum(torch.zeros(4), functions.mesh.world, functions.log).wait()

    before_experts(place, 1, one_more)


def stall_data(place: Place) -> None:
    """Reading the sequences of a step never ends on rank 1."""
    from megalina.data.source import PackedSamples

    read, calls = PackedSamples.batch, []

    def batch(self: PackedSamples, first: int, count: int, stride: int = 1) -> Any:
        calls.append(first)
        if place.rank == 1 and len(calls) == STEP:
            place.mark()
            time.sleep(FOREVER_S)
        return read(self, first, count, stride)

    PackedSamples.batch = batch  # type: ignore[method-assign]


def before_step(number: int, act: Callable[[Any], None]) -> None:
    """`act(trainable)` before step `number`."""
    from megalina.parallel.trainable import Trainable

    run_step = Trainable.step

    def step(self: Trainable, *arguments: Any, **named: Any) -> Any:
        if self.log.position.step == number:
            act(self)
        return run_step(self, *arguments, **named)

    Trainable.step = step  # type: ignore[method-assign]


def swap_buckets(place: Place) -> None:
    """Rank 1 sends the gradients of two layers, which are of one size, in the other order from now on."""
    from megalina.step.program import Kind, Op

    def swap(trainable: Any) -> None:
        program = list(trainable.program)
        sends = [i for i, s in enumerate(program) if s.op is Op.GRADS and s.kind is Kind.START]
        a, b = (i for i in sends if program[i].name in ("dense.0", "dense.1"))
        assert trainable.buckets["dense.0"].spec.numel == trainable.buckets["dense.1"].spec.numel
        program[a], program[b] = program[b], program[a]
        trainable.run_with(tuple(program), trainable.functions)
        place.mark()

    if place.rank == 1:
        before_step(STEP, swap)


def bad_weight(place: Place) -> None:
    """A weight of an expert of layer 1 on rank 1 is no number, until the next step begins."""
    kept: list[float] = []

    def weight(trainable: Any) -> Any:
        return trainable.gpt.layers[1].experts.w2.data.view(-1)[:1]

    def spoil(trainable: Any) -> None:
        kept.append(weight(trainable).item())
        weight(trainable).fill_(float("nan"))
        place.mark()

    def mend(trainable: Any) -> None:
        assert weight(trainable).isnan().item(), "the skipped step has changed the weight"
        weight(trainable).fill_(kept[0])

    if place.rank == 1:
        before_step(STEP, spoil)
        before_step(STEP + 1, mend)


def another_size(place: Place) -> None:
    """The sum of the numbers of tokens is twice as long on rank 1."""
    import torch

    from megalina.comm import exchange

    start_sum = exchange.start_sum

    def start(x: torch.Tensor, axis: Any, log: Any) -> Any:
        position = log.position
        if position.step == STEP and position.tag.startswith("U:divisor>"):
            place.mark()
            x = torch.cat([x, x])
        return start_sum(x, axis, log)

    if place.rank == 1:  # the other's call site is the product's
        exchange.start_sum = start


def wrong_splits(place: Place) -> None:
    """Rank 1 expects three rows more from rank 0 than it sends."""
    from megalina.comm import exchange

    all_to_all = exchange.start_all_to_all

    def start(x: Any, send: list[int], receive: list[int], axis: Any, log: Any) -> Any:
        position = log.position
        if position.step == STEP and position.tag == "F:dispatch>.0.0":
            place.mark()
            receive = [receive[0] + 3, *receive[1:]]
        return all_to_all(x, send, receive, axis, log)

    if place.rank == 1:
        exchange.start_all_to_all = start


def stall_send(place: Place) -> None:
    """The first stage of a pipeline does not come back from sending the stream of a micro-batch."""
    from megalina.comm import exchange

    send = exchange.start_send

    def start(x: Any, name: str, axis: Any, log: Any) -> Any:
        if place.rank == 0 and log.position.step == STEP and log.position.tag == "F:stream>.1.2":
            place.mark()
            time.sleep(FOREVER_S)
        return send(x, name, axis, log)

    exchange.start_send = start


def full_disk(place: Place) -> None:
    """Rank 1's first write of the second save is refused."""
    from megalina.checkpoint import tensor_files
    from megalina.checkpoint.checkpoints import Checkpoints

    save, write, saves = Checkpoints.save, tensor_files._HashedFile.write, []

    def counted(self: Checkpoints, *arguments: Any) -> None:
        saves.append(1)
        save(self, *arguments)

    def refused(self: Any, data: Any) -> int:
        if len(saves) == 2:
            place.mark()
            with self._files.noting():  # as an error of the file below it would be
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    if place.rank == 1:
        Checkpoints.save = counted  # type: ignore[assignment, method-assign]
        tensor_files._HashedFile.write = refused  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[Place], None]] = {
    plant.__name__: plant
    for plant in (
        *(swap_buckets, another_size, extra_collective, wrong_splits, stall, loop, stall_data, raise_error),
        *(stall_send, full_disk, bad_weight),
    )
}


def watch_weights(place: Place) -> None:
    """Leave word of whether a step that raises has changed a weight."""
    import torch

    from megalina.parallel.trainable import Trainable

    run_step = Trainable.step

    def step(self: Trainable, *arguments: Any, **named: Any) -> Any:
        before = [p.detach().clone() for p in self.gpt.parameters()]
        try:
            return run_step(self, *arguments, **named)
        except Exception:
            same = all(torch.equal(a, b) for a, b in zip(before, self.gpt.parameters(), strict=True))
            (place.run / f"weights.{place.rank}").write_text("same" if same else "changed")
            raise

    Trainable.step = step  # type: ignore[method-assign]


def main(role: str, plant: str, *arguments: str) -> int:
    sys.path.insert(0, str(ROOT))
    if role == "command":
        from megalina.cli import train

        train.WORKER = (sys.executable, __file__, "rank", plant)  # type: ignore[assignment]
        return train.main(arguments)
    from megalina import worker

    place = Place(int(os.environ["RANK"]), Path(arguments[0]).parent)
    PLANTS[plant](place)
    watch_weights(place)
    return worker.main(list(arguments), worker._train)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
