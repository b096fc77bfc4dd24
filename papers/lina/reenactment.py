"""The paper, re-enacted: constants fitted, every row simulated."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megalina.config import InferConfig, PretrainConfig
from papers.lina import overheads, worked_example
from papers.lina.fit import fit
from papers.lina.inference import SERVED, Inference
from papers.lina.models import Model
from papers.lina.report import Found
from papers.lina.routing import Routed, made, of_trace
from papers.lina.row import Row
from papers.lina.speedups import Speedups
from papers.lina.walk import START, Bed, Constants
from papers.lina.what_if import exposed, packed, placed

Progress = Callable[[str], None]


def reenact(
    base: PretrainConfig,
    *,
    lina: InferConfig,
    static: InferConfig,
    traces: Sequence[Path] = (),
    progress: Progress = lambda what: None,
) -> Found:
    """`base`: on conf/cluster/lina_testbed.yaml, with one of conf/model/lina_*.yaml; `lina`, `static`: conf/infer's modes;
    `traces`: of TXL's stand-in and of BERT-Large's, none: routing is made.

    ValueError for another cluster than the paper's, and for traces that don't do."""
    if base.cluster.name != "lina_testbed":
        raise ValueError(f"cluster={base.cluster.name} is not the paper's: take cluster=lina_testbed")
    if len(traces) not in (0, len(SERVED)):
        raise ValueError(f"{len(traces)} traces: give two, for TXL and for BERT-Large, or none")
    bed = Bed(base)
    routed = _routed(traces)
    for model in SERVED if traces else ():  # bad files stop before anything is fitted
        routed(model, 16)
    constants = fitted(bed, progress)
    inference = Inference(bed, constants, lina=lina, static=static, routed=routed, progress=progress)
    rows: list[Row] = []
    for name, some in (
        ("overheads", overheads.table_1(bed, constants)),
        ("figures", overheads.figures(bed, constants)),
        ("shares", overheads.shares(bed, constants)),
        ("the worked example", worked_example.rows()),
        ("speed-ups", Speedups(bed, constants).rows()),
        ("inference", inference.rows()),
    ):
        progress(name)
        rows += some
    progress("what if")
    return Found(
        constants,
        rows,
        list(exposed(bed, constants)),
        packed(bed, constants),
        placed(inference),
        inference.routed(SERVED[0], 16).note,
    )


def fitted(bed: Bed, progress: Progress = lambda what: None) -> Constants:
    """On the rows of `overheads` that say they are fitted."""

    def rows(constants: Constants) -> Iterator[Row]:
        for some in (overheads.table_1(bed, constants), overheads.figures(bed, constants)):
            yield from (row for row in some if row.fitted)

    paper = {row.id: float(row.paper) for row in rows(START)}
    return fit(
        paper,
        lambda constants: {row.id: float(row.simulated or 0.0) for row in rows(constants)},
        progress=lambda done, error: progress(f"fit: round {done}, mean residual {100 * error:.1f}%"),
    )


def _routed(traces: Sequence[Path]) -> Callable[[Model, int], Routed]:
    if traces:
        return lambda model, experts: of_trace(traces[SERVED.index(model)], experts, model.layers)
    return lambda model, experts: made(experts, model.layers, seed=SERVED.index(model))
