"""Lancet's ablation: what do deferred weight gradients and the partition of the forward pass gain, each by itself and together?

    sudo python benchmarks/lancet.py --json FILE --plot PNG          (a quarter of an hour on an idle machine; root, iproute2)
    sudo python benchmarks/lancet.py --only "4x1 light" --rounds 1   (a first look)

Nodes, links and devices are emulated (docs/cluster.md), in slow motion so that real math fits under the devices' time; trainer,
math and losses are real.  All variants take turns in one job, with and without Lina's priority and pieces.  Experts choose tokens
there, so every layer's parts exchange sizes of their own, which the whole need not: that is in the partition's times.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NONE = "none"
VARIANTS: Mapping[str, tuple[str, ...]] = {
    NONE: ("strategy.deferred_weights=none",),
    "weights": ("strategy.deferred_weights=all",),
    "partition": ("strategy.deferred_weights=none", "strategy.partition=2"),
    "partition, mirrored": ("strategy.deferred_weights=none", "strategy.partition=2", "strategy.partition_backward=mirrored"),
    "both": ("strategy.deferred_weights=all", "strategy.partition=2"),
    "both, mirrored": ("strategy.deferred_weights=all", "strategy.partition=2", "strategy.partition_backward=mirrored"),
}
LINA = ("strategy.yields=true", "strategy.partition_bytes=524288")
WITH_LINA = " + Lina"
SLOW_MOTION = {4: 3.0, 8: 6.0}  # by ranks: two cores are all their hosts
PAPER = "Lancet (section 7, 16 to 64 GPUs): steps 1.17 to 1.30x as fast, exposed communication down by 66 to 83%"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from megalina.cli.compare import exit_code

    return exit_code(lambda: ablation(args))


def ablation(args: argparse.Namespace) -> None:
    found = measure(args)
    print("\n\n".join([*map(table, found), PAPER]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if args.plot:
        draw(args.plot, found)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each setting, as `megalina.compare.results.as_json` has it."""
    from dataclasses import replace

    from megalina.cli.compare import job_of, run
    from megalina.compare.ladder import LADDER, LINK_MBIT
    from megalina.namespaces import check_host

    only = args.only.split(",") if args.only else [s.name for s in LADDER]
    if unknown := [name for name in only if name not in {s.name for s in LADDER}]:
        raise ValueError(f"--only {','.join(unknown)}: the ladder has {', '.join(s.name for s in LADDER)}")
    check_host()
    variants = {name: ("strategy=lancet", *words) for name, words in VARIANTS.items()}
    variants |= {name + WITH_LINA: (*words, *LINA) for name, words in variants.items()}
    variants["flow"] = ("strategy=flow",)
    jobs = []
    for setting in (s for s in LADDER if s.name in only):
        slow = replace(setting, slow_motion=args.slow_motion or SLOW_MOTION[setting.world])
        base = slow.all_overrides()
        jobs.append(job_of(slow, ("eager", *variants), variants=variants, base=base, link_mbit=LINK_MBIT))
    args.picture = args.trace = None
    with tempfile.TemporaryDirectory(prefix="megalina_lancet_") as folder:
        return [run(job, args, Path(folder), first=False, to_the_end=tuple(job.configs)) for job in jobs]


def table(setting: Mapping[str, Any]) -> str:
    """In Markdown.  Ratios are to the variant without anything, which is eager's list."""
    numbers = setting["strategies"]
    base = numbers[NONE]
    exposed_s = base["a2a_exposed_s"]
    lines = [
        f"**{setting['name']}** ({setting['slow_motion']:g} times in slow motion, in its own time); overrun "
        f"{setting['overrun_fraction']:.1%}{'' if setting['valid'] else ', not valid'}",
        "",
        "| variant | step ms | to none | quartiles | waits for tokens ms: forward, backward | tokens' waits | gradients ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in numbers.items():
        if name.startswith("eager"):
            continue
        low, high = (spread / base["ratio_to_eager"] for spread in m["ratio_spread"])
        waits = f"{m['a2a_exposed_forward_s'] * 1e3:.0f}, {m['a2a_exposed_backward_s'] * 1e3:.0f}"
        ratio, step_ms = base["median_step_s"] / m["median_step_s"], m["median_step_s"] * 1e3
        lines.append(
            f"| {name} | {step_ms:.0f} | {ratio:.2f} | {low:.2f} - {high:.2f} | {waits} "
            f"| {m['a2a_exposed_s'] / exposed_s - 1:+.0%} | {m['grads_exposed_s'] * 1e3:.0f} |"
        )
    return "\n".join(lines)


def draw(path: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    """PNG or SVG: of each variant the time that its device computes, and waits for tokens, forward and backward, and for the
    rest."""
    from matplotlib.figure import Figure

    shares = (("compute_s", "computes", "#2b6cb0"), ("a2a_exposed_forward_s", "waits for tokens, forward", "#e02020"),
              ("a2a_exposed_backward_s", "waits for tokens, backward", "#f28b82"),
              ("grads_exposed_s", "waits for gradients", "#dd8a1f"))  # fmt: skip
    figure = Figure(figsize=(11, 0.5 + 3.6 * len(settings)), layout="constrained")
    axes = figure.subplots(len(settings), 1, squeeze=False)[:, 0]
    for axis, setting in zip(axes, settings, strict=True):
        names = [name for name in setting["strategies"] if not name.startswith("eager")][::-1]
        left = [0.0] * len(names)
        for key, label, colour in shares:
            widths = [setting["strategies"][name][key] * 1e3 for name in names]
            axis.barh(names, widths, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        rest = [max(0.0, setting["strategies"][n]["median_step_s"] * 1e3 - done) for n, done in zip(names, left, strict=True)]
        axis.barh(names, rest, left=left, color="#cbd5e0", label="sizes, sums, host")
        axis.set_title(setting["name"], loc="left", weight="bold")
        axis.set_xlabel("milliseconds per step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, new_file, number, whole

    parser = Parser(description="Lancet's two passes, each by itself and together, measured on the emulated ladder.")
    parser.add_argument("--only", default="", metavar="A,B", help='settings of the ladder, such as "4x1 light,4x2 light"')
    parser.add_argument("--slow-motion", type=number(0, 1e6, above=True), metavar="F", help="default: 3 for 4 ranks, 6 for 8")
    parser.add_argument("--rounds", type=whole(1, 1_000_000), default=3, metavar="N", help="turns of each variant (default: 3)")
    parser.add_argument("--steps", type=whole(1, 1_000_000), default=2, metavar="N", help="timed steps a turn (default: 2)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="all numbers")
    parser.add_argument("--plot", type=new_file, metavar="PNG", help="where a step's time goes; .svg too")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
