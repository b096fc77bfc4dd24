"""Hypotheses about weights that are the first to differ: losses, gradients and the norm of the step are right."""

from collections.abc import Iterator

from torch import Tensor

from megalina.blocks.optimizers import optimizer_of
from megalina.verify.evidence import MATCH, Cause, Evidence, counted, held

DIGITS = 1e-6  # of an update's error: Adam divides by roots of squares, so an update has fewer digits than a gradient


def old_weights(evidence: Evidence) -> Iterator[Cause]:
    """Every number that differs is still the one before the update."""
    wrong = evidence.wrong("weight")
    if evidence.layout.zero != 1 or not wrong:
        return
    stale = total = 0
    for pair in wrong:
        old = evidence.reference.entry(evidence.step - 1, "weight", pair.name).value
        for value in pair.on_ranks:
            here = held(value)
            is_new, is_old = _near(pair.want.value, value), _near(old, value)
            if not (is_new | is_old)[here].all():
                return
            stale += int((is_old & ~is_new & here).sum())
            total += int(here.sum())
    yield Cause(
        "stale_zero_shard",
        f"after the update {stale} of {total} weights that ranks hold ({counted(wrong)}) are still the old ones: ranks use other "
        "ranks' ZeRO-1 shards of before the update; the all-gather of updated weights is missing or comes too early",
    )


def decay_on_everything(evidence: Evidence) -> Iterator[Cause]:
    """What has no weight decay is smaller by learning rate x weight decay."""
    wrong, optim = evidence.wrong("weight"), evidence.config.optim
    share = optim.lr * optim.weight_decay
    if not wrong or not share or any(evidence.specs[p.name].decay for p in wrong):
        return
    scaled = optimizer_of(optim).clips_heads  # by QK-clip, after the update
    for pair in (p for p in wrong if not (scaled and evidence.specs[p.name].clip)):
        old = evidence.reference.entry(evidence.step - 1, "weight", pair.name).value
        for value in pair.on_ranks:
            here = held(value)
            error = ((value - pair.want.value) + share * old)[here].abs()
            if not (error <= DIGITS * share * old.abs().max()).all():
                return
    yield Cause(
        "decay_on_norms",
        f"norms, biases and learned positions ({counted(wrong)}) shrink by learning rate x weight decay = {share:g}: weight "
        "decay applies to what should have none",
    )


def _near(want: Tensor, value: Tensor) -> Tensor:
    """bool, by element."""
    return (want - value).abs() <= MATCH * want.abs().max()
