"""What the report shows of a run's timing: waits over steps, and the timeline of chosen steps."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from megalina.timeline.picture import FILE as PICTURE
from megalina.timeline.trace import FILE as TRACE
from megalina.track.metrics import Record
from megalina.track.svg_chart import Series, legend, line_chart, smoothed

WAITS = {
    "a2a_exposed_s": ("all-to-alls", "var(--accent)"),
    "grads_exposed_s": ("gradients", "var(--second)"),
    "params_exposed_s": ("updated weights (ZeRO-1)", "var(--good)"),
}


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


def timeline_picture(run_dir: Path) -> str:
    """The picture of the run folder as HTML, so that the page needs no other file; empty if there is none."""
    path = run_dir / PICTURE
    if not path.is_file():
        return ""
    data = b64encode(path.read_bytes()).decode()
    return f'<img class="timeline" alt="timeline of rank 0" src="data:image/png;base64,{data}">'


def timeline_hint(run_dir: Path) -> str:
    """What the picture shows, and where there is more."""
    more = f" All ranks: open {TRACE} of the run folder in ui.perfetto.dev." if (run_dir / TRACE).is_file() else ""
    return f"What rank 0 computed, what it had on the wire, and in red where it stood still.{more}"
