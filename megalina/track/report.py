"""The report: one self-contained page of a run, `report.html`, made from its run folder.

Numbers come from metrics.jsonl and config.yaml; what they don't hold (the samples and the final summary) is kept beside them in
report.json, so that the page can be made again from the folder.  No script, no font and no picture comes from elsewhere.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from megalina.changed_settings import change_line
from megalina.track.expert_load import LoadHistory, layer_numbers
from megalina.track.metrics import Record, read_metrics, read_yaml
from megalina.track.progress import duration
from megalina.track.report_cards import load_strips, stages_table, timeline_hint, timeline_picture, waits_chart
from megalina.track.report_style import STYLE
from megalina.track.svg_chart import Reference, Series, legend, line_chart, short, smoothed
from megalina.whole_file import write_whole

ACCENT, SECOND, GOOD = "var(--accent)", "var(--second)", "var(--good)"
AHEAD = "Multi-token prediction: cross entropy in nats a token, mean over its layers, without its weight."


@dataclass(frozen=True, slots=True)
class Sample:
    prompt: str
    text: str  # what the model wrote after it


@dataclass(frozen=True, slots=True)
class RunData:
    """A run folder, read."""

    dir: Path
    config_text: str
    config: Mapping[str, Any]
    records: list[Record]
    samples: Sequence[Sample]
    summary: Mapping[str, Any]

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.records]

    def column(self, key: str) -> list[Any]:
        return [record.get(key) for record in self.records]

    def last(self, key: str) -> Any:
        """The newest value that is not None, or None."""
        return next((value for value in reversed(self.column(key)) if value is not None), None)

    def setting(self, group: str, key: str) -> Any:
        return (self.config.get(group) or {}).get(key)

    @property
    def total_steps(self) -> int:
        return int(self.setting("train", "steps") or 0)


def write_report(run_dir: Path, *, samples: list[Sample], summary: dict[str, Any]) -> Path:
    """Write RUN_DIR/report.json and RUN_DIR/report.html; returns the latter.

    Keys of `summary` that the page shows, all optional: `val_loss`, `unigram_loss` (nats), `tokens`, `tokens_per_s`, `mfu`,
    `total_params`, `active_params`, `overrides` (the command's list of overrides).  ValueError if there is no step to report.
    """
    kept = {"summary": summary, "samples": [asdict(sample) for sample in samples]}
    write_whole(run_dir / "report.json", json.dumps(kept, indent=1, default=str))
    return rebuild_report(run_dir)


def rebuild_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from the files in the folder."""
    path = run_dir / "report.html"
    write_whole(path, report_page(read_run(run_dir)))
    return path


def read_run(run_dir: Path) -> RunData:
    """Raises ValueError if the folder holds no run with at least one step."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise ValueError(f"{run_dir} is no run folder: it has no {name}")
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    records = read_metrics(run_dir / "metrics.jsonl")
    if not records:
        raise ValueError(f"{run_dir}/metrics.jsonl holds no step yet")
    kept_path = run_dir / "report.json"
    kept = json.loads(kept_path.read_text(encoding="utf-8")) if kept_path.exists() else {"summary": {}, "samples": []}
    samples = [Sample(**sample) for sample in kept["samples"]]
    return RunData(run_dir, config_text, read_yaml(run_dir / "config.yaml") or {}, records, samples, kept["summary"])


def report_page(run: RunData) -> str:
    name = run.dir.resolve().name
    body = "\n".join(
        [
            _header(run, name),
            _tiles(run),
            '<div class="cards">',
            _loss_card(run),
            _task_cards(run),
            _load_card(run),
            _charts(run),
            _timeline_card(run),
            _samples_card(run),
            _commands_card(run),
            _config_card(run),
            "</div>",
            "<footer>Made by megalina from metrics.jsonl and config.yaml; "
            "<code>tools/write_report.py</code> makes it again.</footer>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: megalina report</title><style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _header(run: RunData, name: str) -> str:
    step, total = run.steps[-1], run.total_steps
    done = step >= total
    kind, told = ("state", f"{step:,} steps") if done else ("state open", f"step {step:,} of {total:,}")
    state = f'<span class="{kind}">{told}</span>'
    parallel = run.config.get("parallel") or {}
    shown = ("tp", "ep", "cp") if parallel.get("cp", 1) > 1 else ("tp", "ep")
    layout = ", ".join(f"{key} {parallel[key]}" for key in shown if key in parallel)
    about = [
        f"model {run.setting('model', 'name')}",
        f"{run.setting('model', 'num_experts')} experts, {run.setting('router', 'kind')} top-{run.setting('router', 'top_k')}",
        layout,
        f"strategy {run.setting('strategy', 'name')}",
        f"data {run.setting('data', 'kind')}",
        f"{run.setting('train', 'dtype')}",
    ]
    notes = []
    if run.setting("router", "kind") == "expert_choice":
        notes.append(
            "Expert choice looks at later tokens of the group when it routes a token. The validation loss of this run is "
            "therefore not comparable with other routers' or with the unigram entropy."
        )
    emulated = any(run.setting("cluster", key) for key in ("attention_ms", "experts_ms", "device_gflops"))
    if told := run.summary.get("emulation") or ("emulated devices" if emulated else ""):
        notes.append(f"Times: {told}. Their ratios count, not the seconds.")
    for record in run.records:
        if isinstance(changed := record.get("changed_settings"), Mapping):
            notes.append(change_line(record["step"] - 1, changed) + ".")
        notes += [f"Warning, step {record['step']}: {line}." for line in record.get("warnings") or []]
    skipped = sum(bool(record.get("skipped")) for record in run.records)
    if skipped:
        notes.append(f"{skipped} of {len(run.records)} steps were skipped: their loss or gradient norm was not finite.")
    return f'<h1>{escape(name)} {state}</h1><p class="about">{escape(" · ".join(part for part in about if part))}</p>' + "".join(
        f'<p class="note">{escape(note)}</p>' for note in notes
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def _tiles(run: RunData) -> str:
    summary = run.summary
    tiles: list[tuple[str, str]] = []

    def given(key: str, otherwise: Any) -> Any:
        return summary[key] if summary.get(key) is not None else otherwise

    val_loss, unigram = given("val_loss", run.last("val_loss")), summary.get("unigram_loss")
    if val_loss is not None:
        beside = f"perplexity {math.exp(min(val_loss, 50)):,.1f}"
        if unigram is not None:
            beside = f"{abs(unigram - val_loss):.2f} {'below' if val_loss < unigram else 'above'} unigram entropy {unigram:.2f}"
        tiles.append((f"{val_loss:.3f}", f"validation loss, {beside}"))
    loss = run.last("loss")
    if loss is not None:
        tiles.append((f"{loss:.3f}", "training loss, last step"))
    tokens = given("tokens", run.last("tokens"))
    if tokens is not None:
        tiles.append((short(tokens), "training tokens"))
    pace = given("tokens_per_s", _median(run.column("tokens_per_s")))
    if pace is not None:
        tiles.append((short(round(pace)), "tokens/s"))
    mfu = given("mfu", _median(run.column("mfu")))
    if mfu is not None:
        tiles.append((f"{mfu:.1%}", "MFU (active parameters)"))
    if summary.get("total_params") is not None:
        active = summary.get("active_params")
        beside = f"parameters, {short(active)} active a token" if active is not None else "parameters"
        tiles.append((short(summary["total_params"]), beside))
    step_s = [value for value in run.column("step_s") if value is not None]
    if step_s:
        tiles.append((duration(sum(step_s)), f"in steps, {sum(step_s) / len(step_s):.3g} s each"))
    dead = run.last("dead_experts")
    if dead is not None:
        tiles.append((str(sum(count or 0 for count in dead)), "dead experts at the end"))
    inner = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles)
    return f'<div class="tiles">{inner}</div>'


def _card(title: str, inner: str, *, hint: str = "", wide: bool = False) -> str:
    kind = "card wide" if wide else "card"
    shown = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{shown}{inner}</section>'


def _finite(ys: Sequence[Any]) -> bool:
    return any(isinstance(y, int | float) and math.isfinite(y) for y in ys)


def _loss_card(run: RunData) -> str:
    losses = run.column("loss")
    evaluations = [(record["step"], record["val_loss"]) for record in run.records if record.get("val_loss") is not None]
    series = []
    if _finite(losses):
        series.append(Series("", run.steps, losses, ACCENT, faint=True))
        series.append(Series("training (smoothed)", run.steps, smoothed(losses, len(losses) // 40), ACCENT))
    if evaluations:
        steps, val_losses = zip(*evaluations, strict=True)
        series.append(Series("validation", steps, val_losses, SECOND, dots=True))
    if not series:
        return _card("Loss", "<p>No step had a finite loss.</p>", wide=True)
    unigram = run.summary.get("unigram_loss")
    references = [] if unigram is None else [Reference(f"unigram entropy {unigram:.2f}", unigram)]
    broad, narrow = (
        line_chart(series, label="training and validation loss over steps", width=width, height=height, references=references)
        for width, height in ((960, 300), (400, 270))
    )
    charts = f'<div class="broad">{broad}</div><div class="narrow">{narrow}</div>'
    hint = "Cross entropy in nats a token, without auxiliary terms, over steps."
    return _card("Loss", legend(series) + charts, hint=hint, wide=True)


def _task_cards(run: RunData) -> str:
    """A curve a task, of what `eval.interval` has made."""
    records = [record for record in run.records if any(key.startswith("eval/") for key in record)]
    names = list(dict.fromkeys(key.split("/")[1] for record in records for key in record if key.count("/") == 2))
    cards = []
    for what, title, references, hint in (
        (
            "centred_accuracy",
            "Tasks: accuracy above chance",
            [Reference("chance", 0.0)],
            "Multiple choice from held-out text: 0 is as by chance, 1 is all right.",
        ),
        ("bits_per_byte", "Tasks: bits a byte of the right answer", [], "Smoother than accuracy; lower is better."),
    ):
        series, last = [], []
        for i, name in enumerate(names):
            ys = [record.get(f"eval/{name}/{what}") for record in records]
            if _finite(ys):
                hue = 205 + 280 * i / len(names)
                series.append(Series(name, [record["step"] for record in records], ys, f"hsl({hue:.0f} 68% 54%)", dots=True))
                error = records[-1].get(f"eval/{name}/{what}_error")
                last.append(f"{name} {ys[-1]:.3f}" + (f" ±{error:.3f}" if error is not None else "") if _finite(ys[-1:]) else "")
        if series:
            chart = line_chart(series, label=f"{title} over steps, a line a task", references=references)
            cards.append(_card(title, legend(series) + chart, hint=f"{hint} Last: {', '.join(filter(None, last))}."))
    return "\n".join(cards)


def _load_card(run: RunData) -> str:
    history = LoadHistory.of(run.records)
    if history is None:
        return _card("Expert load", "<p>This run stored no expert load.</p>", wide=True)
    num_layers, num_experts = history.share_TLE.shape[1:]
    quiet = [] if _ever(run, "dead_experts") else ["No expert was ever dead."]
    if not _ever(run, "dropped_fraction"):
        quiet.append("No token was dropped.")
    hint = (
        f"Each strip is a MoE layer, each of its {num_experts} rows an expert, time runs to the right. Colour: the expert's "
        f"tokens against an equal share (1/{num_experts}). {' '.join(quiet)}"
    )
    numbers = layer_numbers(run.config.get("model") or {}, num_layers)
    return _card("Expert load over time", load_strips(history, numbers), hint=hint, wide=True)


def _single(
    run: RunData, key: str, title: str, colour: str, *, hint: str = "", smooth: bool = False, from_zero: bool = False
) -> str:
    ys = run.column(key)
    if not _finite(ys):
        return ""
    series = [Series(title, run.steps, ys, colour, faint=smooth)]
    if smooth:
        series.append(Series(title, run.steps, smoothed(ys, len(ys) // 40), colour))
    return _card(title, line_chart(series, label=f"{title} over steps", from_zero=from_zero), hint=hint)


def _per_layer(
    run: RunData,
    key: str,
    title: str,
    *,
    hint: str,
    references: Sequence[Reference] = (),
    from_zero: bool = False,
    smooth: bool = True,
) -> str:
    rows = [record[key] for record in run.records if record.get(key)]
    if not rows or not _finite([value for row in rows for value in row]):
        return ""
    numbers = layer_numbers(run.config.get("model") or {}, len(rows[0]))
    series = []
    for layer, number in enumerate(numbers):
        ys = [record[key][layer] if record.get(key) else None for record in run.records]
        hue = 205 + 175 * layer / max(len(numbers) - 1, 1)  # blue at the bottom of the model, red at the top
        line = smoothed(ys, len(ys) // 60) if smooth else ys
        series.append(Series(f"layer {number}", run.steps, line, f"hsl({hue:.0f} 68% 54%)"))
    named = series if len(series) <= 8 else [series[0], series[len(series) // 2], series[-1]]
    chart = line_chart(series, label=f"{title} over steps, a line a MoE layer", references=references, from_zero=from_zero)
    return _card(title, legend(named) + chart, hint=hint)


def _ever(run: RunData, key: str) -> bool:
    """Whether a per-layer number was above zero at any step."""
    return any(value for row in run.column(key) if row for value in row)


def _charts(run: RunData) -> str:
    cards = [
        _per_layer(
            run,
            "load_max_over_mean",
            "Load: fullest expert over mean",
            hint="1 is balanced; the fullest expert's device sets the pace of the layer.",
            references=[Reference("balanced", 1.0)],
        ),
        _per_layer(
            run,
            "load_entropy",
            "Load entropy",
            hint="Entropy of the experts' shares over that of equal shares: 1 is even, 0 is one expert.",
            references=[Reference("even", 1.0)],
        ),
    ]
    for key, title, hint in (
        ("dropped_fraction", "Dropped tokens", "Share of token-expert pairs beyond capacity."),
        ("dead_experts", "Dead experts", "Experts without a token in the last 100 steps."),
    ):
        if _ever(run, key):
            cards.append(_per_layer(run, key, title, hint=hint, from_zero=True, smooth=False))
    if waits := waits_chart(run.steps, run.records):
        cards.append(_card("Waits", waits, hint="Seconds of a step in which rank 0's device stood still for them."))
    if stages := stages_table(run.records):
        hint = "Of a step, means over the ranks that hold the same layers, medians over the newest steps."
        cards.append(_card("Waits of pipeline ranks", stages, hint=hint))
    for key, title, hint in (
        (
            "token_bytes_between_nodes",
            "Token bytes between nodes",
            "Of a step, all ranks: what all-to-alls of tokens send there and back.",
        ),
        ("token_bytes_within_nodes", "Token bytes within nodes", "The same to other ranks of the sender's node."),
    ):
        if any(run.column(key)):
            cards.append(_single(run, key, title, GOOD, hint=hint, from_zero=True, smooth=True))
    cards += [
        _single(run, "tokens_per_s", "Throughput", GOOD, hint="Tokens a second, all ranks.", smooth=True, from_zero=True),
        _single(run, "lr", "Learning rate", SECOND, from_zero=True),
        _single(run, "grad_norm", "Gradient norm", ACCENT, hint="Before clipping.", smooth=True, from_zero=True),
        _single(run, "aux_loss", "Balance loss", SECOND, smooth=True) if any(run.column("aux_loss")) else "",
        _single(run, "z_loss", "Router z-loss", SECOND, smooth=True) if any(run.column("z_loss")) else "",
        _single(run, "mtp_loss", "Multi-token prediction", SECOND, hint=AHEAD, smooth=True)
        if any(run.column("mtp_loss"))
        else "",
    ]
    return "\n".join(card for card in cards if card)


def _timeline_card(run: RunData) -> str:
    picture = timeline_picture(run.dir)
    stages = int(run.setting("parallel", "pp") or 1)
    return _card("Timeline", picture, hint=timeline_hint(run.dir, stages=stages), wide=True) if picture else ""


def _samples_card(run: RunData) -> str:
    if not run.samples:
        return ""
    texts = "".join(
        f'<div class="sample"><pre><span class="prompt">{escape(sample.prompt)}</span>{escape(sample.text)}</pre></div>'
        for sample in run.samples
    )
    return _card("What the model writes", texts, hint="The prompt is highlighted; the rest is the trained model's.", wide=True)


def _commands_card(run: RunData) -> str:
    shown = "".join(
        f'<div class="command"><p>{escape(text)}</p><pre>{escape(command)}</pre></div>' for text, command in _commands(run)
    )
    return _card("Go on", shown, wide=True)


def _commands(run: RunData) -> list[tuple[str, str]]:
    run_dir = Path(os.path.relpath(run.dir)) if run.dir.resolve().is_relative_to(Path.cwd()) else run.dir.resolve()
    step, total = run.steps[-1], run.total_steps
    known = _overrides(run)
    overrides = [word for word in known or [] if not word.startswith(("run.dir=", "train.exit_step=", "train.max_minutes="))]
    text = "continue from the newest checkpoint"
    if step >= total:
        overrides = [word for word in overrides if not word.startswith("train.steps=")] + [f"train.steps={2 * max(total, step)}"]
        text = f"train on, to {2 * max(total, step):,} steps (the learning-rate schedule then spans them all)"
    if known is None:
        text += "; add the overrides of the run's own command, which this folder doesn't hold"
    saved = sorted(path.name for path in (run.dir / "checkpoints").glob("step_????????"))
    checkpoint = run_dir / "checkpoints" / (saved[-1] if saved else f"step_{step:08d}")
    return [
        (text, shlex.join(["python", "pretrain_gpt_moe.py", *overrides, f"run.dir={run_dir}"])),
        ("let the model write", shlex.join(["python", "tools/generate.py", str(checkpoint), "--prompt", "def main("])),
        ("compare with the other runs in its folder", shlex.join(["python", "tools/compare_runs.py", str(run_dir.parent)])),
    ]


def _overrides(run: RunData) -> list[str] | None:
    """The command's overrides: from the summary, or from .hydra/overrides.yaml in the run folder; None: neither has them."""
    if run.summary.get("overrides") is not None:
        return [str(word) for word in run.summary["overrides"]]
    stored = run.dir / ".hydra" / "overrides.yaml"
    return [str(word) for word in read_yaml(stored) or []] if stored.exists() else None


def _config_card(run: RunData) -> str:
    inner = f"<details><summary>Resolved configuration</summary><pre>{escape(run.config_text)}</pre></details>"
    return f'<section class="card wide long">{inner}</section>'
