"""Spans: stretches of time (start_s, end_s), and how much of some lies under others."""

from collections.abc import Iterable, Sequence

Span = tuple[float, float]


def union(spans: Iterable[Span]) -> list[Span]:
    """The same stretches in order, without overlaps; empty ones are left out."""
    out: list[Span] = []
    for start_s, end_s in sorted(span for span in spans if span[1] > span[0]):
        if out and start_s <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end_s)
        else:
            out.append((start_s, end_s))
    return out


def length_s(merged: Iterable[Span]) -> float:
    return sum(end_s - start_s for start_s, end_s in merged)


def shared_s(a: Sequence[Span], b: Sequence[Span]) -> float:
    """How long both last, of two results of `union`."""
    total_s, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total_s += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total_s


def overlaps(spans: Sequence[Span]) -> list[tuple[int, int, float]]:
    """Each two that last at the same time: their places, the earlier one's first, and for how long."""
    out, open_spans = list[tuple[int, int, float]](), list[int]()
    for i in sorted(range(len(spans)), key=lambda i: spans[i]):
        start_s, end_s = spans[i]
        open_spans = [j for j in open_spans if spans[j][1] > start_s]
        out += [(j, i, min(end_s, spans[j][1]) - start_s) for j in open_spans if end_s > start_s]
        open_spans.append(i)
    return out


def rows(spans: Sequence[Span]) -> list[int]:
    """In which row each is drawn, from 0, so that those of one row don't overlap."""
    out, ends_s = [0] * len(spans), list[float]()
    for i in sorted(range(len(spans)), key=lambda i: spans[i]):
        row = next((r for r, end_s in enumerate(ends_s) if end_s <= spans[i][0]), len(ends_s))
        ends_s[row : row + 1] = [spans[i][1]]
        out[i] = row
    return out
