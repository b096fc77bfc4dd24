"""What the report shows of experts' load and of a run's timing, as HTML.

Load: strips, one a MoE layer, with the newest load as bars beside them.  Timing: waits over steps, the timeline of chosen ones.
"""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from megalina.timeline.picture import FILE as PICTURE
from megalina.timeline.trace import FILE as TRACE
from megalina.track.expert_load import DARK, FULL_COLOUR_LOG2, LEVELS, LIGHT, LoadHistory, colour_levels, data_uri
from megalina.track.metrics import Record
from megalina.track.svg_chart import Series, legend, line_chart, smoothed

WAITS = {
    "a2a_exposed_s": ("all-to-alls", "var(--accent)"),
    "grads_exposed_s": ("gradients", "var(--second)"),
    "params_exposed_s": ("updated weights (ZeRO-1)", "var(--good)"),
    "pp_exposed_s": ("other stages", "var(--soft)"),
}
OF_STAGES = {  # means over the ranks of each stage, as megalina/train/timing.py adds them to records
    "stage_idle_shares": ("idle", lambda share: f"{share:.1%}"),
    "stage_pp_exposed_s": ("waits for other stages", lambda seconds: f"{seconds * 1e3:.1f} ms"),
    "stage_a2a_exposed_s": ("waits for all-to-alls", lambda seconds: f"{seconds * 1e3:.1f} ms"),
}


def load_strips(history: LoadHistory, numbers: Sequence[int]) -> str:
    """`numbers`: the model's numbers of its MoE layers.  Bars: mean over the last tenth of the snapshots."""
    ratio_TLE = history.ratio_TLE
    levels_TLE = colour_levels(ratio_TLE)
    newest_LE = ratio_TLE[-max(1, len(ratio_TLE) // 10) :].mean(axis=0)
    num_experts = ratio_TLE.shape[2]
    height_px = round(float(np.clip(num_experts * 9, 56, 200 if len(numbers) <= 6 else 110)))
    bar_end = max(2.0, float(newest_LE.max()))
    rows = []
    for layer, number in enumerate(numbers):
        images = "".join(
            f'<img class="{kind}" alt="" src="{data_uri(levels_TLE[:, layer].T, colours)}">'
            for kind, colours in (("light", LIGHT), ("dark", DARK))
        )
        fullest, emptiest = int(newest_LE[layer].argmax()), int(newest_LE[layer].argmin())
        told = (
            f"MoE layer {number}: now expert {fullest} has most, {newest_LE[layer, fullest]:.2f} times the balanced load, "
            f"expert {emptiest} least, {newest_LE[layer, emptiest]:.2f} times"
        )
        rows.append(
            f'<div class="name">layer {number}</div><div class="strip" style="height:{height_px}px" role="img" '
            f'aria-label="{escape(told)}" title="{escape(told)}">{images}</div><div style="height:{height_px}px">'
            f"{_bars(newest_LE[layer], bar_end)}</div>"
        )
    steps = history.steps
    marks = [steps[0], steps[len(steps) // 2], steps[-1]] if len(steps) > 2 else steps
    axis = "".join(f"<span>{'step ' if i == 0 else ''}{step}</span>" for i, step in enumerate(marks))
    end = f'<div></div><div class="axis">{axis}</div><div class="axis middle"><span>load now</span></div>'
    return _scale() + f'<div class="map">{"".join(rows)}{end}</div>'


def _bars(newest_E: np.ndarray, bar_end: float) -> str:
    """An expert a row, as in the strip; dashed: the balanced load."""
    num_experts = len(newest_E)
    bars = "".join(
        f'<rect class="{"over" if ratio > 1 else "under"}" x="0" y="{expert + 0.14:.2f}" '
        f'width="{ratio / bar_end * 100:.1f}" height="0.72"/>'
        for expert, ratio in enumerate(newest_E)
    )
    balanced = 100 / bar_end
    return (
        f'<svg class="bars" viewBox="0 0 100 {num_experts}" preserveAspectRatio="none" aria-hidden="true">{bars}'
        f'<line x1="{balanced:.1f}" x2="{balanced:.1f}" y1="0" y2="{num_experts}"/></svg>'
    )


def _scale() -> str:
    ramp = np.arange(LEVELS, dtype=np.uint8)[None, :]
    ends = "".join(
        f'<img class="{kind}" alt="" src="{data_uri(ramp, colours)}">' for kind, colours in (("light", LIGHT), ("dark", DARK))
    )
    full = round(2**FULL_COLOUR_LOG2)
    none = "".join(
        f'<i class="{kind}" style="background:rgb{colours.no_token}"></i>' for kind, colours in (("light", LIGHT), ("dark", DARK))
    )
    return f'<div class="scale"><span>1/{full} of balanced</span>{ends}<span>{full} times</span>{none}<span>no token</span></div>'


def waits_chart(steps: Sequence[int], records: Sequence[Record]) -> str:
    """How long rank 0's device stood still, as HTML; empty if that was not measured."""
    series = []
    for key, (title, colour) in WAITS.items():
        values = [record.get(key) for record in records]
        if any(values):
            series.append(Series(title, steps, smoothed(values, len(values) // 40), colour))
    if not series:
        return ""
    return legend(series) + line_chart(series, label="seconds of a step that the device waited, over steps", from_zero=True)


def stages_table(records: Sequence[Record]) -> str:
    """How long the ranks of each pipeline rank stood still, medians over the last tenth of the steps that say it, as HTML; empty
    without a pipeline, or if that was not measured."""
    told = [record for record in records if record.get("stage_idle_shares")]
    if not told:
        return ""
    newest = told[-max(1, len(told) // 10) :]
    head = "".join(f"<th>{title}</th>" for title in ("pipeline rank", *(title for title, _ in OF_STAGES.values())))
    rows = []
    for stage in range(len(newest[-1]["stage_idle_shares"])):
        values = [shown(float(np.median([record[key][stage] for record in newest]))) for key, (_, shown) in OF_STAGES.items()]
        rows.append("".join(f"<td>{value}</td>" for value in (stage, *values)))
    return f'<table class="stages"><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def timeline_picture(run_dir: Path) -> str:
    """The picture of the run folder as HTML, so that the page needs no other file; empty if there is none."""
    path = run_dir / PICTURE
    if not path.is_file():
        return ""
    data = b64encode(path.read_bytes()).decode()
    return f'<img class="timeline" alt="timeline of a step" src="data:image/png;base64,{data}">'


def timeline_hint(run_dir: Path, *, stages: int = 1) -> str:
    """What the picture shows, and where there is more.  `stages`: pipeline ranks."""
    more = f" All ranks: open {TRACE} of the run folder in ui.perfetto.dev." if (run_dir / TRACE).is_file() else ""
    who = "the first rank of each stage" if stages > 1 else "rank 0"
    return f"What {who} computed, what it had on the wire, and in red where it stood still.{more}"
