"""The tables of an evaluation: which numbers of a mode stand in which column, for the terminal and as HTML."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from megalina.evaluate.findings import headline, quality_line, warnings

Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def number(key: str, form: str = ".2f", *, scale: float = 1.0, unit: str = "") -> Callable[[Mapping[str, Any]], str]:
    """Shows a mode's value; nothing where there is none."""
    return lambda mode: "" if mode.get(key) is None else f"{mode[key] * scale:{form}}{unit}"


def span(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda mode: "" if mode[key] is None else f"{mode[key][0]:.2f}-{mode[key][1]:.2f}"


SPEED: Sequence[Column] = (
    ("p50 ms", number("p50_ms", ".1f")),
    ("p95 ms", number("p95_ms", ".1f")),
    ("p99 ms", number("p99_ms", ".1f")),
    ("static / it: p50", number("p50_ratio_to_static")),
    ("in the same round", number("ratio_to_static_in_rounds")),
    ("95% interval", span("ratio_to_static_interval")),
    ("static / it: p95", number("p95_ratio_to_static")),
    ("it / ideal: p50", number("p50_ratio_to_ideal")),
    ("it / ideal: p95", number("p95_ratio_to_ideal")),
    ("prefill tokens/s", number("prefill_tokens_per_s", ",.0f")),
    ("decode tokens/s", number("decode_tokens_per_s", ",.0f")),
)
PLACEMENT: Sequence[Column] = (
    ("experts used", number("active_fraction", ".0%")),
    ("load max/mean", number("load_max_over_mean")),
    ("its p95", number("load_max_over_mean_p95")),
    ("idle", number("idle_share", ".0%")),
    ("idle by load", number("load_idle_share", ".0%")),
    ("all-to-all ms", number("a2a_ms", ".1f")),
    ("share of time", number("a2a_share", ".0%")),
    ("fetch wait ms", number("fetch_wait_ms", ".1f")),
    ("fetched MB", number("swapped_mb", ".1f")),
    ("slots MB", number("expert_mb", ".0f")),
    ("overrun", number("overrun_share", ".1%")),
)
FORESIGHT: Sequence[Column] = (
    ("top in order", number("accuracy_ordered", ".0%")),
    ("recall", number("accuracy_recall", ".0%")),
    ("misordered", number("misordered_experts", ".1f")),
    ("phase 2", number("phase2_rate", ".0%")),
    ("planner ms", number("planner_ms")),
    ("calls a batch", number("planner_calls", ".1f")),
)
QUALITY: Sequence[Column] = (
    ("loss, nats", number("loss", ".5f")),
    ("perplexity", number("perplexity", ".3f")),
    ("bits a byte", number("bits_per_byte", ".4f")),
    ("multiple choice", lambda mode: _task(mode, "multiple_choice", "accuracy")),
    ("by bytes", lambda mode: _task(mode, "multiple_choice", "accuracy_by_bytes")),
    ("above chance", lambda mode: _task(mode, "multiple_choice", "centred_accuracy")),
    ("answer, bits a byte", lambda mode: _task(mode, "multiple_choice", "bits_per_byte", ".4f")),
    ("cloze", lambda mode: _task(mode, "cloze", "accuracy")),
)


def _task(mode: Mapping[str, Any], kind: str, score: str, form: str = ".1%") -> str:
    of_kind = (mode["tasks"] or {}).get(kind)
    if not of_kind:
        return ""
    error = of_kind[score]["standard_error"]
    return f"{of_kind[score]['value']:{form}}" + (f" ±{error:{form}}" if error is not None else "")


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """The modes whose quality was measured."""
    return {name: mode for name, mode in found["modes"].items() if mode["loss"] is not None}


def foreseeing(found: Mapping[str, Any]) -> dict[str, Any]:
    """The modes that foresee, or plan."""
    return {n: mode for n, mode in found["modes"].items() if mode["accuracy_recall"] is not None or mode["planner_calls"]}


def tables(found: Mapping[str, Any]) -> str:
    """For the terminal; what was found comes last, where it is seen."""
    settings = found["settings"]
    foresight = [_plain(foreseeing(found), FORESIGHT)] if foreseeing(found) else []
    return "\n\n".join(
        [
            f"{settings['checkpoint']}, step {settings['step']}, {settings['ranks']} ranks: {settings['batches']} batches of "
            f"{settings['sequences']} x {settings['tokens_a_sequence']} tokens a rank; profile: {settings['profile']}",
            _plain(found["modes"], SPEED),
            _plain(found["modes"], PLACEMENT),
            *foresight,
            _plain(judged(found), QUALITY),
            "\n".join([headline(found), quality_line(found), *warnings(found), f"({found['note']})"]),
        ]
    )


def _shown(modes: Mapping[str, Any], columns: Sequence[Column]) -> list[Column]:
    """Columns in which some mode has a value."""
    return [(title, show) for title, show in columns if any(map(show, modes.values()))]


def _plain(modes: Mapping[str, Any], columns: Sequence[Column]) -> str:
    shown = _shown(modes, columns)
    rows = [["mode", *(title for title, _ in shown)]]
    rows += [[name, *(show(mode) for _, show in shown)] for name, mode in modes.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def html_table(modes: Mapping[str, Any], columns: Sequence[Column], colour_of: Mapping[str, str], *, marked: str = "") -> str:
    """A row a mode, with the colour that it has in the charts; `marked`: the mode that the headline is about."""
    shown = _shown(modes, columns)
    head = "".join(f"<th>{escape(title)}</th>" for title in ("mode", *(title for title, _ in shown)))
    rows = ""
    for name, mode in modes.items():
        cells = "".join(f"<td>{escape(show(mode)) or '&ndash;'}</td>" for _, show in shown)
        kind = ' class="marked"' if name == marked else ""
        key = f'<i style="background:{escape(colour_of[name])}"></i>'
        rows += f"<tr{kind}><td>{key}{escape(name)}</td>{cells}</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
