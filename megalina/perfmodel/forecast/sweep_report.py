"""A sweep of simulations as a table, a figure and one page that needs nothing but itself."""

import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from megalina.perfmodel.forecast.report import CLASSES, GIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
BASELINE = "eager"
MOST_PANELS = 6  # rows of the figure; the table has all
COLOURS = ("#2468b4", "#d9601a", "#20784a", "#8a4fb0", "#b03a4c", "#6b6f76", "#c49a1a", "#3aa6a0")
OWN = ("simulate.trace", "simulate.picture", "simulate.json")  # overrides that change no time
STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:24px auto;max-width:1200px;padding:0 16px;color:#1d1f24}
h1{font-size:1.4rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
th,td{padding:3px 10px;text-align:right;border-bottom:1px solid #e4e1da;white-space:nowrap}th{text-align:left;color:#666b75}
td.word{text-align:left}tr.none td{color:#a33}svg{max-width:100%;height:auto}"""


def varying(rows: Sequence[Row]) -> list[str]:
    """Overrides that differ between jobs, in the order in which they were given."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row["swept"]) if key not in OWN]
    return [key for key in keys if len({row["swept"].get(key) for row in rows}) > 1]


def baselines(rows: Sequence[Row]) -> dict[int, float]:
    """By job: the step of the job that differs in its strategy alone, which is eager."""
    others = [key for key in varying(rows) if key != "strategy"]
    found = {_at(row, others): row["step_s"] for row in rows if row["step_s"] and row["swept"].get("strategy") == BASELINE}
    return {row["job"]: found[_at(row, others)] for row in rows if _at(row, others) in found}


def table(rows: Sequence[Row]) -> str:
    """For the terminal, in the order of the jobs."""
    head, lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *lines))


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A head, and a line a job."""
    keys, eager_s = varying(rows), baselines(rows)
    waits = [f"waits for {what} ms" for what in CLASSES.values()]
    ratios = [f"as fast as {BASELINE}"] if eager_s else []
    head = ["job", *keys, "step ms", *ratios, "MFU", *waits, "GiB", "plan"]
    lines = []
    for row in rows:
        line = [str(row["job"]), *(row["swept"].get(key, "") for key in keys)]
        if row["step_s"] is None:
            lines.append([*line, "-", *("" for _ in ratios), "", *[""] * len(CLASSES), "", str(row["reason"])])
            continue
        ratio = [f"{eager_s[row['job']] / row['step_s']:.2f}x" if row["job"] in eager_s else ""] if ratios else []
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        exposed = [f"{row['exposed_s'][name] * 1e3:.1f}" for name in CLASSES]
        lines.append(
            [*line, f"{row['step_s'] * 1e3:.1f}", *ratio, mfu, *exposed, f"{row['memory_bytes'] / GIB:.1f}", row["plan"]]
        )
    return head, lines


def figure_of(rows: Sequence[Row]) -> "Figure | None":
    """Step time, ratio to eager, MFU and exposed communication over the swept number with most values, a line for each strategy,
    a row of panels for each combination of what else was swept.  None where no job has a time."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    timed = [row for row in rows if row["step_s"]]
    if not timed:
        return None
    x_key, line_key, panel_keys = axes_of(rows)
    eager_s = baselines(rows)
    measures: dict[str, Callable[[Row], float | None]] = {
        "step, ms": lambda row: row["step_s"] * 1e3,
        f"times as fast as {BASELINE}": lambda row: eager_s[row["job"]] / row["step_s"] if row["job"] in eager_s else None,
        "MFU, %": lambda row: None if row["mfu"] is None else row["mfu"] * 100,
        "waits for tokens, ms": lambda row: row["exposed_s"]["a2a"] * 1e3,
        "waits for gradients and weights, ms": lambda row: (row["exposed_s"]["grads"] + row["exposed_s"]["params"]) * 1e3,
    }
    drawn = {title: of for title, of in measures.items() if any(of(row) is not None for row in timed)}
    panels = list(dict.fromkeys(_at(row, panel_keys) for row in timed))
    shown = panels[:MOST_PANELS]
    lines = list(dict.fromkeys(row["swept"].get(line_key, "") for row in timed))
    ticks = list(dict.fromkeys(row["swept"].get(x_key, "") for row in timed))
    ticks = sorted(ticks, key=float) if all(map(_is_number, ticks)) else ticks
    figure = Figure(figsize=(3.1 * len(drawn), 0.9 + 2.5 * len(shown)), dpi=110, layout=ConstrainedLayoutEngine())
    grid = figure.subplots(len(shown), len(drawn), squeeze=False)
    for panel, axes in zip(shown, grid, strict=True):
        for axis, (title, of) in zip(axes, drawn.items(), strict=True):
            for number, line in enumerate(lines):
                own = [row for row in timed if _at(row, panel_keys) == panel and row["swept"].get(line_key, "") == line]
                points = [(ticks.index(row["swept"].get(x_key, "")), of(row)) for row in own]
                known = sorted((x, y) for x, y in points if y is not None)
                colour, label = COLOURS[number % len(COLOURS)], line if axis is grid[0][0] else None
                width = max(1.2, 4.0 - 0.9 * number)  # what lies on another line is seen beside it
                xs, ys = [x for x, _ in known], [y for _, y in known]
                axis.plot(xs, ys, "o-", color=colour, markersize=3 + width, linewidth=width, label=label)
            axis.set_title(title, loc="left", size=9)
            axis.set_xticks(range(len(ticks)), ticks, size=8)
            axis.tick_params(axis="y", labelsize=8)
            axis.set_ylim(bottom=0 if not title.startswith("times") else None)
            axis.grid(axis="y", color="#ece9e2")
            axis.set_xlabel(x_key, size=8)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("\n".join(f"{k}={v}" for k, v in zip(panel_keys, panel, strict=True)), size=8)
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=min(8, len(lines)), frameon=False, fontsize=9, title=line_key)
    if len(panels) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(panels)} combinations; the table has all", size=9)
    return figure


def axes_of(rows: Sequence[Row]) -> tuple[str, str, list[str]]:
    """What goes along, what has a line each, and what has panels."""
    keys = varying(rows)
    values = {key: {row["swept"].get(key, "") for row in rows} for key in keys}
    numbers = [key for key in keys if all(map(_is_number, values[key]))]
    x_key = max(numbers or keys or [""], key=lambda key: len(values.get(key, ())))
    rest = [key for key in keys if key != x_key]
    line_key = "strategy" if "strategy" in rest else next(iter(rest), "")
    return x_key, line_key, [key for key in rest if key != line_key]


def page(rows: Sequence[Row], figure: "Figure | None") -> str:
    """HTML with the figure as SVG and every job, also those without a time."""
    picture = io.StringIO()
    if figure is not None:
        figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    head, lines = cells(rows)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = []
    for row, line in zip(rows, lines, strict=True):
        last = len(line) - 1
        words = [f"<td{' class=word' if i == last else ''}>{escape(cell)}</td>" for i, cell in enumerate(line)]
        body.append(f"<tr{'' if row['step_s'] else ' class=none'}>{''.join(words)}</tr>")
    timed = sum(row["step_s"] is not None for row in rows)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>simulated steps</title><style>{STYLE}</style>'
        f"<h1>{len(rows)} simulated configurations, {timed} with a time</h1>"
        "<p>Virtual time on the figures of conf/cluster, of which each says if it is published or assumed. Nothing was measured."
        f"</p>{svg[svg.find('<svg') :] if svg else ''}"
        f'<div class="wide"><table><tr>{top}</tr>{"".join(body)}</table></div></html>\n'
    )


def _at(row: Row, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(row["swept"].get(key, "") for key in keys)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
