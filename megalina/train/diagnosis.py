"""The diagnosis: what the states of all ranks say about a job that makes no progress."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megalina.collective_log import Entry, first_difference, name_ranks

TOP = 6  # frames of a stack that are shown in the summary
SHOWN = 12  # groups of waiting ranks that are shown in the summary


@dataclass(frozen=True, slots=True)
class State:
    """Where one rank is, as its own doctor sees it."""

    rank: int
    step: int
    tag: str  # the instruction that runs; empty: outside of a step's program
    waits: bool  # the instruction waits for others
    idle_s: float  # for so long it has been there
    asks: bool  # it has found that the ranks' collectives differ
    stack: tuple[str, ...]  # of the main thread, outermost first, as Python formats it
    entries: tuple[Entry, ...]  # its last collectives

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "State":
        values = json.loads(text)
        tupled: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()} for entry in values["entries"]
        ]
        entries = tuple(Entry(**entry) for entry in tupled)
        return State(**values | {"stack": tuple(values["stack"]), "entries": entries})

    @property
    def place(self) -> str:
        return (
            f"in instruction {self.tag} of step {self.step}" if self.tag else f"outside of the instructions, in step {self.step}"
        )

    @property
    def awaited(self) -> Entry | None:
        """The collective that it waits for: the one that the instruction's start submitted."""
        if not self.waits:
            return None
        start = self.tag.replace("<", ">", 1)
        return next((e for e in reversed(self.entries) if e.tag == start and e.step == self.step), None)


def differences(states: Mapping[int, State]) -> str:
    """The first collective that the ranks don't agree on; "" if they agree as far as they went."""
    return first_difference({rank: state.entries for rank, state in states.items()})


def summary(states: Mapping[int, State], absent: Mapping[int, str], timeout_s: float, logs: str) -> str:
    """Who is waited for, who waits for what, and where the collectives differ.

    `states`: of the ranks that answered.  `absent`: what is known of each other rank.  `logs`: the folder of their files."""
    idle_s = min((s.idle_s for s in states.values()), default=timeout_s)
    lines = [f"the job stands still: no rank has made progress for {idle_s:.1f} s (hang.timeout_s={timeout_s:g})"]
    for what in dict.fromkeys(absent.values()):
        lines.append(f"  {name_ranks([r for r, other in absent.items() if other == what])} {what}")
    odd = [s for s in states.values() if not s.waits]
    for state in odd:
        does = "computes" if state.tag else "is"
        lines.append(f"  rank {state.rank} {does} {state.place}, for {state.idle_s:.1f} s:")
        lines += _indented(state.stack[-TOP:])
    waiting = _waiting([s for s in states.values() if s.waits], states)
    lines += waiting[:SHOWN]
    if len(waiting) > SHOWN:
        lines.append(f"  ... and {len(waiting) - SHOWN} more groups of ranks that wait")
    if found := differences(states):
        lines += ["the ranks did not submit the same collectives:", *found.splitlines()]
    elif not odd and not absent and len(half := _half_begun(states)) > 1:
        lines += ["the ranks wait for one another: each has begun what another holds back", *half]
    elif not odd and not absent and all(s.awaited and not _lacking(s.awaited, states) for s in states.values()):
        lines.append("every rank has submitted what the others wait for: look at the network between them")
    lines.append(f"stacks and last collectives of each rank: {logs}/hang_rank_N.txt")
    return "\n".join(lines)


def _waiting(states: Sequence[State], everyone: Mapping[int, State]) -> list[str]:
    groups: dict[tuple, list[State]] = {}
    for state in states:
        entry = state.awaited
        groups.setdefault((state.step, state.tag, entry.axis if entry else "", entry.number if entry else -1), []).append(state)
    lines = []
    for members in groups.values():
        first, ranks = members[0], [s.rank for s in members]
        line = f"  {name_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'} {first.place}, for {first.idle_s:.1f} s"
        if entry := first.awaited:
            line += f": collective {entry.number} on axis {entry.axis} ({entry.kind})"
            lacking = sorted({rank for s in members if s.awaited for rank in _lacking(s.awaited, everyone)})
            if lacking:
                line += f", which {name_ranks(lacking)} {'has' if len(lacking) == 1 else 'have'} not submitted"
        else:
            line += f" for what {'it has' if len(ranks) == 1 else 'they have'} not submitted: a lane holds it back"
        lines.append(line)
    return lines


def _half_begun(states: Mapping[int, State]) -> list[str]:
    """Of each group, the first collective that some of its ranks have submitted and others have not."""
    last: dict[tuple[int, str], int] = {}
    for rank, state in states.items():
        for entry in state.entries:
            last[rank, entry.axis] = max(entry.number, last.get((rank, entry.axis), -1))
    found: dict[tuple[str, tuple[int, ...]], str] = {}
    reached: dict[tuple[str, tuple[int, ...]], int] = {}  # by all ranks of the group
    for entry in (e for state in states.values() for e in state.entries):
        group = entry.axis, entry.ranks
        if group not in reached:
            reached[group] = min(last.get((rank, entry.axis), -1) for rank in entry.ranks if rank in states)
        if entry.number == reached[group] + 1 and group not in found:
            begun = [rank for rank in entry.ranks if last.get((rank, entry.axis), -1) >= entry.number]
            lacking = [rank for rank in entry.ranks if rank in states and rank not in begun]
            what = f"{entry.kind} in instruction {entry.tag} of step {entry.step}"
            submitted = f"{name_ranks(begun)} submitted it, {name_ranks(lacking)} did not"
            found[group] = f"  collective {entry.number} on axis {entry.axis}, {what}: {submitted}"
    return list(found.values())


def _lacking(entry: Entry, states: Mapping[int, State]) -> list[int]:
    """The ranks of a collective that haven't submitted it, as far as is known."""
    out = []
    for rank in entry.ranks:
        state = states.get(rank)
        if state is not None and max((e.number for e in state.entries if e.axis == entry.axis), default=-1) < entry.number:
            out.append(rank)
    return out


def report(state: State, other_threads: Mapping[str, Sequence[str]]) -> str:
    """All that one rank knows, for its own file."""
    does = "waits" if state.waits else "computes" if state.tag else "is"
    lines = [f"rank {state.rank} {does} {state.place}, for {state.idle_s:.1f} s", "", "main thread, innermost call last:"]
    lines += _indented(state.stack)
    for name, stack in other_threads.items():
        lines += ["", f"thread {name}:", *_indented(stack)]
    lines += ["", "last collectives:"]
    lines += [f"  {e.number} on axis {e.axis}: {e.describe()}" for e in state.entries]
    return "\n".join(lines) + "\n"


def _indented(stack: Sequence[str]) -> list[str]:
    return [f"    {line}" for frame in stack for line in frame.rstrip().splitlines()]
