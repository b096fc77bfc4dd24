"""Precedence: which instructions of a list must come before which, whatever its order.

WAITs need no decision: each comes right before the first instruction that reads what has arrived.  So an order is one of acts,
which compute or start something, and the WAITs follow from it.
"""

from collections import defaultdict
from collections.abc import Sequence

from megalina.step.program import Kind, Program, reads_of, writes_of


class Precedence:
    """Of a list that `check` accepts.  Instructions are numbered by their places in it."""

    def __init__(self, program: Program):
        self.program = program
        writers: dict[str, list[int]] = defaultdict(list)
        for i, instruction in enumerate(program):
            for value in writes_of(instruction):
                writers[value].append(i)
        self.needs = [tuple(sorted({j for v in reads_of(s) for j in writers.get(v, ())})) for s in program]
        self.is_wait = [s.kind is Kind.WAIT for s in program]
        self.acts = [i for i, wait in enumerate(self.is_wait) if not wait]
        through: list[frozenset[int]] = []  # acts that are needed, through WAITs
        self.waits: list[tuple[int, ...]] = []  # WAITs that must have been there
        for needs in self.needs:  # the list is legal, so what is needed has a smaller number
            acts, waits = set[int](), dict[int, None]()
            for j in needs:
                if self.is_wait[j]:
                    acts |= through[j]
                    waits |= dict.fromkeys((*self.waits[j], j))
                else:
                    acts.add(j)
            through.append(frozenset(acts))
            self.waits.append(tuple(waits))
        self.before = [through[i] if not self.is_wait[i] else frozenset() for i in range(len(program))]
        after: list[set[int]] = [set() for _ in program]
        for i in self.acts:
            for j in self.before[i]:
                after[j].add(i)
        self.after = [frozenset(s) for s in after]

    def listed(self, acts: Sequence[int]) -> list[int]:
        """All instructions in the order that acts give; those WAITs that nobody reads come last."""
        out: list[int] = []
        there = bytearray(len(self.program))
        for act in acts:
            for wait in self.waits[act]:
                if not there[wait]:
                    there[wait] = 1
                    out.append(wait)
            out.append(act)
        out += [i for i, wait in enumerate(self.is_wait) if wait and not there[i]]
        return out

    def legal(self, acts: Sequence[int]) -> bool:
        """Whether every act comes after all that it needs."""
        place = {act: i for i, act in enumerate(acts)}
        return all(place[j] < place[i] for i in acts for j in self.before[i])
