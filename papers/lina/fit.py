"""Seven constants of the paper's stack, fitted on fifteen of its numbers.

Half of Table 1 by a rule: of its six models every other one, so that both sizes of the cluster and all depths are in.  Then the
share of all-to-all in a MoE layer (Figure 2), the experts' backward time (Figure 8b), and the median slowdown of all-to-alls that
meet an all-reduce (Figure 3).  Least squares of logarithms: each number counts alike.  Nothing is drawn at random.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, fields

import numpy as np
from numpy.typing import NDArray

from papers.lina.walk import START, Constants

Floats = NDArray[np.float64]

ROUNDS = 30
STEP = 0.02  # of a logarithm, for differences: steps' times have kinks where two things change places
ENOUGH = 1e-5  # a round that gains less is the last


def fit(
    paper: Mapping[str, float],
    simulated: Callable[[Constants], Mapping[str, float]],
    *,
    start: Constants = START,
    progress: Callable[[int, float], None] = lambda done, error: None,
) -> Constants:
    """Levenberg-Marquardt.  `paper`: by the id of a row, above 0; `simulated`: the same rows."""
    names = list(paper)
    wanted = np.log([paper[name] for name in names])

    def residuals(at: Floats) -> Floats:
        found = simulated(constants_of(at))
        return np.log([found[name] for name in names]) - wanted

    at, damping = np.log(astuple(start)), 1e-2
    off = residuals(at)
    for done in range(ROUNDS):
        progress(done, float(np.abs(off).mean()))
        slopes = np.stack([(residuals(at + step) - off) / STEP for step in STEP * np.eye(len(at))], 1)
        better, damping = _better(at, off, slopes, residuals, damping)
        if better is None:
            break
        gained = float(off @ off - better[1] @ better[1])
        at, off = better
        if gained < ENOUGH:
            break
    return constants_of(at)


def _better(
    at: Floats, off: Floats, slopes: Floats, residuals: Callable[[Floats], Floats], damping: float
) -> tuple[tuple[Floats, Floats] | None, float]:
    """The first step that lowers the sum of squares, shorter and shorter; None where there is none."""
    square = slopes.T @ slopes
    while damping < 1e6:
        step = np.linalg.solve(square + damping * np.eye(len(at)), -slopes.T @ off)
        tried = at + np.clip(step, -1, 1)
        tried_off = residuals(tried)
        if tried_off @ tried_off < off @ off:
            return (tried, tried_off), damping / 3
        damping *= 4
    return None, damping


def constants_of(logarithms: Sequence[float] | Floats) -> Constants:
    names = [f.name for f in fields(Constants)]
    return Constants(**{name: math.exp(value) for name, value in zip(names, logarithms, strict=True)})
