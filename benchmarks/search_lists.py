"""What `strategy=search` finds in virtual time, against every named strategy: settings of docs/strategies.md, and random ones.

    python benchmarks/search_lists.py --json found.json
    python benchmarks/search_lists.py --random 0          # the table's settings alone

Random settings draw layers, link, experts a token, how heavy the dense gradients are, and whether weights' gradients may be
deferred.  Strategies run as in tools/draw_strategies.py: `lina` with packing 2, `lina_zero` with ZeRO-1.  The search has neither;
where one of the two is faster, it is made once more with packing 2, or with ZeRO-1, and the best counts (a row says so).

A row: milliseconds of the list found, of the best strategy, and how much less; of the best list that the search began with,
which may have the numbers (parts, chunks, deferred weights) but not the order, and how much less than that; how far the list is
above what no order of its instructions can beat, and above the least such bound of all lists that the search began with; walks in
virtual time and CPU seconds of the search; which strategy it resembles, by what lies under what (megalina/timeline/hidden.py),
with the mean difference of these shares; and how far the list is from the one that its plan's numbers give, instruction by
instruction (Kendall's tau as a distance).  Exit code 1 where a strategy is faster than what was found.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools

from megalina.arguments import Parser, new_file, whole  # noqa: E402
from megalina.console import StatusLine  # noqa: E402
from megalina.perfmodel.sim.list_search import Found  # noqa: E402
from megalina.perfmodel.sim.lower_bound import lower_bound  # noqa: E402
from megalina.step.order import distance, order_of  # noqa: E402
from megalina.step.program import Program  # noqa: E402
from megalina.step.strategy import STRATEGIES, training_step  # noqa: E402
from megalina.timeline.hidden import Hidden, hidden  # noqa: E402
from tools.draw_strategies import EXTRA, Cluster, VirtualJob, ladder_job  # noqa: E402

EXACT = 1 + 1e-9  # of a time: rounding
HEAVY = ("model.num_heads=7", "model.num_kv_heads=7")
NAMED = [name for name in STRATEGIES if name != "search"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where lists are compared."""

    name: str
    overrides: tuple[str, ...]
    cluster: Cluster
    deferred: bool = True  # weights' gradients may be


TABLE = (
    Place("500 Mbit/s, light", (), Cluster()),
    Place("500 Mbit/s, heavy", HEAVY, Cluster()),
    Place("10 Gbit/s, light", (), Cluster(link_mbit=10_000, latency_ms=0.1)),
)


@dataclass(frozen=True, slots=True)
class Row:
    place: str
    found_ms: float
    plan: str
    best_ms: float
    best: str
    begun_ms: float  # of the best list that the search began with
    named_ms: dict[str, float]
    above_bound: float  # of the list's own instructions
    above_least_bound: float  # of all lists that the search began with
    evaluations: int
    search_s: float
    instructions: int
    nearest: str
    distance: float
    hidden: Hidden
    moved: float  # distance from the list of the plan's numbers
    with_other: str  # what the job had that strategies of the same name have: "", "packing 2", "ZeRO-1"

    @property
    def saved(self) -> float:
        return 1 - self.found_ms / self.best_ms


def places(count: int) -> list[Place]:
    """The table's, and so many that are drawn."""
    random, out = Random(0), list(TABLE)
    for _ in range(count):
        layers, top_k = random.randint(2, 12), random.choice((1, 2, 4, 8))
        link_mbit, heavy = round(100 * 100 ** random.random()), random.random() < 0.5
        deferred = random.random() < 0.5
        words = [f"{layers} layers", f"{link_mbit} Mbit/s", f"top-{top_k}", *(["heavy"] if heavy else [])]
        overrides = (
            "strategy.packing_memory_gb=0",
            f"model.num_layers={layers}",
            "model.num_experts=8",
            f"router.top_k={top_k}",
            *(HEAVY if heavy else ()),
        )
        name = ", ".join(words) + ("" if deferred else ", none deferred")
        out.append(Place(name, overrides, Cluster(link_mbit=link_mbit, latency_ms=random.choice((0.1, 1.0))), deferred))
    return out


def job_of(place: Place, strategy: str, *more: str) -> VirtualJob:
    return ladder_job(f"strategy={strategy}", *EXTRA.get(strategy, ()), *place.overrides, *more, cluster=place.cluster)


def compared(place: Place, evaluations: int) -> Row:
    names = [name for name in NAMED if place.deferred or name != "lancet"]
    jobs = {name: job_of(place, name) for name in names}
    programs = {name: training_step(name, job.setting) for name, job in jobs.items()}
    named_ms = {name: 1e3 * job.step(programs[name]).step_s for name, job in jobs.items()}
    walks = f"strategy.search_evaluations={evaluations}"
    began_s = time.process_time()
    job = job_of(place, "search", walks)
    found, other = job.found(deferred=place.deferred), ""
    used = found.evaluations
    for name, title, override in (("lina", "packing 2", "strategy.packing=2"), ("lina_zero", "ZeRO-1", "parallel.zero=1")):
        if named_ms[name] < 1e3 * found.step_s:
            again = job_of(place, "search", walks, override)
            second = again.found(deferred=place.deferred)
            used += second.evaluations
            if second.step_s < found.step_s:
                job, found, other = again, second, title
    search_s = time.process_time() - began_s
    best = min(named_ms, key=named_ms.__getitem__)
    shares = {name: hidden(jobs[name].step(program).events(0)) for name, program in programs.items()}
    own = hidden(job.step(found.program).events(0))
    nearest = min(shares, key=lambda name: own.distance(shares[name]))
    return Row(
        place.name,
        1e3 * job.step(found.program).step_s,
        str(replace(found.plan, times_us=(), order=())),
        named_ms[best],
        best,
        1e3 * min(step_s for _, step_s in found.begun_s),
        named_ms,
        found.step_s / bound_s(job, found.program) - 1,
        found.step_s / least_bound_s(job, found) - 1,
        used,
        search_s,
        len(found.program),
        nearest,
        own.distance(shares[nearest]),
        own,
        moved(job, found),
        other,
    )


def moved(job: VirtualJob, found: Found) -> float:
    """How far the list is from the one that it began with."""
    plan = replace(found.plan, order=())
    return distance(order_of(found.program), order_of(training_step(plan.strategy, job.priced.setting.under(plan))))


def bound_s(job: VirtualJob, program: Program) -> float:
    step = job.priced
    ranks_of, seconds = step.ranks_of, step.seconds
    found = lower_bound([program], ranks_of=ranks_of, seconds=lambda _, s: seconds(s), network=job.network, sizes=step.sizes)
    return found["bound_s"]


def least_bound_s(job: VirtualJob, found: Found) -> float:
    """Of the lists of all plans that the search began with."""
    setting = job.priced.setting
    plans = (replace(plan, times_us=()) for plan, _ in found.begun_s)
    return min(bound_s(job, training_step(plan.strategy, setting.under(plan))) for plan in plans)


def text_of(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    head = (
        *("setting", "search", "best strategy", "saved", "best start", "by its order", "above its bound", "above the least"),
        *("walks", "CPU s"),
        *("plan", "resembles (difference)", "what it hides", "moved (tau)"),
    )
    out = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        plan = row.plan + (f"; {row.with_other}" if row.with_other else "")
        cells = (
            row.place,
            f"{row.found_ms:.1f}",
            f"{row.best_ms:.1f} `{row.best}`",
            f"{row.saved:.1%}",
            f"{row.begun_ms:.1f}",
            f"{1 - row.found_ms / row.begun_ms:.1%}",
            f"{row.above_bound:.1%}",
            f"{row.above_least_bound:.1%}",
            row.evaluations,
            f"{row.search_s:.1f}",
            plan,
            f"`{row.nearest}` {row.distance:.2f}",
            row.hidden,
            f"{row.moved:.3f}",
        )
        out.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--random", type=whole(), default=20, metavar="N", help="random settings besides the table's (default: 20)"
    )
    parser.add_argument(
        "--evaluations", type=whole(1), default=32_000, metavar="N", help="walks in virtual time of a search (default: 32000)"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE")
    args = parser.parse_args(argv)
    rows = []
    status = StatusLine()
    for number, place in enumerate(wanted := places(args.random), start=1):
        status.show(f"{number} of {len(wanted)}: {place.name}")
        rows.append(compared(place, args.evaluations))
    status.end()
    print(text_of(rows))
    slower = [row for row in rows if row.found_ms > row.best_ms * EXACT]
    for row in slower:
        print(f"{row.place}: {row.best} is faster than what was found", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) | {"saved": row.saved} for row in rows], indent=1) + "\n")
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
