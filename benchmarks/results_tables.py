"""Tables of results, by the kind of command that wrote them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import both_speeds as speeds
from benchmarks.host_time import cells
from benchmarks.link_counters import FRAME_BYTES

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """`rows`: a cell for each column of `head`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def lines(self) -> list[str]:
        """As Markdown."""
        return [_line(self.head), "|" + "---|" * len(self.head), *map(_line, self.rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def ladder(result: Result) -> list[Table]:
    """Of tools/compare_strategies.py: each setting's strategies, the slowest first."""
    return [_setting(setting, result["note"]) for setting in result["settings"]]


def _setting(setting: Result, note: str) -> Table:
    bounds_s = [setting[key] for key in ("lower_bound_s", "tighter_bound_s", "plain_bound_s")]
    rows = []
    for name, of in sorted(setting["strategies"].items(), key=lambda one: -one[1]["median_step_s"]):
        if name == "eager":  # the fastest of its variants, which are there
            continue
        step_s, (low, high) = of["median_step_s"], of["ratio_spread"]
        rows.append(
            [
                name,
                ms(step_s),
                f"{of['ratio_to_eager']:.2f} ({low:.2f} - {high:.2f})",
                *(f"{step_s / bound_s:.2f}" if bound_s else "" for bound_s in bounds_s),
                ms(of["a2a_exposed_s"]),
                ms(of["grads_exposed_s"]),
                of["plan"],
            ]
        )
    head = ("strategy", "step ms", "to tuned eager (quartiles)", "over the bound", "over the tighter one",
            "over the plain baseline's", "waits for tokens ms", "for gradients ms", "ran as")  # fmt: skip
    slow = f", {setting['slow_motion']:g} times in slow motion, in its own time" if setting["slow_motion"] > 1 else ""
    return Table(head, rows, f"**{setting['name']}**{slow}; {note}")


def pipelines(result: Result) -> list[Table]:
    """Of benchmarks/pipelines.py: what each schedule takes, and what was forecast."""
    out = []
    for setting in result["settings"]:
        forecast, hosts = setting["forecast_s"], setting.get("with_hosts_s") or {}
        rows = []
        for name, of in sorted(setting["strategies"].items(), key=lambda one: -one[1]["median_step_s"]):
            if name == "eager":
                continue
            step_s = of["median_step_s"]
            guesses = [ms(found[name]) if name in found else "" for found in (forecast, hosts)]
            rows.append([name, ms(step_s), f"{of['ratio_to_eager']:.2f}", *guesses[: 1 + bool(hosts)]])
        head = ["schedule", "step ms", "to tuned eager", "forecast ms", *(["with hosts ms"] if hosts else [])]
        out.append(Table(head, rows, f"**{setting['name']}**; {result['note']}"))
    return out


def validation(result: Result) -> list[Table]:
    """Of benchmarks/validate_simulator.py: how far step times are from the simulator's."""
    rows = []
    for side, text in (("fitted", "constants fitted on these"), ("heldout", "held out")):
        of = result[side]
        errors = [percent(of[name]) for name in ("median_error", "p90_error", "ratio_error")]
        rows.append([text, str(of["configurations"]), *errors, f"{percent(of['pair_order'])} of {of['pairs']}"])
    head = (
        "configurations",
        "number",
        "step time off by, median",
        "p90",
        "ratio of two off by, median",
        "pairs in the right order",
    )
    return [Table(head, rows)]


def muon_wire(result: Result) -> list[Table]:
    """Of benchmarks/muon.py --parts wire."""
    rows = [
        [
            of["name"],
            str(of["zero"]),
            f"{of['step_ms']:.0f} ({of['step_quartiles_ms'][0]:.0f} - {of['step_quartiles_ms'][1]:.0f})",
            f"{of['tail_ms']:.0f} ({of['tail_quartiles_ms'][0]:.0f} - {of['tail_quartiles_ms'][1]:.0f})",
            f"{of['virtual_step_ms']:.0f}",
            f"{of['virtual_tail_ms']:.0f}",
        ]
        for of in result["wire"]
    ]
    head = ("optimizer", "ZeRO", "step ms (quartiles)", "tail ms (quartiles)", "simulated step", "simulated tail")
    return [Table(head, rows)]


def muon_train(result: Result) -> list[Table]:
    """Of benchmarks/muon.py --parts train: each optimizer at the best rate of its sweep, with other seeds."""
    by_name: dict[str, list[Result]] = {}
    for of in result["trained"]:
        by_name.setdefault(of["optimizer"], []).append(of)
    rows = []
    for name, runs in by_name.items():
        losses = [of["loss"] for of in runs]
        spread = max(losses) - min(losses)
        state_mb = runs[0]["state_bytes"] / 1e6
        rows.append(
            [name, f"{runs[0]['lr']:g}", f"{statistics.fmean(losses):.3f}", f"{spread:.3f}", str(len(runs)), f"{state_mb:.0f}"]
        )
    head = ("optimizer", "learning rate", "validation loss", "spread", "seeds", "state MB")
    return [Table(head, rows, f"{result['steps']} steps, equal tokens; {result['machine']}")]


def torch_pipelines(result: Result) -> list[Table]:
    """Of benchmarks/torch_pipelines.py: torch's own runtime beside ours, on the same tables."""
    rows = []
    for ranks, found in result["ranks"].items():
        for name, of in found.get("times", {}).items():
            sides = {side: s["median_step_s"] for side, s in of["sides"].items()}
            rows.append([ranks, name, ms(sides["torch"]), ms(sides["ours"]), f"{sides['torch'] / sides['ours']:.2f}"])
    return [Table(("ranks", "schedule", "torch ms", "ours ms", "torch over ours"), rows, result["note"])]


def long_context(result: Result) -> list[Table]:
    """Of benchmarks/long_context.py."""
    rows = []
    for of in result["rows"]:
        peak = max(rank["measured"] for rank in of["ranks"])
        predicted = max(rank["predicted"] for rank in of["ranks"])
        step_s = max(rank["step_s"] for rank in of["ranks"])
        rows.append([str(of["cp"]), of["kind"] or "one rank", f"{peak / 1e6:.0f}", f"{predicted / 1e6:.0f}", f"{step_s:.1f}"])
    title = f"{result['length']:,} tokens; losses differ by at most {result['apart']:.1e}"
    return [Table(("cp", "how", "peak MB of a rank", "predicted MB", "step s"), rows, title)]


def imports(result: Result) -> list[Table]:
    """Of benchmarks/import_checkpoint.py."""
    rows = [
        [
            name,
            f"{of['parameters'] / 1e6:.0f}",
            f"{of['num_bytes'] / 1e6:.0f}",
            f"{of['seconds']:.1f}",
            f"{of['peak_bytes'] / 1e6:.0f}",
        ]
        for name, of in result["imports"].items()
    ]
    loads = [
        [ranks, f"{min(of['seconds'] for of in runs):.1f} - {max(of['seconds'] for of in runs):.1f}",
         f"{max(of['peak_bytes'] for of in runs) / 1e6:.0f}"]
        for ranks, runs in result["loads"].items()
    ]  # fmt: skip
    return [
        Table(("import of", "million parameters", "MB", "seconds", "peak MB"), rows),
        Table(("train.init_from on ranks", "seconds", "peak MB of a rank"), loads),
    ]


def host_time(result: Result) -> list[Table]:
    """Of tools/measure_cluster.py --host: CPU time of the program's thread in a step."""
    rows = []
    for name, of in result.items():
        cpu = {part: f"{seconds * 1e3:.1f}" for part, seconds in of["cpu_s"].items()}
        others = [f"{of[key] * 1e3:.1f}" for key in ("thread_s", "others_s", "queued_s")]
        per_us = of["thread_s"] / of["instructions"] * 1e6
        rows.append([name, str(of["instructions"]), *cpu.values(), *others, f"{per_us:.0f}"])
    parts = list(next(iter(result.values()))["cpu_s"])
    head = ("list", "instructions", *(f"{part} ms" for part in parts), "its thread ms", "other threads ms", "without a core ms",
            "us per instruction")  # fmt: skip
    return [Table(head, rows)]


def host_before(result: Result) -> list[Table]:
    """Of benchmarks/host_time.py: CPU time of the program's thread per instruction, before and now."""
    head, *rows = cells([(of["before"], of["now"]) for of in result["rounds"]])
    return [Table(tuple(f"{name} us" if 1 < i < len(head) - 1 else name for i, name in enumerate(head)), rows)]


def both_speeds(result: Result) -> list[Table]:
    """Of benchmarks/both_speeds.py: the ladder in slow motion and at natural speed."""
    rounds = {name: [(of["slow"], of["natural"]) for of in turns] for name, turns in result["settings"].items()}
    head, *rows = speeds.cells(rounds)
    return [
        Table(tuple(head), rows, f"{result['slow_motion']:g} times in slow motion; rounds: {len(next(iter(rounds.values())))}")
    ]


def museum(result: Result) -> list[Table]:
    """Of benchmarks/museum.py."""
    rows = [
        [
            f"`{of['plant']}`",
            of["named"] or "nothing",
            f"{of['named_s']:.1f}",
            f"{of['script_s']:.1f}" if of["script_code"] == 0 else "fails",
        ]
        for of in result["exhibits"]
    ]
    named = sum(of["named"] == of["plant"] for of in result["exhibits"])
    return [Table(("planted", "named", "s", "script of torch alone, s"), rows, f"{named} of {len(rows)} named")]


def dense_training(result: Result) -> list[Table]:
    """Of benchmarks/dense_training.py: held-out losses, means over seeds, and speeds."""
    by_way: dict[tuple[str, str], list[Result]] = {}
    for point in result["points"]:
        by_way.setdefault((point["model"], point["rule"]), []).append(point)
    losses = []
    for (model, rule), own in by_way.items():
        values = [point["loss"] for point in own]
        active, spread = statistics.fmean(point["active_fraction"] for point in own), max(values) - min(values)
        losses.append([model, rule, f"{active:.3f}", f"{statistics.fmean(values):.3f}", f"{spread:.3f}", str(len(own))])
    speeds = [
        [
            of["model"],
            of["rule"],
            f"{of['tokens_per_s']:,.0f}",
            f"{of['ratio_to_dense']:.2f} ({of['ratio_range'][0]:.2f} - {of['ratio_range'][1]:.2f})",
        ]
        for of in result["speeds"]
    ]
    head = ("model", "experts used by", "active fraction", "held-out loss, nats per token", "spread", "seeds")
    return [
        Table(head, losses, f"{result['steps']} steps; {result['machine']}"),
        Table(("model", "experts used by", "tokens/s", "of the dense MLP, in turns (range)"), speeds),
    ]


def peers(result: Result) -> list[Table]:
    """Of benchmarks/peers.py: each setting's systems, the slowest first."""
    out = []
    for setting in result["settings"]:
        slow = (
            f"{setting['slow_motion']:g} times in slow motion, in its own time"
            if setting["slow_motion"] != 1
            else "natural speed"
        )
        rows = []
        for name, of in sorted(setting["rows"].items(), key=lambda one: -one[1]["median_step_s"]):
            low, high = of["ratio_range"]
            kind = f"our list, after {of['re_expression']}" if of["re_expression"] else of["tuned"]
            ratio = f"{of['ratio_of_megalina']:.2f} ({low:.2f} - {high:.2f})"
            rows.append([name, kind, ms(of["median_step_s"]), ratio, ms(of["waits_s"]), f"{of['peak_mb']:.0f}"])
        rows += [[name, f"not run: {why}", "", "", "", ""] for name, why in setting["not_run"].items()]
        head = ("system", "as", "step ms", "over megalina's (range)", "the device waits ms", "peak MB")
        out.append(Table(head, rows, f"**{setting['name']}**, {slow}"))
    return out


def inference(result: Result) -> list[Table]:
    """Of benchmarks/inference.py: each setting's modes, the slowest first."""
    out = []
    for setting in result["settings"]:
        rows = [
            [
                name,
                f"{of['p50_ms']:,.0f}",
                f"{of['p95_ms']:,.0f}",
                f"{of['p50_ratio_to_static']:.2f}, {of['p95_ratio_to_static']:.2f}",
                f"{of['p50_ratio_to_ideal']:.2f}, {of['p95_ratio_to_ideal']:.2f}",
                f"{of['load_max_over_mean']:.2f}, {of['load_max_over_mean_p95']:.2f}",
                percent(of["phase2_rate"]),
                f"{of['swapped_experts_a_batch']:.1f}",
            ]
            for name, of in sorted(setting["modes"].items(), key=lambda one: -one[1]["p50_ms"])
        ]
        head = ("mode", "median ms", "p95 ms", "static over it: median, p95", "over ideal: median, p95",
                "largest load over mean: median, p95", "phase 2", "experts fetched per device and batch")  # fmt: skip
        if "workload" in setting:
            title = f"**{setting['devices']} devices, workload {setting['workload']}**: profiled the same by another seed; "
        else:
            served = ", ".join(setting["traces"])
            profiled = ", ".join(setting.get("profiles") or ()) or "first halves of the same"
            title = f"**{setting['devices']} devices, skew {setting['skew']}**: served {served}, profiled {profiled}; "
        out.append(Table(head, rows, f"{title}{setting['slow_motion']:g} times in slow motion, in its own time"))
    return out


def link_bytes(result: Result) -> list[Table]:
    """Of benchmarks/link_bytes.py: bytes between nodes for each dispatch, counted three ways."""
    rows = [
        [
            of["shape"],
            str(of["top_k"]),
            f"{of['routing']} ({of['fullest_expert']:.1f})",
            f"`{of['dispatch']}`",
            f"{of['formula_bytes']:,}",
            f"{of['counted_bytes']:,}",
            f"{(of['link_bytes'] - FRAME_BYTES * of['link_packets']) / of['counted_bytes'] - 1:+.2%}",
        ]
        for of in result["rows"]
    ]
    head = ("nodes x ranks", "top-k", "routing (fullest expert over mean)", "dispatch", "by formula", "by the ledger",
            "kernel, less headers, over the ledger")  # fmt: skip
    return [Table(head, rows, f"{result['experts']} experts; {result['repeats']} times the exchanges of one step")]


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


KINDS: Mapping[str, Callable[[Any], list[Table]]] = {
    "ladder": ladder,
    "pipelines": pipelines,
    "torch_pipelines": torch_pipelines,
    "validation": validation,
    "host_time": host_time,
    "host_before": host_before,
    "both_speeds": both_speeds,
    "muon_wire": muon_wire,
    "muon_train": muon_train,
    "long_context": long_context,
    "import": imports,
    "museum": museum,
    "dense_training": dense_training,
    "peers": peers,
    "link_bytes": link_bytes,
    "inference": inference,
}
