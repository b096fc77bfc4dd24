"""Evidence: two recordings laid side by side, and what a hypothesis about their difference may ask of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.parameter import Parameter
from megalina.layout import rows, rows_of_stages
from megalina.model.gpt import GPT
from megalina.model.init import spec_of
from megalina.verify.recording import NOBODY, Entry, Recording
from megalina.verify.reference import follow_load, model_of

MATCH = 1e-9  # a hypothesis explains a tensor if it gives it to this share of the tensor's largest element
FLOOR = 1e-3  # ... or of this share of the largest of its kind, where that is more: sums that cancel leave crumbs
NOTHING = 1e-12  # crumbs: at most this share of the largest of its kind


@dataclass(frozen=True, slots=True)
class Cause:
    """What may be wrong, for programs and for people.  `name` "unknown": something that can be said, but not why it is so."""

    name: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Pair:
    """The same quantity of both recordings."""

    want: Entry
    got: Entry
    largest: float  # of the kind in this step
    copies_agree: bool = True  # every rank has what the whole says
    equal: bool = False  # the whole is right, and so is what each rank has of it

    @property
    def name(self) -> str:
        return self.want.name

    @property
    def on_ranks(self) -> list[Tensor]:
        """What each rank has, NaN where it has nothing."""
        return self.got.by_rank if self.got.by_rank is not None else [self.got.value]

    @property
    def floor(self) -> float:
        return FLOOR * self.largest

    @property
    def is_nothing(self) -> bool:
        """Zero up to rounding."""
        return bool(self.want.value.abs().max() <= NOTHING * self.largest)


class Evidence:
    """`reference`: one process; `recording`: a layout.  All pairs are in the order of computation."""

    def __init__(self, reference: Recording, recording: Recording):
        assert recording.layout is not None
        self.reference, self.recording, self.layout = reference, recording, recording.layout
        self.config = recording.config
        largest: dict[tuple[int, str], float] = {}
        for e in reference.entries:
            largest[e.step, e.kind] = max(largest.get((e.step, e.kind), 0.0), e.value.abs().max().item())
        self.pairs = [_pair(e, recording.entry(e.step, e.kind, e.name), largest[e.step, e.kind]) for e in reference.entries]
        self.first = next((p for p in self.pairs if not p.equal), None)

    @property
    def step(self) -> int:
        """Of the first difference."""
        assert self.first is not None
        return self.first.want.step

    @property
    def batch(self) -> Batch:
        """The global batch of the step of the first difference."""
        return self.reference.batches[max(self.step, 0)]

    def all(self, kind: str) -> list[Pair]:
        """The pairs of a kind in the step of the first difference."""
        return [p for p in self.pairs if p.want.step == self.step and p.want.kind == kind]

    def wrong(self, kind: str) -> list[Pair]:
        return [p for p in self.all(kind) if not p.equal]

    def pair(self, kind: str, name: str) -> Pair:
        """Of the step of the first difference."""
        return next(p for p in self.all(kind) if p.name == name)

    @cached_property
    def model(self) -> GPT:
        """The whole model as it is before the step of the first difference, by the reference's weights."""
        gpt = model_of(self.reference.config)
        before = self.step - 1
        with torch.no_grad():
            for name, p in gpt.named_parameters():
                p.copy_(self.reference.entry(before, "weight", name).value.reshape(p.shape))
        for layer in gpt.moe_layers:
            for step in range(self.step):
                follow_load(gpt.layers[layer].router, self.reference.entry(step, "routing", f"layers.{layer}.load").value)
        return gpt

    @cached_property
    def specs(self) -> dict[str, Parameter]:
        return {name: spec_of(p) for name, p in self.model.named_parameters()}

    def is_expert(self, parameter: str) -> bool:
        return "ep" in self.specs[parameter].sharded

    def is_cut(self, parameter: str) -> bool:
        """By tensor parallelism."""
        return "tp" in self.specs[parameter].sharded

    def is_copied(self, parameter: str) -> bool:
        return not self.is_expert(parameter) and not self.is_cut(parameter)

    @property
    def shape(self) -> dict[str, int]:
        return {"edp": self.layout.edp, "ep": self.layout.ep, "cp": self.layout.cp, "tp": self.layout.tp}

    @cached_property
    def rows(self) -> dict[str, list[list[int]]]:
        """The rows of ranks along each axis of the mesh."""
        return rows_of_stages(self.shape, self.layout.pp) if self.layout.pp > 1 else rows(self.shape)

    def place(self, rank: int) -> tuple[int, int, int]:
        """(edp, ep, tp) of a rank, in its stage of a pipeline."""
        layout = self.layout
        rank %= layout.world // layout.pp
        reader = rank // (layout.cp * layout.tp)
        return reader // layout.ep, reader % layout.ep, rank % layout.tp

    def sizes(self) -> dict[str, int]:
        """Group sizes by which a number may be too large or too small, those of more than one alone."""
        layout = self.layout
        copies = "edp x tp" if layout.cp == 1 else "edp x cp x tp"
        named = {"edp": layout.edp, "ep": layout.ep, "cp": layout.cp, "tp": layout.tp, "dp": layout.dp, copies: layout.copies}
        named |= {"pp": layout.pp} if layout.pp > 1 else {}
        named |= {"the number of ranks": layout.world, "the number of micro-batches": layout.micro_batches}
        return {name: size for name, size in named.items() if size > 1}


Hypothesis = Callable[[Evidence], Iterator[Cause]]


def close(want: Tensor, got: Tensor, floor: float = 0.0, tolerance: float = MATCH) -> bool:
    """Whether two tensors are equal up to rounding, a share of the largest element (at least `floor`); integers exactly.
    A number that isn't finite equals nothing."""
    if want.shape != got.shape:
        return False
    if not want.is_floating_point():
        return bool((want == got).all())
    if not want.numel():
        return True
    most = max(want.abs().max().item(), floor)
    return bool(((want - got).abs() <= tolerance * most).all())


def held(value: Tensor) -> Tensor:
    """Where a rank has something: bool."""
    return ~value.isnan() if value.is_floating_point() else value != NOBODY


def agrees(want: Tensor, value: Tensor, floor: float = 0.0) -> bool:
    """Whether what a rank has of a tensor is that tensor's."""
    here = held(value)
    return close(want.where(here, 0), value.where(here, 0), floor)


def total(values: list[Tensor]) -> Tensor:
    """The sum of what several ranks have: NaN where one has nothing."""
    return torch.stack(values).sum(0)


def merged(values: list[Tensor], floor: float) -> Tensor | None:
    """What several ranks have together: NaN where none has anything, None where two contradict each other."""
    out = values[0].clone()
    for value in values[1:]:
        both, here = held(out) & held(value), held(value)
        if not close(out.where(both, 0.0), value.where(both, 0.0), floor):
            return None
        out = value.where(here, out)
    return out


def counted(pairs: list[Pair]) -> str:
    """For people: `1 tensor`, `6 tensors, layers.1.experts.w1 first`."""
    names = [p.name for p in pairs]
    return f"1 tensor, {names[0]}" if len(names) == 1 else f"{len(names)} tensors, {names[0]} first"


def _pair(want: Entry, got: Entry, largest: float) -> Pair:
    pair = Pair(want, got, largest)
    agree = all(agrees(got.value, v, pair.floor) for v in got.by_rank or ())
    return replace(pair, copies_agree=agree, equal=agree and close(want.value, got.value, pair.floor))
