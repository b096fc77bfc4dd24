"""From which scale and skew on does it pay to replicate experts at inference, and foreseen by which predictor?  Simulated.

    python benchmarks/serving_map.py --json FILE --picture docs/images/serving-map.png      (four minutes of CPU time)
    python benchmarks/serving_map.py --models mixtral --clusters h100_400g --devices 8      (a corner of it: seconds)
    python benchmarks/serving_map.py --models lina --clusters h100_400g --devices 512       (at scale: minutes a point)
    python benchmarks/serving_map.py --plan-ms 6.2 --check-ms 1.45                          (deciding as slow as Lina's)
    python benchmarks/serving_map.py --against-measured --traces A.npz B.npz                (held against docs/log.md)

Batches are walked in virtual time (`placement_lab/serving/simulator.py`) with the predictors, planners, splits and triggers
of the engine, on the networks of `conf/cluster`, with the roofline of their devices.  Routing is made, two tasks taking turns
batch by batch (`benchmarks/serving/routing.py`); skew is the busiest expert's rows over the mean expert's.

Modes: `profile` replicates once, by the profile, and swaps nothing (as EPLB does); `window`, `lina` and `best` are those of
`conf/infer` (`best` is the online map), `even` is `best` with rows split evenly over replicas.  They plan every layer of every
batch anew and swap experts over the host's link.  `oracle` knows the counts in advance, `ideal` has even routing.  A device has a
quarter more slots than the experts need, one more at least.  Replication pays where the fastest mode is 1.05 times as fast as
static, or more.

Not in it: what splitting rows takes the host, a learned router's own surprises, other tenants of the wire.

`--against-measured` replays the batches that `benchmarks/inference.py` served on emulated devices and prints both.  What the real
host takes in each layer is one number, fitted on one row: 16 devices, the paper's skew, `ideal`, median.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.serving.tables import Point
    from megalina.config import InferConfig, PretrainConfig

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf" / "infer"
BAD_INPUT = 2  # exit code

# the map
PHASES = {"prefill": (2048, 0), "decode": (64, 4096)}  # tokens of a device in a batch; context, 0: sequences of that length
DEVICES = (8, 32, 128)
SKEWS = (1.5, 2.5, 5.0)
MANY_DEVICES = 64  # from here on the middle skew alone, for a point takes half a minute
PLAN_MODES = ("static", "lina", "best", "ideal")  # reported with plans made at other times as well
OTHER_PLANS_MS = (0.0, 6.2)  # in the middle of the map; Lina's takes 6.2 ms
NOTES = (
    "simulated: times as fast as static, and by which mode (P profile, W window, L lina, B best, E best with an even split);",
    "(1.8): ideal would gain so much, but no mode gains;  . : nothing to gain",
)
HOST_GBYTE_S = {  # of a device's link to host memory, one way; of each 80% is taken to be reached (assumed)
    "h100_400g": 64.0,  # H100 datasheet: PCIe Gen5, 128 GB/s both ways
    "gb200_nvl72": 225.0,  # GB200: NVLink-C2C, 900 GB/s both ways, for two GPUs
    "rtx4090_pcie": 31.5,  # PCI Express 4.0, 16 lanes
}
HOST_LINK_EFFICIENCY = 0.8
SHAPES: dict[str, dict[str, Any]] = {  # besides conf/model: experts as published, attention with grouped queries in place of MLA
    "v2lite": {"num_layers": 26, "d_model": 2048, "num_heads": 16, "num_kv_heads": 4, "num_experts": 64, "d_ff": 1408}
    | {"shared_d_ff": 2816, "vocab_size": 102400},  # DeepSeek-V2-Lite (arXiv:2405.04434), appendix B: 17 MB an expert
    "v3": {"num_layers": 58, "d_model": 7168, "num_heads": 128, "num_kv_heads": 8, "head_dim": 128, "num_experts": 256}
    | {"d_ff": 2048, "shared_d_ff": 2048, "vocab_size": 129280},  # DeepSeek-V3 (arXiv:2412.19437), section 4.2: 88 MB an expert
}


@dataclass(frozen=True, slots=True)
class Model:
    """`source`: a file of conf/model, or a key of SHAPES."""

    title: str
    source: str
    top_k: int
    skews: tuple[float, ...] = SKEWS


MODELS = {
    "lina": Model("Lina, 16 experts, top-1", "lina_12l_16e", 1),
    "mixtral": Model("Mixtral, 8, top-2", "mixtral_8x7b", 2, (1.5, 2.5)),  # at most 4 times the mean
    "v2lite": Model("V2-Lite, 64, top-6", "v2lite", 6),
    "v3": Model("V3, 256, top-8", "v3", 8),
}


@dataclass(frozen=True, slots=True)
class Spot:
    """A place of the map, but for the cluster."""

    model: str
    phase: str
    devices: int
    skew: float
    turns: bool = True
    slots: int = 0  # 0: as the map has them


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help=f"default: {','.join(MODELS)}")
    parser.add_argument("--clusters", default=",".join(HOST_GBYTE_S), metavar="A,B", help=f"default: {','.join(HOST_GBYTE_S)}")
    parser.add_argument("--devices", default="", metavar="A,B", help="default: 8,32,128, as far as clusters have them")
    parser.add_argument("--plan-ms", type=float, default=0.5, help="a plan of a layer, on every rank (default: 0.5)")
    parser.add_argument("--check-ms", type=float, default=0.05, help="phase 2, where it keeps the plan (default: 0.05)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="the map")
    parser.add_argument("--against-measured", action="store_true", help="instead: the table of docs/log.md, simulated")
    parser.add_argument("--traces", nargs="+", type=Path, default=[], metavar="NPZ", help="with --against-measured: one a task")
    args = parser.parse_args(argv)
    try:
        check(args)
        found, text = against_measured(args.traces) if args.against_measured else the_map(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    print(text)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return 0


def check(args: argparse.Namespace) -> None:
    for names, known, flag in ((args.models, MODELS, "--models"), (args.clusters, HOST_GBYTE_S, "--clusters")):
        for name in names.split(","):
            if name not in known:
                raise ValueError(f"{flag} {name}: choose among {', '.join(known)}")
    for word in filter(None, args.devices.split(",")):
        if not word.isdigit() or int(word) < 2:
            raise ValueError(f"--devices {word}: give numbers of devices, 2 or more")
    for name, ms in (("--plan-ms", args.plan_ms), ("--check-ms", args.check_ms)):
        if not 0 <= ms < math.inf:
            raise ValueError(f"{name} {ms:g}: give milliseconds, 0 or more")
    if args.against_measured != bool(args.traces):
        raise ValueError("--against-measured and --traces go together: it replays the traces that were measured with")
    if args.against_measured and args.picture:
        raise ValueError("--picture is of the map: leave out --against-measured")
    for path in filter(None, (args.json, args.picture)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")


# the map


def the_map(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from benchmarks.serving.figure import draw
    from benchmarks.serving.tables import map_table, modes_table, plan_table, slots_table, swap_table
    from megalina.console import StatusLine

    models, clusters = args.models.split(","), args.clusters.split(",")
    counts = [int(word) for word in args.devices.split(",")] if args.devices else list(DEVICES)
    spots = [Spot(m, p, n, s) for m in models for p in PHASES for n in counts for s in skews_of(m, n)]
    middle = [s for s in spots if s.skew == MODELS[s.model].skews[1] and s.devices == counts[len(counts) // 2]]
    catalog, began_s = catalog_of(models, clusters), time.process_time()
    jobs = [(spot, [args.plan_ms, *(OTHER_PLANS_MS if spot in middle else ())]) for spot in spots]
    jobs += [(replace(s, turns=False), [args.plan_ms]) for s in middle]
    jobs += [(replace(s, slots=n), [args.plan_ms]) for s in middle if s.phase == "prefill" for n in more_slots(s, catalog)]
    found: dict[Spot, list[Point]] = {}
    status = StatusLine()
    for number, (spot, plans_ms) in enumerate(jobs):
        own = [c for c in clusters if args.devices or spot.devices <= most_devices(catalog[spot.model, c])]
        found[spot] = points_of(spot, {c: catalog[spot.model, c] for c in own}, plans_ms, args.check_ms)
        told = f"{number + 1}/{len(jobs)} {time.process_time() - began_s:.0f} s of CPU time"
        status.show(f"{told}: {spot.model} {spot.phase} {spot.devices} devices")
    status.end()
    every = [p for own in found.values() for p in own]
    turning = [p for s in spots for p in found[s] if p.plan_s == args.plan_ms / 1e3]
    panels = {c: [p.cell for p in turning if p.cluster == c] for c in clusters}
    if args.picture:
        draw(args.picture, panels, NOTES)
    slots = [p for spot, own in found.items() if spot.phase == "prefill" and replace(spot, slots=0) in middle for p in own]
    slots = sorted((p for p in slots if p.plan_s == args.plan_ms / 1e3), key=lambda p: (p.cluster, p.row, p.slots))
    text = [
        f"A plan takes {args.plan_ms:g} ms, a check {args.check_ms:g} ms.  Cells: {' '.join(NOTES)}.\n",
        *(map_table(cluster, cells) for cluster, cells in panels.items()),
        modes_table("Two tasks take turns", turning),
        modes_table("One task for long, skew in the middle", [p for p in every if not p.turns]),
        "Can a swap hide?\n" + swap_table([p for s in middle for p in found[s] if p.plan_s == args.plan_ms / 1e3]),
        "What a plan may take\n" + plan_table([p for s in middle for p in found[s]]),
        "Slots of a device\n" + slots_table(slots),
        "Deciding, here, in Python: CPU ms of a layer (it is not in the map but as --plan-ms)\n" + deciding_table(),
    ]
    return {"plan_ms": args.plan_ms, "check_ms": args.check_ms, "points": [p.as_json() for p in every]}, "\n".join(text)


def skews_of(model: str, devices: int) -> tuple[float, ...]:
    skews = MODELS[model].skews
    return skews[1:2] if devices >= MANY_DEVICES else skews


def points_of(spot: Spot, configs: "Mapping[str, PretrainConfig]", plans_ms: Sequence[float], check_ms: float) -> "list[Point]":
    """One of each cluster and time of a plan."""
    from benchmarks.serving.sweep import Hardware, Load, Modes, mode_times
    from benchmarks.serving.tables import Point
    from megalina.serve.expert_memory import num_expert_bytes
    from placement_lab.serving.simulator import PlannerSeconds

    tokens, context = PHASES[spot.phase]
    if not configs:
        return []
    model, own = next(iter(configs.values())).model, MODELS[spot.model]
    load = Load(
        num_experts=model.num_experts,
        top_k=own.top_k,
        num_devices=spot.devices,
        device_tokens=tokens,
        slots=spot.slots or slots_of(model.num_experts, spot.devices),
        skew=spot.skew,
        turns=spot.turns,
    )
    modes, out = Modes(load, settings()), []
    for cluster, config in configs.items():
        config = replace(config, train=replace(config.train, seq_len=tokens))
        expert_s = num_expert_bytes(model, 2) / (HOST_GBYTE_S[cluster] * 1e9 * HOST_LINK_EFFICIENCY)
        for plan_ms in plans_ms:
            names = () if plan_ms == plans_ms[0] else PLAN_MODES
            planner = PlannerSeconds(plan_s=plan_ms / 1e3, check_s=check_ms / 1e3)
            hardware = Hardware(config=config, context=context, expert_s=expert_s, planner=planner)
            out.append(
                Point(
                    title=own.title,
                    phase=spot.phase,
                    devices=spot.devices,
                    skew=spot.skew,
                    turns=spot.turns,
                    cluster=cluster,
                    slots=load.slots,
                    expert_s=expert_s,
                    plan_s=plan_ms / 1e3,
                    times=mode_times(modes, hardware, names),
                )
            )
    return out


def slots_of(num_experts: int, devices: int) -> int:
    """A quarter more than needed, one more at least."""
    needed = -(-num_experts // devices)
    return needed + max(1, needed // 4)


def most_devices(config: "PretrainConfig") -> int:
    """That the cluster's file has."""
    return config.cluster.nodes * config.cluster.ranks_per_node


def more_slots(spot: Spot, catalog: "Mapping[tuple[str, str], PretrainConfig]") -> list[int]:
    """Other numbers of slots than the map's: one more than needed, and twice as many as needed."""
    num_experts = next(config.model.num_experts for (model, _), config in catalog.items() if model == spot.model)
    needed = -(-num_experts // spot.devices)
    return sorted({needed + 1, 2 * needed} - {slots_of(num_experts, spot.devices)})


def settings() -> "dict[str, InferConfig]":
    from megalina.config import InferConfig
    from megalina.serve.modes import read_mode

    found = {name: read_mode(CONF, name) for name in ("window", "lina", "best")}
    profile = InferConfig(name="profile", predictor="static", planner="greedy", split="load_aware")
    return {"profile": profile, **found, "even": replace(found["best"], name="even", split="even")}


def catalog_of(models: Sequence[str], clusters: Sequence[str]) -> "dict[tuple[str, str], PretrainConfig]":
    """Of each model on each cluster."""
    from megalina.compose import compose
    from megalina.config import ModelConfig, PretrainConfig, RouterConfig, TrainConfig

    sources = {name: MODELS[name].source for name in models}
    shapes = {n: ModelConfig(**SHAPES[s]) if s in SHAPES else compose([f"model={s}"]).model for n, s in sources.items()}
    parts = {cluster: compose([f"cluster={cluster}"]).cluster for cluster in clusters}
    train = TrainConfig(dtype="bfloat16")
    return {
        (name, cluster): PretrainConfig(model=shape, router=RouterConfig(top_k=MODELS[name].top_k), cluster=part, train=train)
        for name, shape in shapes.items()
        for cluster, part in parts.items()
    }


def deciding_table() -> str:
    """What the engine's planner and split take on this machine."""
    from megalina.placement.planners.greedy import greedy
    from megalina.placement.split import even, load_aware

    lines = ["| experts, devices, slots | greedy plan | split by load | split evenly |", "|---|---|---|---|"]
    for num_experts, devices in ((16, 16), (64, 32), (64, 128), (256, 32), (256, 128)):
        slots, random = slots_of(num_experts, devices), np.random.default_rng(0)
        share_E = random.gamma(1.0, size=num_experts)
        count_RE = random.poisson(100 * share_E, (devices, num_experts)).astype(np.int64)
        placement = greedy(share_E, devices, slots)
        asked: list[Callable[[], object]] = [
            lambda s=share_E, d=devices, n=slots: greedy(s, d, n),
            lambda c=count_RE, p=placement: load_aware(c, p),
            lambda c=count_RE, p=placement: even(c, p),
        ]
        taken_ms = [min(cpu_ms(what) for _ in range(3)) for what in asked]
        lines.append(f"| {num_experts}, {devices}, {slots} | {' | '.join(f'{ms:.2f}' for ms in taken_ms)} |")
    return "\n".join([*lines, ""])


def cpu_ms(what: Callable[[], object]) -> float:
    began_s = time.process_time()
    what()
    return (time.process_time() - began_s) * 1e3


# against what was measured


def against_measured(paths: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """ValueError for traces that have fewer layers than were measured."""
    from benchmarks.replay.routing import routing_of
    from benchmarks.serving.measured import (
        BATCH_TOKENS,
        BATCHES,
        FITTED,
        LAYERS,
        MEASURED,
        Replayed,
        fitted_host_s,
        replayed,
        table,
    )
    from megalina.console import StatusLine
    from megalina.serve.modes import read_mode

    status = StatusLine()
    common = {"traces": list(map(str, paths)), "layers": LAYERS, "batch_tokens": BATCH_TOKENS, "batches": BATCHES}
    routing = {(n, skew): routing_of({**common, "devices": n, "skew": skew}) for n, skew in MEASURED}

    def simulated(devices: int, skew: str, mode: str, host_s: float) -> "Replayed":
        status.show(f"{devices} devices, {skew}: {mode}")
        served = routing[devices, skew]
        return replayed(served.batches, served.profile, read_mode(CONF, mode), num_devices=devices, host_s=host_s)

    devices, skew, mode = FITTED
    host_s = fitted_host_s(simulated(*FITTED, 0.0), MEASURED[devices, skew][mode], LAYERS)
    found = {key: {mode: simulated(*key, mode, host_s) for mode in modes} for key, modes in MEASURED.items()}
    status.end()
    as_json = {
        "host_ms": host_s * 1e3,
        "rows": [
            {"devices": n, "skew": s, "mode": mode, "simulated": asdict(own), "measured": asdict(MEASURED[n, s][mode])}
            for (n, s), modes in found.items()
            for mode, own in modes.items()
        ],
    }
    return as_json, table(found, host_s)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # tools/
    from megalina.console import command

    command(main)
