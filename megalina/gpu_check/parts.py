"""The parts of the check, in their order: what takes little time and says much comes first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megalina.gpu_check import commands, numbers, wire
from megalina.gpu_check.commands import pretrain, py
from megalina.gpu_check.found import Found


@dataclass(frozen=True, slots=True)
class Part:
    """`look(device, folder)` runs in a process of this tool; without one `command(device, folder)` is started, and
    `read(what it printed, folder)` says what it found.  `gpu_only`: says nothing on a CPU."""

    name: str
    about: str
    limit_s: float
    look: Callable[[str, Path], Found] | None = None
    command: Callable[[str, Path], Sequence[str]] | None = None
    read: Callable[[str, Path], Found] = commands.printed
    gpu_only: bool = False


def _speed(name: str, words: Sequence[str]) -> Part:
    command = lambda device, folder: pretrain(device, folder / name, *words, *commands.SPEED)  # noqa: E731
    return Part(name, "speed and memory, bfloat16", 90, command=command, read=partial(commands.read_run, name), gpu_only=True)


PARTS = (
    Part("doctor", "what this machine has", 60, command=lambda device, folder: py("tools/doctor.py", "--ranks", "1")),
    Part("experts", "expert products, grouped in bfloat16 on CUDA", 60, look=numbers.experts),
    Part("optimizers", "fused updates", 60, look=numbers.optimizers),
    Part("models", "a step of seven families in float32 and bfloat16", 90, look=numbers.models),
    Part("fetches", "experts from page-locked memory, beside products", 45, look=numbers.fetches, gpu_only=True),
    Part("collectives", "two ranks on one device by gloo; NCCL with one, on two priorities", 60, look=wire.collectives),
    Part("star", "the star test in float64, one rank", 150, command=commands.star, read=commands.read_star),
    Part(
        "train", "twenty steps on real text, with checkpoints", 90, command=commands.train, read=partial(commands.read_run, "run")
    ),
    Part("resume", "its checkpoint goes on on the CPU", 60, command=commands.resume, read=partial(commands.read_run, "resumed")),
    Part("generate", "text from its checkpoint", 45, command=commands.generate, read=commands.read_text),
    Part("evaluate", "its checkpoint served", 90, command=commands.evaluate, read=commands.read_eval),
    Part("measure", "the cluster's file of this machine", 90, command=commands.measure),
    Part("forecasts", "steps forecast from it, and measured", 60, look=commands.forecasts),
    Part("host", "what a host spends on an instruction", 60, command=commands.host, read=commands.read_host),
    _speed("gpt2_moe", commands.GPT2),
    _speed("olmoe", commands.OLMOE),
)
