"""Hypotheses about weights' gradients that backward left to instructions of their own."""

from collections.abc import Iterator

from megalina.verify.evidence import Cause, Evidence, counted
from megalina.verify.hypotheses.scales import common_factor

HAPPENED = {0: ("deferred_weights_lost", "never added"), 2: ("deferred_weights_twice", "added twice")}


def not_once(evidence: Evidence) -> Iterator[Cause]:
    """Gradients of some matrices and their biases are nothing or twice what they should be, and those of norms, which no
    backward leaves out, are right."""
    wrong = evidence.wrong("gradient")
    if evidence.config.strategy.deferred_weights == "none" or not wrong:
        return
    if any("norm" in p.name for p in wrong) or (factor := common_factor(wrong)) is None:
        return
    if abs(factor - round(factor)) < 1e-8 and round(factor) in HAPPENED:
        name, happened = HAPPENED[round(factor)]
        yield Cause(name, f"gradients of {counted(wrong)} are {happened}: backward left them to an instruction of its own")
