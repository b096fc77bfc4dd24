"""The report of a popularity lab: its results as tables and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalina.serve.policies import SPLITS


def report(result: Mapping[str, Any]) -> str:
    """All tables, for people."""
    tables = [_head(result), _predictors(result), _planners(result), _triggers(result), _modes(result), _solved(result)]
    return "\n\n".join(filter(None, tables))


def _head(result: Mapping[str, Any]) -> str:
    s = result["settings"]
    train, serve = ([f"{trace['name']} ({trace['tokens']} tokens)" for trace in s[key]] for key in ("train", "serve"))
    between = " and, in turn, " if s["alternate"] else ", then "
    warm_up = f" (not counted: the first {s['warm_up_batches']})" if s["warm_up_batches"] else ""
    return (
        f"{s['experts']} experts, top-{s['top_k']}, on {s['devices']} devices of {s['slots']} slots; {s['batches']} batches of "
        f"{s['batch_tokens']} tokens{warm_up}; MoE layers {s['first_layer']} to {s['layers'] - 1} count\n"
        f"trained on {', '.join(train)}\nserved {between.join(serve)}\n"
        "Loads are the busiest device's rows over the mean device's: median / 95th percentile over batches and layers."
    )


def _predictors(result: Mapping[str, Any]) -> str:
    lines = [
        ("predictor", "even split", "load-aware", "same list", "recall", "misordered", "L1", "moved", "predict us", "plan us")
    ]
    for name, f in result["predictors"].items():
        accuracy = ["-"] * 4
        if "recall" in f:
            accuracy = [f"{f['same_list']:.1%}", f"{f['recall']:.1%}", f"{f['misordered']:.1f}", f"{f['distance']:.3f}"]
        times = (f"{f[key]:.0f}" if key in f else "-" for key in ("predictor_us", "planner_us"))
        lines.append((name, _load(f), _load(result["load_aware"][name]), *accuracy, f"{f['moved']:.1f}", *times))
    twice = 2 * result["settings"]["top_k"]
    title = (
        f"Predictors, planner greedy.  Same list: of the {twice} most popular, in order; recall: of the top_k most popular; "
        "moved: experts fetched a layer and batch, by all devices; us: of a rank, a layer and batch"
    )
    return _table(title, lines) + _skipped(result["skipped_predictors"])


def _planners(result: Mapping[str, Any]) -> str:
    lines = [("planner", *SPLITS, "own rank's rows, local_first", "plan us")]
    for name, by_split in result["planners"].items():
        local, took = by_split["local_first"]["local"], by_split["even"].get("planner_us")
        lines.append((name, *(_load(by_split[s]) for s in SPLITS), f"{local:.1%}", "-" if took is None else f"{took:.0f}"))
    per_node = result["settings"]["devices_per_node"]
    return _table(f"Planners and splits, predictor {result['best']}; hierarchical: nodes of {per_node} devices", lines)


def _triggers(result: Mapping[str, Any]) -> str:
    lines = [("trigger", "even: fires", "load", "load-aware: fires", "load")]
    for name, by_split in result["triggers"].items():
        cells = [cell for s in ("even", "load_aware") for cell in (f"{by_split[s]['replanned']:.1%}", _load(by_split[s]))]
        lines.append((name, *cells))
    rows = result["settings"]["replan_rows"]
    what = f"Triggers (planning anew once the router has spoken), predictor {result['best']}, planner greedy"
    return _table(f"{what}; gain: more than {rows:g} rows", lines)


def _modes(result: Mapping[str, Any]) -> str:
    lines = [("mode", "slots", "load", "planned anew", "same list", "moved")]
    for name, f in result["modes"].items():
        same = f"{f['same_list']:.1%}" if "same_list" in f else "-"
        lines.append((name, str(f["slots"]), _load(f), f"{f['replanned']:.1%}", same, f"{f['moved']:.1f}"))
    title = "Modes of conf/infer, as they are; without room for all experts they get --slots"
    return _table(title, lines) + _skipped(result["skipped_modes"])


def _skipped(why_not: Mapping[str, str]) -> str:
    """A line for each reason."""
    names = {why: [name for name, its_why in why_not.items() if its_why == why] for why in why_not.values()}
    return "".join(f"\n{', '.join(of_why)}: not replayed, it {why}" for why, of_why in names.items())


def _solved(result: Mapping[str, Any]) -> str:
    found = result["optimum"]
    if found is None:
        return ""
    which = "all" if found["cases"] == found["of"] else "a random sample"
    title = (
        f"The optimum in {found['cases']} of {found['of']} layers of batches ({which}); in {found['solver_limit_s']:g} s not "
        f"found: {found['not_found']}, found but not proven: {found['not_proven']}"
    )
    if "max_over_mean" not in found:
        return title
    lines: list[tuple[str, ...]] = [("busiest device's rows", "over", "median", "most")]
    lines.append(("optimum", "mean device", *(f"{found['max_over_mean'][key]:.3f}" for key in ("median", "max"))))
    lines += [(n, "optimum", f"{f['median']:.3f}", f"{f['max']:.3f}") for n, f in found["over_optimum"].items()]
    return _table(title, lines)


def _load(figures: Mapping[str, Any]) -> str:
    return f"{figures['median']:.3f} / {figures['p95']:.3f}"


def _table(title: str, lines: Sequence[Sequence[str]]) -> str:
    """Aligned text: names to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]) for line in lines
    ]
    return "\n".join([title, *rows])


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """PNG or SVG: the 95th percentile as bars by predictor, for both splits."""
    from matplotlib.figure import Figure

    names, s = list(result["predictors"]), result["settings"]
    figure = Figure(figsize=(8.5, 1.6 + 0.48 * len(names)), dpi=110, layout="constrained")
    axis = figure.subplots()
    height = 0.38
    for offset, key, label, colour in (
        (-1, "predictors", "even split", "#2b6cb0"),
        (1, "load_aware", "load-aware split", "#dd8a1f"),
    ):
        values = [result[key][name]["p95"] for name in names]
        places = [i + offset * height / 2 for i in range(len(names))]
        axis.barh(places, values, height, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            axis.text(value, place, f" {value:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(1, 1 + 1.1 * (max(result[key][name]["p95"] for key in ("predictors", "load_aware") for name in names) - 0.99))
    axis.set_xlabel("busiest device's rows over the mean device's, 95th percentile (1: perfect)")
    axis.spines[["top", "right"]].set_visible(False)
    served = (" in turn with " if s["alternate"] else ", then ").join(trace["name"] for trace in s["serve"])
    trained = ", ".join(trace["name"] for trace in s["train"])
    axis.set_title(
        f"{s['experts']} experts, top-{s['top_k']}, {s['devices']} devices of {s['slots']} slots, planner greedy\n"
        f"trained on {trained}\nserved {served}", fontsize=9,
    )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
