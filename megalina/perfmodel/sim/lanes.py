"""Lanes: what a rank has started and what it holds back, and the rules by which it decides; a circle of waiting, in words."""

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megalina.step.program import Instruction, Op

Node = TypeVar("Node", bound=Hashable)


@dataclass(slots=True, eq=False)
class Sent:
    """A START of one rank."""

    instruction: Instruction
    asked_s: float
    needs: list["Sent"]  # split sizes that are still on their way
    ready: bool = False  # the device has it
    started_s: float | None = None
    done: bool = False

    @property
    def can_leave(self) -> bool:
        return self.ready and all(n.done for n in self.needs)


@dataclass(slots=True, eq=False)
class Here:
    """What a rank sees of its own lanes: all that a rule may look at."""

    under_way: dict[str, list[Sent]] = field(default_factory=dict)  # lane -> started, not done
    queued: dict[str, deque[Sent]] = field(default_factory=dict)  # lane -> not started

    def sent(self, ops: Collection[Op]) -> Sent | None:
        """Something of these on the wire, or started and waiting for other ranks."""
        return next((s for lane in self.under_way.values() for s in lane if s.instruction.traffic in ops), None)

    def asked(self, ops: Collection[Op]) -> Sent | None:
        """Something of these that the device has, at the head of its lane."""
        return next(
            (lane[0] for lane in self.queued.values() if lane and lane[0].instruction.traffic in ops and lane[0].ready), None
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """How a rank decides what starts when, by what it sees."""

    lane: Callable[[Instruction], str]  # what is in one lane starts in the program's order
    held: Callable[[Instruction, Here], Sent | None]  # what holds back the head of a lane, which could leave


def _held(instruction: Instruction, here: Here) -> Sent | None:
    if instruction.credit and len(lane := here.under_way.get(instruction.axis, [])) >= instruction.credit:
        return lane[0]
    return here.sent(instruction.yields_to) or here.asked(instruction.yields_to) if instruction.yields_to else None


# Only what an instruction itself names holds it back: tokens never wait for gradients.
OURS = Rule(lambda instruction: instruction.axis, _held)


def circle_of(begin: Iterable[Node], waits_for: Callable[[Node], Sequence[tuple[Node, str]]]) -> list[str]:
    """The reasons along the first circle that is reached from `begin`, one for each edge; [] if there is none.

    `waits_for`: what a node waits for, each with the reason."""
    over: set[Node] = set()
    for first in begin:
        path: dict[Node, str] = {}  # in order; the reason why each waits for the next
        edges = [(first, iter(waits_for(first)))]
        while edges:
            node, left = edges[-1]
            edge = next(left, None)
            if edge is None:
                over.add(node)
                path.pop(node, None)
                edges.pop()
                continue
            after, path[node] = edge
            if after in path:
                return _from(path, after)
            if after not in over:
                edges.append((after, iter(waits_for(after))))
    return []


def _from(path: Mapping[Node, str], node: Node) -> list[str]:
    nodes = list(path)
    return [path[n] for n in nodes[nodes.index(node) :]]
