"""The report of an evaluation: a table for the terminal, and one self-contained page.

Both are made from what `megalina.infer.worker.evaluate` returns, which is what eval.json holds.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from megalina.infer.measures import IDEAL, STATIC
from megalina.track.load_map import DARK, LIGHT, colour_levels, data_uri
from megalina.track.report_style import STYLE
from megalina.track.svg_chart import LEFT, RIGHT, TOP, Reference, Series, legend, line_chart, short, ticks

COLOURS = {STATIC: "var(--second)", "best": "var(--accent)", IDEAL: "var(--good)"}
OTHERS = ("hsl(285 45% 55%)", "hsl(172 60% 38%)", "hsl(45 80% 45%)", "hsl(335 65% 55%)", "hsl(210 10% 50%)")
TABLE_STYLE = """
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
.heat{display:grid;grid-template-columns:auto minmax(0,1fr);gap:6px 10px;align-items:center}
.heat img{width:100%;height:26px;image-rendering:pixelated;border:1px solid var(--edge);border-radius:5px}
.heat span{font-size:.8rem;color:var(--soft);text-align:right}
"""
Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def number(key: str, form: str = ".2f", *, scale: float = 1.0, unit: str = "") -> Callable[[Mapping[str, Any]], str]:
    """Shows a mode's value; nothing where there is none."""
    return lambda mode: "" if mode[key] is None else f"{mode[key] * scale:{form}}{unit}"


def quartiles(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda mode: "" if mode[key] is None else f"{mode[key][0]:.2f}-{mode[key][1]:.2f}"


SPEED: Sequence[Column] = (
    ("p50 ms", number("p50_ms", ".1f")),
    ("p95", number("p95_ms", ".1f")),
    ("p99", number("p99_ms", ".1f")),
    ("faster than static: p50", number("p50_ratio_to_static")),
    ("p95", number("p95_ratio_to_static")),
    ("quartiles", quartiles("ratio_to_static_quartiles")),
    ("over ideal: p50", number("p50_ratio_to_ideal")),
    ("p95", number("p95_ratio_to_ideal")),
    ("prefill tokens/s", number("prefill_tokens_per_s", ",.0f")),
    ("decode", number("decode_tokens_per_s", ",.0f")),
)
PLACEMENT: Sequence[Column] = (
    ("load max/mean", number("load_max_over_mean")),
    ("p95", number("load_max_over_mean_p95")),
    ("idle", number("idle_share", ".0%")),
    ("by load", number("load_idle_share", ".0%")),
    ("a2a ms", number("a2a_ms", ".1f")),
    ("share", number("a2a_share", ".0%")),
    ("fetch wait ms", number("fetch_wait_ms", ".1f")),
    ("swapped MB", number("swapped_mb", ".1f")),
    ("planner ms", number("planner_ms")),
    ("phase 2", number("phase2_rate", ".0%")),
    ("top in order", number("accuracy_ordered", ".0%")),
    ("recall", number("accuracy_recall", ".0%")),
    ("misordered", number("misordered_experts", ".1f")),
    ("MB", number("expert_mb", ".0f")),
)
QUALITY: Sequence[Column] = (
    ("loss", number("loss", ".5f")),
    ("perplexity", number("perplexity", ".3f")),
    ("bits a byte", number("bits_per_byte", ".4f")),
    ("multiple choice", lambda mode: _task(mode, "multiple_choice", "accuracy")),
    ("by bytes", lambda mode: _task(mode, "multiple_choice", "accuracy_by_bytes")),
    ("cloze", lambda mode: _task(mode, "cloze", "accuracy")),
)


def _task(mode: Mapping[str, Any], kind: str, score: str) -> str:
    of_kind = (mode["tasks"] or {}).get(kind)
    return f"{of_kind[score]['value']:.1%}" if of_kind else ""


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """The modes whose quality was measured."""
    return {name: mode for name, mode in found["modes"].items() if mode["loss"] is not None}


def tables(found: Mapping[str, Any]) -> str:
    """For the terminal."""
    settings = found["settings"]
    return "\n\n".join(
        [
            f"{settings['checkpoint']}, step {settings['step']}, {settings['ranks']} ranks: {settings['batches']} batches of "
            f"{settings['sequences']} x {settings['tokens_a_sequence']} tokens a rank; profile: {settings['profile']}",
            _plain(found["modes"], SPEED),
            _plain(found["modes"], PLACEMENT),
            _plain(judged(found), [column for column in QUALITY if any(map(column[1], judged(found).values()))]),
            f"{equality(found)}\n({found['note']})",
        ]
    )


def equality(found: Mapping[str, Any]) -> str:
    """A line about whether placements have changed what is written."""
    names, difference = list(judged(found)), found["quality_difference"]
    if len(names) < 2:
        return f"Quality of {names[0]} alone: there is no other mode to compare with."
    return f"Losses of {' and '.join(names)} differ by {difference:.1e}, relatively: placements must not change them."


def _plain(modes: Mapping[str, Any], columns: Sequence[Column]) -> str:
    rows = [["mode", *(title for title, _ in columns)]]
    rows += [[name, *(show(mode) for _, show in columns)] for name, mode in modes.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def page(found: Mapping[str, Any]) -> str:
    """HTML, without script, font or picture from elsewhere."""
    settings, modes = found["settings"], found["modes"]
    title = f"{settings['model']['name']}, step {settings['step']}: inference"
    about = (
        f"{settings['ranks']} devices · {settings['model']['num_experts']} experts, top-{settings['top_k']} · "
        f"{settings['batches']} batches of {settings['sequences']} x {settings['tokens_a_sequence']} tokens a device · "
        f"profile: {settings['profile']} · text: {settings['text']}"
    )
    body = [
        f'<h1>{escape(title)}</h1><p class="about">{escape(about)}</p><p class="note">{escape(found["note"])}</p>',
        _tiles(modes),
        '<div class="cards">',
        _card("Speed", _table(modes, SPEED), hint="Latency of a batch, of the slowest device. All modes serve the same batches "
              "in turn; quartiles are of the ratio over these."),
        _card("Placement", _table(modes, PLACEMENT), hint="Rows of the busiest device over the mean; what devices stood still "
              "for; and how well popularity was foreseen: the 2 x top-k most popular experts."),
        _card("Quality", _table(judged(found), QUALITY), hint=equality(found)),
        _card("Latency", _latency(modes), hint="Share of batches that were served within so many milliseconds.", wide=False),
        _card("Load of devices", _loads(modes), hint="Rows over the mean, in each layer, the busiest device of a batch first; "
              "mean over batches.", wide=False),
        _card("Popularity", _popularity(modes[STATIC]), hint="Each row is a MoE layer, each cell an expert: its share of rows "
              "against an equal share, from blue (a quarter) to orange (four times)."),
        _accuracy(modes),
        _card("A MoE layer's time", _stages(modes), hint="Milliseconds, mean over devices and MoE layers, median over batches. "
              "Exchanges with their waiting for slower devices."),
        _settings(settings, found["definitions"]),
        "</div>",
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{TABLE_STYLE}</style></head>\n<body><main>{''.join(filter(None, body))}"
        "<footer>Made by megalina, tools/evaluate_gpt_moe.py; all numbers are in eval.json.</footer></main></body></html>\n"
    )


def _card(title: str, inner: str, *, hint: str = "", wide: bool = True) -> str:
    shown = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f'<section class="card{" wide" if wide else ""}"><h2>{escape(title)}</h2>{shown}{inner}</section>'


def _tiles(modes: Mapping[str, Any]) -> str:
    """Of the fastest mode that is possible."""
    name = min((n for n in modes if n != IDEAL), key=lambda n: modes[n]["p50_ms"])
    if "best" in modes:
        name = "best"
    mode, static = modes[name], modes[STATIC]
    tiles = [
        (f"{mode['p50_ratio_to_static']:.2f}x", f"{name} against static, median"),
        (f"{mode['p95_ratio_to_static']:.2f}x", f"{name} against static, 95th percentile"),
        (f"{static['load_max_over_mean_p95']:.2f} → {mode['load_max_over_mean_p95']:.2f}", "busiest device over mean, p95"),
        (f"{mode['prefill_tokens_per_s']:,.0f}", f"prefill tokens/s, {name}"),
    ]
    if mode["p95_ratio_to_ideal"] is not None:
        tiles.insert(2, (f"{mode['p95_ratio_to_ideal']:.2f}x", f"{name} over ideal, 95th percentile"))
    shown = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles[:4])
    return f'<div class="tiles">{shown}</div>'


def _table(modes: Mapping[str, Any], columns: Sequence[Column]) -> str:
    shown = [(title, show) for title, show in columns if any(map(show, modes.values()))]
    head = "".join(f"<th>{escape(title)}</th>" for title in ("mode", *(title for title, _ in shown)))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(show(mode))}</td>' for _, show in shown)}</tr>"
        for name, mode in modes.items()
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def colours(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name not in COLOURS]
    return {name: COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in names}


def _latency(modes: Mapping[str, Any]) -> str:
    series = []
    for name, colour in colours(list(modes)).items():
        ordered = sorted(modes[name]["latency_ms"])
        xs = [x for ms in ordered for x in (ms, ms)]
        ys = [y for i in range(len(ordered)) for y in (i / len(ordered), (i + 1) / len(ordered))]
        series.append(Series(name, xs, ys, colour))
    return legend(series) + line_chart(series, label="share of batches over latency in milliseconds", from_zero=True)


def _loads(modes: Mapping[str, Any]) -> str:
    """Static against the others that move experts: bars a layer, one a device."""
    shown = [name for name in (STATIC, "best") if name in modes]
    if shown == [STATIC]:
        shown += [name for name in modes if name not in (STATIC, IDEAL)][:1]
    layers = [layer["layer"] for layer in modes[STATIC]["layers"]]
    groups = {
        f"layer {layer}": [(colours(shown)[name], modes[name]["layers"][i]["device_load"]) for name in shown]
        for i, layer in enumerate(layers)
    }
    keys = [Series(name, [], [], colour) for name, colour in colours(shown).items()]
    return legend(keys) + bars(groups, label="rows of each device over the mean, by layer", reference=Reference("even", 1.0))


def bars(groups: Mapping[str, Sequence[tuple[str, Sequence[float]]]], *, label: str, reference: Reference) -> str:
    """A group of bars for each name, in which each (colour, values) is a block of bars side by side."""
    width, height, bottom = 460, 230, 26
    highest = 1.08 * max(value for blocks in groups.values() for _, values in blocks for value in (*values, reference.y))
    floor = height - bottom

    def at_y(y: float) -> float:
        return TOP + (highest - y) / highest * (floor - TOP)

    parts = []
    for tick in ticks(0.0, highest, 4):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    room = (width - LEFT - RIGHT) / len(groups)
    every = -(-len(groups) // 6)  # names have no room for more
    for i, (name, blocks) in enumerate(groups.items()):
        count = sum(len(values) for _, values in blocks) + len(blocks) - 1  # a bar's width between blocks
        bar, x = 0.8 * room / count, LEFT + (i + 0.1) * room
        for colour, values in blocks:
            for value in values:
                parts.append(
                    f'<rect x="{x:.1f}" y="{at_y(value):.1f}" width="{bar * 0.88:.2f}" height="{floor - at_y(value):.1f}" '
                    f'style="fill:{escape(colour)}"/>'
                )
                x += bar
            x += bar
        if i % every == 0:
            middle = LEFT + (i + 0.5) * room
            parts.append(f'<text class="tick" x="{middle:.1f}" y="{height - 7}" text-anchor="middle">{escape(name)}</text>')
    y = at_y(reference.y)
    parts.append(f'<line class="reference" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _popularity(static: Mapping[str, Any]) -> str:
    rows = []
    for layer in static["layers"]:
        share_E = np.array(layer["popularity"])
        levels = colour_levels(share_E * len(share_E))[None]
        name = f"layer {layer['layer']}: popularity of experts, most {share_E.max() * len(share_E):.1f} times the mean"
        pictures = "".join(
            f'<img class="{kind}" alt="{escape(name)}" src="{data_uri(levels, table)}">'
            for kind, table in (("light", LIGHT), ("dark", DARK))
        )
        rows.append(f"<span>layer {layer['layer']}</span><div>{pictures}</div>")
    return f'<div class="heat">{"".join(rows)}</div>'


def _accuracy(modes: Mapping[str, Any]) -> str:
    series = []
    for name, colour in colours(list(modes)).items():
        layers = [layer for layer in modes[name]["layers"] if layer["accuracy_recall"] is not None]
        if layers:
            at = [layer["layer"] for layer in layers]
            series.append(Series(name, at, [layer["accuracy_recall"] for layer in layers], colour, dots=True))
    if not series:
        return ""
    hint = "Of the 2 x top-k most popular experts of a layer, the share that was foreseen to be among them, over layers."
    chart = line_chart(series, label="recall over layers", width=960, height=240, from_zero=True)
    return _card("Accuracy of predictions", legend(series) + chart, hint=hint)


def _stages(modes: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(stage for mode in modes.values() for layer in mode["layers"] for stage in layer["stage_ms"]))
    means = {
        name: {stage: float(np.mean([layer["stage_ms"].get(stage, 0.0) for layer in mode["layers"]])) for stage in names}
        for name, mode in modes.items()
    }
    return _table(means, [(stage, number(stage)) for stage in names])


def _settings(settings: Mapping[str, Any], definitions: Mapping[str, str]) -> str:
    meant = "\n".join(f"{key}: {text}" for key, text in definitions.items())
    kept = "\n".join(f"{key}: {value}" for key, value in settings.items() if key not in ("modes", "model"))
    modes = "\n".join(f"{name}: {config}" for name, config in settings["modes"].items())
    return (
        '<section class="card wide long">'
        f"<details><summary>What is measured</summary><pre>{escape(meant)}</pre></details>"
        f"<details><summary>Settings</summary><pre>{escape(kept)}\n\n{escape(modes)}\n\nmodel: {escape(str(settings['model']))}"
        "</pre></details></section>"
    )
