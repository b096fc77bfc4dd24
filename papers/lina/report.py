"""The tables that tools/reproduce_lina.py prints, its JSON, and its picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from papers.lina.models import SEQ_LEN, SEQUENCES
from papers.lina.row import CONTRADICTIONS, Row, mean_absolute
from papers.lina.walk import Constants
from papers.lina.what_if import Exposed


@dataclass(frozen=True, slots=True)
class Found:
    """All that comes of a re-enactment."""

    constants: Constants
    rows: Sequence[Row]
    exposed: Sequence[Exposed]
    packed: dict[int, dict[int, float]]
    placed: dict[str, dict[str, float]]
    routing: str

    def split(self) -> tuple[list[Row], list[Row]]:
        """Rows with a residual: fitted (or put in), held out."""
        numbers = [row for row in self.rows if row.residual is not None]
        return [r for r in numbers if r.fitted], [r for r in numbers if not r.fitted]

    def as_json(self) -> dict[str, Any]:
        fitted, held_out = self.split()
        return {
            "constants": asdict(self.constants),
            "routing": self.routing,
            "rows": [row.as_json() for row in self.rows],
            "mean_absolute_residual": {
                "fitted": mean_absolute([row for row in fitted if not row.put_in]),
                "held_out": mean_absolute(held_out),
            },
            "what_if": {
                "exposed": [e.as_json() for e in self.exposed],
                "packed": self.packed,
                "placed": self.placed,
            },
            "contradictions": CONTRADICTIONS,
        }


def constants_table(constants: Constants, domain_gbyte_s: float, node_gbyte_s: float) -> str:
    """`domain_gbyte_s`, `node_gbyte_s`: what collectives reach by the cluster's file: of a GPU's port, of a node's link."""
    meaning = {
        "inside_factor": f"all-to-all inside a node: {domain_gbyte_s / constants.inside_factor:.2f} GB/s a GPU",
        "between_factor": f"all-to-all over nodes: {node_gbyte_s / constants.between_factor:.2f} GB/s a node",
        "gradient_factor": "all-reduce, in its bytes",
        "experts_factor": "experts, in the roofline's time",
        "gate_factor": "gate, mix, cut, join, in the roofline's time",
        "attention_factor": "attention, in the roofline's time",
        "outside_ms": "ms a step or batch besides",
    }
    lines = [f"  {name:<17} {value:8.3f}  {meaning[name]}" for name, value in asdict(constants).items()]
    return "\n".join([f"fitted, if a GPU's batch is {SEQUENCES} sequences of {SEQ_LEN} tokens (assumed):", *lines])


def table(rows: Sequence[Row]) -> str:
    """One line a row; fit: constants were fitted on it; in: it was put in; letters are `contradictions`."""
    head = f"{'id':<26} {'paper':>8} {'simulated':>9} {'residual':>8}  fit  marks  name"
    return "\n".join([head, *map(_line, rows)])


def _line(row: Row) -> str:
    simulated = _shown(row.simulated, row.unit)
    if isinstance(row.paper, str):
        paper, simulated = "says", {True: "holds", False: "doesn't", None: "-"}[row.simulated]  # type: ignore[index]
        name = f"{row.name}: {row.paper}"
    else:
        paper, name = _shown(row.paper, row.unit), row.name
    residual = "" if row.residual is None else f"{100 * row.residual:+.1f}%"
    used = "in " if row.put_in else "fit" if row.fitted else "   "
    note = f" ({row.note})" if row.simulated is None else ""
    return f"{row.id:<26} {paper:>8} {simulated:>9} {residual:>8}  {used}  {row.marks:<5}  {name}{note}"


def _shown(value: float | bool | None, unit: str) -> str:
    if value is None or isinstance(value, bool):
        return "-"
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return text + {"x": "x", "%": "%"}.get(unit, f" {unit}" if unit == "ms" else "")


def closing(found: Found) -> str:
    """Residuals of fitted and of held-out rows apart, by part of the paper, and the statements."""
    fitted, held_out = found.split()
    of_fit = [row for row in fitted if not row.put_in]
    parts = {"Table 1 and Figures 2-9": "Tab1", "training": "T", "inference": "I"}
    lines = [
        f"mean absolute residual: {100 * mean_absolute(held_out):.1f}% over {len(held_out)} rows held out, "
        f"{100 * mean_absolute(of_fit):.1f}% over {len(of_fit)} that constants were fitted on; {len(fitted) - len(of_fit)} put in"
    ]
    for name, part in parts.items():
        own = [r for r in held_out if part_of(r) == part]
        lines.append(f"  held out, {name}: {100 * mean_absolute(own):.1f}% over {len(own)}")
    said = [r for r in found.rows if isinstance(r.paper, str) and r.simulated is not None]
    missing = [r for r in found.rows if r.simulated is None]
    lines.append(f"statements: {sum(r.simulated is True for r in said)} of {len(said)} hold; not simulated: {len(missing)} rows")
    return "\n".join(lines)


def part_of(row: Row) -> str:
    """Tab1 (overheads and figures), T (training) or I (inference)."""
    if row.id.startswith(("Tab5", "Tab6", "I")):
        return "I"
    return "T" if row.id.startswith("T") and not row.id.startswith("Tab") else "Tab1"


def what_if(found: Found) -> str:
    experts = (2, 4, 8, 16)
    lines = [
        "what if all-reduces were larger?  Gain of priority and partitioning (T10: 1.36 to 1.42x) at 2, 4, 8, 16 experts",
        f"{'bytes':>6}  {'over ddp':<27}  {'over a baseline that overlaps nothing':<38} all-to-alls that meet gradients",
    ]
    for e in found.exposed:
        cells = ["  ".join(f"{by[n]:.2f}x" for n in experts) for by in (e.overlapping, e.serial)]
        lines.append(f"{e.times:>5g}x  {cells[0]:<27}  {cells[1]:<38} {100 * e.meeting:.0f}%")
    lines += ["", "what if it packed otherwise?  All of Lina over ddp, by experts a GPU"]
    for number, by in found.packed.items():
        lines.append(f"  {number:>2} experts: " + "  ".join(f"{k}: {gain:.2f}x" for k, gain in by.items()))
    lines += ["", "what could placement gain at inference?  The baseline's median over that of each"]
    for name, gains in found.placed.items():
        lines.append(f"  {name}: " + "  ".join(f"{mode} {gain:.2f}x" for mode, gain in gains.items()))
    return "\n".join(lines)


def contradictions(rows: Sequence[Row]) -> str:
    used = sorted(set("".join(row.marks for row in rows)))
    return "\n".join(["where the paper's own numbers disagree:", *(f"  {letter}  {CONTRADICTIONS[letter]}" for letter in used)])


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Simulated over the paper's, row by row; fitted and held-out rows in different marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    titles = {"Tab1": "overheads (Table 1, Figures 2-9)", "T": "training (T1-T15)", "I": "inference (I1-I10, Table 5)"}
    figure = Figure(figsize=(9, 10.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (part, title) in zip(axes, titles.items(), strict=True):
        own = [r for r in rows if r.residual is not None and part_of(r) == part]
        for row, y in zip(own, range(len(own), 0, -1), strict=True):
            ratio = 1 + (row.residual or 0.0)
            shown = min(max(ratio, 0.05), 4.0)
            mark, colour = ("o", "tab:blue") if row.fitted else ("D", "tab:orange")
            if ratio != shown:
                mark = "<" if ratio < shown else ">"
            face = "white" if row.fitted else colour
            axis.plot([1, shown], [y, y], color="0.8", lw=1, zorder=1)
            axis.plot(shown, y, mark, color=colour, mfc=face, ms=5, zorder=2)
        axis.set_xscale("log")
        axis.set_xticks([0.05, 0.1, 0.25, 0.5, 1, 2, 4])
        axis.minorticks_off()
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlim(0.04, 5)
        axis.axvline(1, color="0.3", lw=1)
        axis.set_yticks(range(len(own), 0, -1), [r.id.removeprefix("Tab1.") for r in own], fontsize=6.5)
        axis.set_ylim(0, len(own) + 1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("simulated / paper", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
    legend = (
        ("fitted or put in", "o", "tab:blue", "white"),
        ("held out", "D", "tab:orange", "tab:orange"),
        ("held out, off the scale", "<", "tab:orange", "tab:orange"),
    )
    for label, mark, colour, face in legend:
        axes[0].plot([], [], mark, color=colour, mfc=face, ms=5, label=label)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
