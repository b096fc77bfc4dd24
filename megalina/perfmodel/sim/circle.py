"""A circle of waiting, said for people: who waits for whom, and why, until it comes round."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


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
