"""Hypotheses about whole sequences of the global batch that a layout never computes."""

from collections.abc import Iterator

from megalina.verify.evidence import Cause, Evidence


def last_micro_batch_missing(evidence: Evidence) -> Iterator[Cause]:
    """The only holes in the first value that differs are the last micro-batch of every rank."""
    first, layout = evidence.first, evidence.layout
    if first is None or layout.micro_batches == 1:
        return
    missing = {i for i, value in enumerate(first.got.value) if value.isnan().all()}
    last = {i for rank in range(layout.world) for i in layout.sequences(rank)[-1]}
    if missing == last:
        yield Cause(
            "last_micro_batch_dropped",
            f"{first.name}: sequences {', '.join(map(str, sorted(last)))}, the last of {layout.micro_batches} micro-batches "
            "of each rank, are never computed",
        )
