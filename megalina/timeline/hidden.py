"""What a step hides: which ideas its order follows, as shares of the time that traffic and weights' gradients take.

By these, not by the order of instructions, one can tell what a list that nobody wrote resembles: orders of the same step differ
little, what lies under what differs much.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from megalina.timeline.contention import class_of
from megalina.timeline.recorder import COMPUTE, SEND, Event
from megalina.timeline.spans import Span, length_s, shared_s, union


@dataclass(frozen=True, slots=True)
class Hidden:
    """Shares of one step on one rank, from 0 to 1; 0 of what isn't there."""

    tokens_forward: float  # of the wire's time with tokens in forward: the device computes (Lina's pipelining, flow's parts)
    tokens_backward: float  # the same in backward
    weights_under_tokens: float  # of the time of weights' gradients by themselves: tokens are on the wire (Lancet, zero bubble)
    gradients_beside_tokens: float  # of the wire's time with gradients and parameters: tokens are, too (Lina's priority has none)
    gradients_in_tail: float  # after the last exchange of tokens in backward (serial)
    gradients_in_forward: float  # before backward begins (ZeRO-1's gathers under the next forward)

    def distance(self, other: "Hidden") -> float:
        """Mean difference of the shares; 0: alike."""
        return sum(abs(getattr(self, f.name) - getattr(other, f.name)) for f in fields(self)) / len(fields(self))

    def __str__(self) -> str:
        return (
            f"tokens under compute {self.tokens_forward:.0%} / {self.tokens_backward:.0%}, weights' gradients under tokens "
            f"{self.weights_under_tokens:.0%}; gradients beside tokens {self.gradients_beside_tokens:.0%}, in the tail "
            f"{self.gradients_in_tail:.0%}, in forward {self.gradients_in_forward:.0%}"
        )


def hidden(events: Sequence[Event]) -> Hidden:
    """Of the events of one step on one rank."""
    computing, weights = (_spans(e for e in events if e.kind == COMPUTE and e.phase in phases) for phases in ("FBWU", "W"))
    sends = [e for e in events if e.kind == SEND]
    forward, backward = (_spans(e for e in sends if class_of(e) == "a2a" and e.phase == phase) for phase in "FB")
    gradients = _spans(e for e in sends if class_of(e) in ("grads", "params"))
    tokens = union([*forward, *backward])
    last_s = max((end_s for _, end_s in backward), default=0.0)
    first_s = min((e.start_s for e in events if e.phase == "B"), default=0.0)
    return Hidden(
        _share(forward, computing),
        _share(backward, computing),
        _share(weights, tokens),
        _share(gradients, tokens),
        _share(gradients, [(last_s, float("inf"))]),
        _share(gradients, [(float("-inf"), first_s)]),
    )


def _spans(events: Iterable[Event]) -> list[Span]:
    return union((e.start_s, e.end_s) for e in events)


def _share(of: Sequence[Span], under: Sequence[Span]) -> float:
    whole_s = length_s(of)
    return shared_s(of, under) / whole_s if whole_s else 0.0
