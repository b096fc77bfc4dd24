"""The report of an evaluation: one self-contained page.

It is made from what `megalina.evaluate.worker.evaluate` returns, which is what eval.json holds.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from megalina.evaluate.findings import chosen_mode, headline, parts, quality_line, warnings
from megalina.evaluate.measures import IDEAL, STATIC
from megalina.evaluate.report_charts import (
    CHART_STYLE,
    accuracy_chart,
    colours,
    instruction_means,
    latency_chart,
    load_chart,
    popularity_map,
    time_chart,
)
from megalina.evaluate.report_tables import FORESIGHT, PLACEMENT, QUALITY, SPEED, foreseeing, html_table, judged, number
from megalina.track.report_style import STYLE

TABLE_STYLE = """
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.3rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal;min-width:4.2em}
th:first-child,td:first-child{text-align:left;white-space:nowrap;position:sticky;left:0;background:var(--card)}
td:first-child i{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:7px}
tr.marked td{font-weight:650}
.headline{font-size:1.12rem;line-height:1.4;margin:.7rem 0 0}
dl{display:grid;grid-template-columns:auto minmax(0,1fr);gap:4px 14px;margin:6px 0 0;font-size:.9rem}
dt{font-weight:600}
dd{margin:0;color:var(--soft)}
@media (max-width:720px){th,td{padding:.3rem .4rem;font-size:.8rem}.headline{font-size:1rem}}
"""

HINTS = {
    "Speed": "Latency of a batch, of the slowest device; all modes serve the same batches in turn. static / it: above 1 is "
    "faster than static. it / ideal: how many times as long as with forced even routing, the bound for loads; below 1 where "
    "replicas keep rows off the wire.",
    "Latency": "How many of the batches were served within a time: further left is faster, steeper is steadier.",
    "Load of devices, before and after": "Rows of each device over the mean, the busiest device of a batch first, mean over "
    "batches. 1 (dashed) is even; the highest bar is what all others wait for.",
    "Placement": "Load: rows of the busiest device over the mean. Idle: devices computed nothing; by load: what imbalance alone "
    "leaves idle. All-to-all: tokens on the wire, with the waiting for slower devices. Slots: memory of one device.",
    "Where a MoE layer's time goes": "Mean over devices and MoE layers, median over batches; exchanges with their waiting for "
    "slower devices. Instructions may overlap.",
    "Popularity of experts": "What the router chose in all timed batches: an expert's share of rows against an equal share.",
    "Foresight": "The 2 x top-k most popular experts of a layer: how often they were foreseen in their order, and how many of "
    "them. Phase 2: decisions that placed experts anew after the router spoke.",
    "Foresight by layer": "Of the 2 x top-k most popular experts the share that was foreseen; lines that are alike lie over each "
    "other.",
    "What is what": "Which part of a serving machine was what in this evaluation.",
    "Do it again": "In the folder of the repository. Times differ from machine to machine, loads do not.",
}


def page(found: Mapping[str, Any]) -> str:
    """HTML, without script, font or picture from elsewhere."""
    settings, modes = found["settings"], found["modes"]
    title = f"{settings['model']['name']}, step {settings['step']}: inference on {_devices(settings['ranks'])}"
    about = (
        f"{settings['model']['num_experts']} experts, top-{settings['top_k']} · "
        f"{settings['batches']} batches of {settings['sequences']} x {settings['tokens_a_sequence']} tokens a device · "
        f"profile: {settings['profile']} · text: {settings['text']}"
    )
    own, marked = colours(list(modes)), chosen_mode(modes)
    shown = list(dict.fromkeys([STATIC, marked]))
    foresight = foreseeing(found)
    told = [found["note"][0].upper() + found["note"][1:], *warnings(found)]
    notes = f'<div class="note">{"".join(f"<p>{escape(text)}</p>" for text in told)}</div>'
    foresight_table = html_table(foresight, FORESIGHT, own, marked=marked) if foresight else ""
    cards = {
        "Speed": html_table(modes, SPEED, own, marked=marked),
        "Latency": latency_chart(modes),
        "Load of devices, before and after": load_chart(modes, shown),
        "Placement": html_table(modes, PLACEMENT, own, marked=marked),
        "Where a MoE layer's time goes": time_chart(modes) + _instructions(modes, own),
        "Popularity of experts": popularity_map(modes[STATIC]["layers"]),
        "Foresight": foresight_table,
        "Foresight by layer": accuracy_chart(modes),
        "Quality": html_table(judged(found), QUALITY, own),
        "What is what": _parts(found),
        "Do it again": _command(settings),
    }
    hints = HINTS | {"Quality": quality_line(found)}
    body = [
        f'<h1>{escape(title)}</h1><p class="about">{escape(about)}</p><p class="headline">{escape(headline(found))}</p>{notes}',
        _tiles(modes, marked),
        '<div class="cards">',
        *(_card(name, inner, hint=hints[name]) for name, inner in cards.items() if inner),
        _settings(settings, found["definitions"]),
        "</div>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{TABLE_STYLE}{CHART_STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}"
        "<footer>Made by megalina, tools/evaluate_gpt_moe.py; all numbers are in eval.json.</footer></main></body></html>\n"
    )


def _devices(ranks: int) -> str:
    return "1 device" if ranks == 1 else f"{ranks} devices"


def _card(title: str, inner: str, *, hint: str) -> str:
    return f'<section class="card wide"><h2>{escape(title)}</h2><p class="hint">{escape(hint)}</p>{inner}</section>'


def _tiles(modes: Mapping[str, Any], name: str) -> str:
    """Of the mode that the headline is about."""
    mode, static = modes[name], modes[STATIC]
    if name == STATIC:
        tiles = [(f"{mode['p50_ms']:.1f} ms", "median batch"), (f"{mode['p95_ms']:.1f} ms", "95th percentile")]
    else:
        tiles = [
            (f"{mode['ratio_to_static_in_rounds']:.2f}x", f"as fast as static: {name}, median of rounds"),
            (f"{mode['p95_ratio_to_static']:.2f}x", f"as fast as static: {name}, 95th percentile"),
        ]
    if mode["p95_ratio_to_ideal"] is not None:
        tiles.append((f"{mode['p95_ratio_to_ideal']:.2f}x", f"as long as {IDEAL}: {name}, 95th percentile"))
    before, after = static["load_max_over_mean_p95"], mode["load_max_over_mean_p95"]
    tiles.append(
        (f"{before:.2f} → {after:.2f}" if name != STATIC else f"{before:.2f}", "busiest device / mean rows, 95th percentile")
    )
    if len(tiles) < 4:
        tiles.append((f"{mode['prefill_tokens_per_s']:,.0f}", f"prefill tokens/s, {name}"))
    shown = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles)
    return f'<div class="tiles">{shown}</div>'


def _instructions(modes: Mapping[str, Any], own: Mapping[str, str]) -> str:
    means = {name: instruction_means(mode["layers"]) for name, mode in modes.items()}
    names = list(dict.fromkeys(instruction for instructions in means.values() for instruction in instructions))
    table = html_table(means, [(instruction, number(instruction)) for instruction in names], own)
    return f"<details><summary>By instruction, milliseconds</summary>{table}</details>"


def _parts(found: Mapping[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in parts(found))}</dl>"


def _command(settings: Mapping[str, Any]) -> str:
    if not settings.get("command"):
        return ""
    return f'<div class="command"><pre>{escape(settings["command"])}</pre></div>'


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
