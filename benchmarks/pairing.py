"""Which list hides what: in virtual time, a model of equal layers and one link, from little on the wire to more than is computed.

    python benchmarks/pairing.py --json FILE                (some ten seconds; nothing is started, nothing is measured)
    python benchmarks/pairing.py --layers 12 --micro-batches 8

A device computes in the order of the list, and tokens go over one link in the order in which they are sent.  A layer's attention
takes 1 forward and its experts 1.4, twice that backward, half of which are weights' gradients; each of its four all-to-alls takes
as long as the wanted share of that says.  No gradients, no latency, no kernel that takes its time whatever its size.  Numbers are
how many times as fast as `eager` a step is; the bound is what the device alone, or the link alone, would need.

`late weights` is Lancet's placement of weights' gradients, `flow 2` and `flow 4` cut each micro-batch into parts, `2 at once`
lets whole micro-batches walk together, as strategy=flow does where a step has enough of them, `pair` lets the backward of one go
with the forward of the next, and the last columns do so with deferred weights, with each side in two parts, and with both.
Beside them stands what a sketch of two lanes gave, in which lists were written by hand (`SKETCH`).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megalina.arguments import Parser, new_file, whole
from megalina.blocks.model import plain_shape
from megalina.perfmodel.sim.network import one_level
from megalina.perfmodel.sim.sizes import Sizes
from megalina.perfmodel.sim.virtual import simulate_alike
from megalina.step.forward import plain
from megalina.step.passes import finish, place_gradients, step
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Instruction, Kind, Program, check
from megalina.step.strategy import Setting, forward_pass, given, training_step

LAYERS, MICRO_BATCHES = 6, (2, 4, 16)
FORWARD_S = {"attention": 1.0, "experts": 1.4}
ALL_TO_ALL_S = (0.3, 0.6, 1.0, 1.5, 2.0)  # the link is busy for 0.17, 0.33, 0.56, 0.83 and 1.11 of the device's time
RANKS = 2  # of equal ranks one is walked, however many there are
LISTS = ("late weights", "flow 2", "flow 4", "2 at once", "pair", "pair, late", "pair 2", "pair 2, late")
SKETCH: Mapping[str, Mapping[tuple[float, int], float]] = {  # list -> (ratio, micro-batches) -> times as fast as serial
    "late weights": {(0.17, 4): 1.07, (0.33, 4): 1.13, (0.83, 4): 1.20, (0.83, 16): 1.20, (1.11, 16): 1.17}
    | {(0.56, m): 1.20 for m in MICRO_BATCHES},
    "flow 2": {(0.17, 4): 1.16, (0.33, 4): 1.32, (0.83, 4): 1.65, (0.83, 16): 1.65, (1.11, 16): 1.68}
    | {(0.56, m): 1.52 for m in MICRO_BATCHES},
    "flow 4": {(0.17, 4): 1.16, (0.33, 4): 1.32, (0.83, 4): 1.67, (0.83, 16): 1.67, (1.11, 16): 1.70}
    | {(0.56, m): 1.54 for m in MICRO_BATCHES},
    "pair": {(0.17, 4): 1.12, (0.33, 4): 1.24, (0.56, 2): 1.23, (0.56, 4): 1.37, (0.56, 16): 1.51}
    | {(0.83, 4): 1.45, (0.83, 16): 1.64, (1.11, 16): 1.65},
    "pair, late": {(0.17, 4): 1.12, (0.33, 4): 1.24, (0.56, 2): 1.23, (0.56, 4): 1.37, (0.56, 16): 1.51}
    | {(0.83, 4): 1.52, (0.83, 16): 1.74, (1.11, 16): 1.76},
}


@dataclass(frozen=True, slots=True)
class Row:
    ratio: float  # of what the link is busy for to what the device is
    micro_batches: int
    eager_s: float
    times_as_fast: dict[str, float]  # as eager, by list
    bound: float


@dataclass(frozen=True, slots=True)
class Place:
    """A model on one link."""

    layers: int
    micro_batches: int
    all_to_all_s: float  # of a whole micro-batch

    @property
    def setting(self) -> Setting:
        """With the times by which weights' gradients are placed."""
        shape = plain_shape(moe=(True,) * self.layers)
        names = dict.fromkeys(name for s in plain(shape) for name in s.uses)
        buckets = {name: BucketSpec(64, "dp") for name in names}
        setting = Setting(shape, buckets, micro_batches=self.micro_batches)
        every = training_step("lancet", setting.under(Plan("lancet", deferred_weights="all")))
        times_us = {s.timed_as: 1e6 * (self.seconds(s) or self.on_link_s(s)) for s in every}
        return setting.under(Plan(times_us=tuple(sorted(times_us.items()))))

    def seconds(self, instruction: Instruction) -> float:
        """Of a device."""
        full_s = FORWARD_S.get(instruction.name, 0.0) * instruction.share / instruction.chunk[1]
        if instruction.kind is not Kind.COMPUTE:
            return 0.0
        return full_s * (2.0 if instruction.phase == "B" and not instruction.late else 1.0)

    def on_link_s(self, instruction: Instruction) -> float:
        sent = instruction.kind is Kind.START and instruction.carries_tokens
        return self.all_to_all_s * instruction.share / instruction.chunk[1] if sent else 0.0

    def step_s(self, program: Program) -> float:
        """In virtual time."""
        sizes = Sizes(lambda s: RANKS / (RANKS - 1) * self.on_link_s(s))  # what stays at home takes no time
        return simulate_alike(
            program,
            ranks=RANKS,
            ranks_of=lambda axis, rank: tuple(range(RANKS)),
            seconds=self.seconds,
            network=one_level(1.0, 0.0),
            sizes=sizes,
        ).step_s


def programs_of(setting: Setting) -> dict[str, Program]:
    """By the name of the list; "eager" too."""

    def planned(strategy: str, **numbers: Any) -> Program:
        return training_step(strategy, setting.under(replace(setting.plan, strategy=strategy, **numbers)))

    return {
        "eager": planned("eager"),
        "late weights": planned("lancet", deferred_weights="all"),
        "flow 2": flow_of_cut(setting, 2),
        "flow 4": flow_of_cut(setting, 4),
        "2 at once": planned("flow", parts=2),
        "pair": planned("pair"),
        "pair, late": planned("pair", deferred_weights="all"),
        "pair 2": planned("pair", parts=2),
        "pair 2, late": planned("pair", parts=2, deferred_weights="all"),
    }


def flow_of_cut(setting: Setting, parts: int) -> Program:
    """Each micro-batch in parts that walk in turn, however many micro-batches there are."""
    walked = step(forward_pass(setting), setting.micro_batches * parts, together=parts, share=1 / parts)
    program = finish(place_gradients(walked, setting.buckets), setting.buckets)
    check(program, given(program, replace(setting, micro_batches=setting.micro_batches * parts)), setting.buckets)
    return program


def row_of(layers: int, micro_batches: int, all_to_all_s: float) -> Row:
    place = Place(layers, micro_batches, all_to_all_s)
    programs = programs_of(place.setting)
    took_s = {name: place.step_s(program) for name, program in programs.items()}
    eager = programs["eager"]
    device_s, link_s = sum(map(place.seconds, eager)), sum(map(place.on_link_s, eager))
    ratios = {name: took_s["eager"] / took_s[name] for name in LISTS}
    return Row(link_s / device_s, micro_batches, took_s["eager"], ratios, took_s["eager"] / max(device_s, link_s))


def table(rows: Sequence[Row]) -> str:
    """In Markdown, with the sketch's figure behind each one that it has."""
    head = ("wire / compute", "micro-batches", *LISTS, "bound")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        cells = [f"{row.ratio:.2f}", str(row.micro_batches)]
        for name in LISTS:
            known = SKETCH.get(name, {}).get((round(row.ratio, 2), row.micro_batches))
            cells.append(f"{row.times_as_fast[name]:.2f}" + (f" ({known:.2f})" if known is not None else ""))
        lines.append(" | ".join([*cells, f"{row.bound:.2f}"]))
    return "\n".join(f"| {line} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    numbers: Sequence[int] = args.micro_batches or MICRO_BATCHES
    rows = [row_of(args.layers, micro_batches, sent_s) for sent_s in ALL_TO_ALL_S for micro_batches in numbers]
    print(table(rows))
    if args.layers == LAYERS:
        print("in brackets: a sketch of two lanes, whose lists were written by hand")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Walks lists of a small model in virtual time, with a link that takes from a sixth of what the device takes "
        "to more than that, and prints how many times as fast as eager each is.  Nothing is started and nothing is measured."
    )
    parser.add_argument("--layers", type=whole(1, 64), default=LAYERS, metavar="N", help=f"of the model (default: {LAYERS})")
    parser.add_argument(
        "--micro-batches", type=whole(2, 256), action="append", metavar="M", help="may be given several times (default: 2, 4, 16)"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="all numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
