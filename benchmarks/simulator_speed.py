"""How long the simulator takes, and how that grows with the operations of a step: layers, chunks, pieces; and with ranks.

    python benchmarks/simulator_speed.py --json speed.json
    python benchmarks/simulator_speed.py --quick

A step of a 128-expert model is simulated with all that it needs: the list made and checked, the network folded, the list walked.
Seconds are CPU time of this process on one core, the least of some tries.  An operation is an instruction of the list.  Where
they grow,
the slope of the seconds over them, both as logarithms, must not exceed 1.15 (n log n: 1.1 in this range), else the exit code is
1.  At the end two targets: the slowest of all strategies and algorithms at 48 layers on 1,024 GPUs, in 2 s and 1 GiB, and a
search of tools/plan.py over at least 500 candidates in 60 s.  --quick leaves out the large sizes and the search.
"""

import argparse
import contextlib
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools

from megalina.config import PretrainConfig  # noqa: E402
from megalina.console import StatusLine  # noqa: E402
from megalina.perfmodel.cost.instruction_bytes import bucket_specs  # noqa: E402
from megalina.perfmodel.forecast.network import network_of  # noqa: E402
from megalina.perfmodel.forecast.priced_step import PricedStep, few_collections  # noqa: E402
from megalina.perfmodel.forecast.search import plans_of  # noqa: E402
from megalina.perfmodel.sim.folding import FoldedLoads  # noqa: E402
from megalina.perfmodel.sim.network import Network  # noqa: E402
from megalina.perfmodel.sim.virtual import simulate_alike, uses_of  # noqa: E402
from megalina.step.plan import Plan  # noqa: E402

VOCAB, EXPERTS, RANKS_PER_NODE = 151936, 128, 8
STEEPEST = 1.15
TARGET_STEP_S, TARGET_STEP_MIB, TARGET_SEARCH_S, TARGET_CANDIDATES = 2.0, 1024.0, 60.0, 500
SEARCH = ("model=mixtral_8x7b", "cluster=h100_400g", "nodes=8", "--search")
ALGORITHMS = (("ring", "direct"), ("hierarchical", "hierarchical"), ("direct", "direct"))  # of sums; of all-to-alls
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One simulated step."""

    varied: str
    value: int
    operations: int
    list_s: float  # made and checked
    fold_s: float
    walk_s: float
    peak_mib: float  # of the process so far

    @property
    def total_s(self) -> float:
        return self.list_s + self.fold_s + self.walk_s


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.json and not args.json.absolute().parent.is_dir():
        print(f"--json {args.json}: there is no folder {args.json.absolute().parent}", file=sys.stderr)
        return 2
    status = StatusLine()
    with few_collections():
        rows = []
        for varied, value, config, world, plan in sizes(quick=args.quick):
            status.show(f"{varied} {value}")
            rows.append(measure(varied, value, config, world, plan))
        status.show("strategies")
        slowest = slowest_step(layers=8 if args.quick else 48, world=64 if args.quick else 1024)
        searched = None
        if not args.quick:
            status.show("search")
            searched = search_s()
    slopes = {varied: slope([r for r in rows if r.varied == varied]) for varied in ("layers", "chunks", "pieces")}
    status.end()
    met = print_all(rows, slopes, slowest, searched)
    if args.json:
        found = {"rows": [asdict(r) | {"total_s": r.total_s} for r in rows], "slopes": slopes, "steepest": STEEPEST}
        found |= {"slowest_step": slowest, "search": searched, "met": met}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if met else 1


def config_of(layers: int, world: int) -> PretrainConfig:
    """Qwen3-30B-A3B with so many layers; two micro-batches a rank."""
    from megalina.compose import compose

    given = (f"model.num_layers={layers}", f"cluster.nodes={world // RANKS_PER_NODE}", f"train.global_batch_size={2 * world}")
    fixed = ("model=qwen3_30b_a3b", "cluster=h100_400g", "parallel.zero=1", "train.micro_batch_size=1", "train.seq_len=4096")
    return compose([*fixed, "train.dtype=bfloat16", f"parallel.ep={min(EXPERTS, world)}", *given])


def sizes(*, quick: bool) -> Iterator[tuple[str, int, PretrainConfig, int, Plan]]:
    """What varies, how much of it, and the step."""
    layers, ranks, chunks, pieces = (12, 24, 48, 96), (64, 256, 1024, 4096), (2, 4, 8, 16), (4, 16, 64, 256)
    some, world = (6, 64) if quick else (24, 1024)
    if quick:
        layers, ranks, chunks, pieces = (8, 16, 24, 32), (64, 128), (4, 8, 16, 32), (8, 32, 64, 128)
    plan = Plan("lina_nopack", chunks=(2,), yields=True, piece_bytes=16 * MIB)
    for count in layers:
        yield "layers", count, config_of(count, world), world, plan
    for count in ranks:
        yield "ranks", count, config_of(some, count), count, plan
    for count in chunks:
        yield "chunks", count, config_of(some, world), world, replace(plan, chunks=(count,))
    config = config_of(some, world)
    buckets = bucket_specs(config, world, vocab_size=VOCAB)
    layer_bytes = sum(spec.numel for name, spec in buckets.items() if name.endswith(".1")) * 4
    for count in pieces:
        yield "pieces", count, config, world, Plan("priority_partition", yields=True, piece_bytes=layer_bytes // count)


def measure(varied: str, value: int, config: PretrainConfig, world: int, plan: Plan, tries: int = 3) -> Row:
    """The least of some tries."""
    tried = [step(config, world, plan, network_of(config.cluster)) for _ in range(tries)]
    operations, *seconds = min(tried, key=lambda t: sum(t[1:]))
    return Row(varied, value, int(operations), *seconds, peak_mib())


def step(config: PretrainConfig, world: int, plan: Plan, network: Network) -> tuple[float, float, float, float]:
    """Operations; CPU seconds for list, folding, walk."""
    priced = PricedStep(config, world, plan, vocab_size=VOCAB)
    sizes = priced.sizes
    moments_s = [time.process_time()]
    program = priced.program
    moments_s.append(time.process_time())
    loads = FoldedLoads(network, world, priced.ranks_of, uses_of(program, sizes), slowest=True)
    moments_s.append(time.process_time())
    simulate_alike(
        program,
        ranks=world,
        ranks_of=priced.ranks_of,
        seconds=priced.seconds,
        network=network,
        sizes=sizes,
        slowest=True,
        loads=loads,
    )
    moments_s.append(time.process_time())
    first_s, second_s, third_s = np.diff(moments_s).tolist()
    return len(program), first_s, second_s, third_s


def slope(rows: Sequence[Row]) -> float:
    """Of the seconds over the operations, both as logarithms, by least squares.  Folding doesn't depend on them."""
    seconds = [r.list_s + r.walk_s for r in rows]
    return float(np.polyfit(np.log([r.operations for r in rows]), np.log(seconds), 1)[0])


def slowest_step(*, layers: int, world: int) -> dict[str, Any]:
    """Of all strategies and algorithms."""
    config, slowest = config_of(layers, world), dict[str, Any]()
    plain = [Plan("serial"), Plan("fixed"), Plan("priority", yields=True)]
    for plan in (*plans_of(config, world, vocab_size=VOCAB), *plain):
        for algorithm, all_to_all in ALGORITHMS:
            network = replace(network_of(config.cluster), algorithm=algorithm, all_to_all=all_to_all)
            operations, *seconds = step(config, world, plan, network)
            if sum(seconds) > slowest.get("cpu_s", 0.0):
                what = f"{plan}; sums {algorithm}, all-to-alls {all_to_all}"
                slowest = {"what": what, "operations": operations, "cpu_s": sum(seconds)}
    return slowest | {"layers": layers, "ranks": world, "peak_mib": peak_mib()}


def search_s() -> dict[str, Any]:
    """A search of the planner, its start left out."""
    from megalina.cli import plan

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path, began_s = Path(folder) / "plan.json", time.process_time()
        code = plan.main([*SEARCH, "--json", str(path)])
        took_s = time.process_time() - began_s
        candidates = json.loads(path.read_text())["candidates"] if code == 0 else []
    return {"cpu_s": took_s, "candidates": len(candidates), "fit": sum(c["fits"] for c in candidates)}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_all(rows: Sequence[Row], slopes: dict[str, float], slowest: dict[str, Any], searched: dict[str, Any] | None) -> bool:
    """Whether all that was measured is as it should be."""
    print(f"{'':>14}  {'operations':>10}  {'list s':>7}  {'fold s':>7}  {'walk s':>7}  {'us each':>12}  {'peak MiB so far':>15}")
    for r in rows:
        each_us = r.total_s / r.operations * 1e6
        name = f"{r.varied} {r.value:,}"
        print(
            f"{name:>14}  {r.operations:>10,}  {r.list_s:>7.3f}  {r.fold_s:>7.3f}  {r.walk_s:>7.3f}  {each_us:>12.1f}  "
            f"{r.peak_mib:>15.0f}"
        )
    met = [value <= STEEPEST for value in slopes.values()]
    print(
        "\nseconds grow as operations to the power of " + ", ".join(f"{s:.2f} ({name})" for name, s in slopes.items()), end="; "
    )
    print(f"at most {STEEPEST}: {'met' if all(met) else 'MISSED'}")
    met.append(slowest["cpu_s"] < TARGET_STEP_S and slowest["peak_mib"] < TARGET_STEP_MIB)
    print(
        f"slowest step of {slowest['layers']} layers, {EXPERTS} experts, {slowest['ranks']:,} GPUs: {slowest['cpu_s']:.2f} s, "
        f"{slowest['operations']:,} operations, process {slowest['peak_mib']:.0f} MiB ({slowest['what']}); "
        f"target {TARGET_STEP_S:g} s, {TARGET_STEP_MIB:g} MiB: {'met' if met[-1] else 'MISSED'}"
    )
    if searched is not None:
        met.append(searched["cpu_s"] < TARGET_SEARCH_S and searched["candidates"] >= TARGET_CANDIDATES)
        print(
            f"tools/plan.py {' '.join(SEARCH)}: {searched['cpu_s']:.1f} s of CPU, {searched['candidates']} candidates, "
            f"{searched['fit']} fit; target {TARGET_SEARCH_S:g} s, {TARGET_CANDIDATES} candidates: "
            f"{'met' if met[-1] else 'MISSED'}"
        )
    return all(met)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, no search")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
