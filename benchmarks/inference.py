"""Inference on devices that are slow on purpose: how much does it bring to replicate popular experts, and to foresee them?

    python benchmarks/inference.py --traces A.npz B.npz --json FILE     (16 emulated devices, two strengths of skew, half an hour)
    python benchmarks/inference.py --traces A.npz B.npz --devices 8 --skew real --modes static,best
    python benchmarks/inference.py --traces A.npz B.npz --ablations     (no estimation, no phase 2, paths of 1, 3 and 6 layers)

Each rank is a device with its own part of a batch.  The engine, its exchanges, its planning and its fetches are the real ones;
which experts tokens choose is replayed from routing traces (top-1 of 16 experts: 64 merged four to one by their number), so paths
through layers stay what they were, while the model behind it is tiny.  Only time is emulated: a device takes `--attention-ms`
for a layer's attention, `--experts-ms` for the experts of an even share of rows, in proportion for more or fewer, and
`--expert-ms` to fetch an expert.  All are `--slow-motion` times longer, so that many ranks' real work fits into two cores under
it; what is printed is divided by it.  Planning is not emulated: it takes what it takes here, where all ranks share two cores.

Profiles are recorded on the first half of each trace; the second halves are served, the two tasks taking turns batch by batch.
Modes take turns too, on the same batches.  `ideal` forces even routing.  Skew "paper": so many tokens are sent to random experts
that the most popular one gets 5.56 times the least popular one (Lina, figure 6).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalina.batch import Batch
from megalina.comm.objects import everybodys
from megalina.config import InferConfig, ModelConfig, RouterConfig
from megalina.infer.engine import Engine, EngineSettings
from megalina.infer.functions import InferenceFunctions
from megalina.infer.host_experts import HostExperts, experts_of, share_experts
from megalina.infer.modes import read_mode
from megalina.infer.policies import Served, check_infer, policy_of
from megalina.launch import RankFailed, Stopped, run_ranks
from megalina.mesh import Mesh, build_mesh
from megalina.model.gpt import GPT
from megalina.model.init import initialise
from megalina.parallel.emulated_device import SMALLEST_SHARE, EmulatedDevice
from megalina.placement.planners.identity import identity
from megalina.placement.routing_trace import (
    RoutingTrace,
    batches,
    best_first,
    halves,
    joined,
    merged_experts,
    probability_for_skew,
    read_trace,
    rerouted_evenly,
    skew,
    top1,
)
from megalina.step.program import Stage
from megalina.timeline.picture import draw

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf" / "infer"
FAILED, BAD_INPUT = 1, 2  # exit codes
EXPERTS, PAPER_SKEW = 16, 5.56
MODES = ("static", "window", "lina", "best", "ideal")
ABLATIONS = ("static", "lina", "no_estimation", "no_phase_2", "path_1", "path_6", "ideal")
VARIANTS: dict[str, tuple[str, ...]] = {  # of lina
    "no_estimation": ("infer.predictor=none", "infer.trigger=always", "infer.first_planned=0"),
    "no_phase_2": ("infer.trigger=never",),
    "path_1": ("infer.path_length=1", "infer.first_planned=1"),
    "path_6": ("infer.path_length=6", "infer.first_planned=6"),
}
PAPER = {  # Lina, section 7.3, 16 experts; the last three to the ideal
    "median, static to lina": "1.45 - 1.46x (I1, I2)",
    "p95, static to lina": "1.68 - 1.82x, mean 1.63x (I3)",
    "no estimation, median": "+18.6 - 24.0% (I6)",
    "no phase 2, p95": "+26.7 - 33.1% (I7)",
    "l = 1 / 3 / 6, median to ideal": "1.34 - 1.41 / 1.07 - 1.16 / 1.00 - 1.19 (table 5)",
}


@dataclass(frozen=True, slots=True)
class Times:
    """Of an emulated device, in slow motion."""

    attention_s: float
    experts_s: float  # an even share of rows
    expert_s: float  # to fetch an expert


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", type=Path, required=True, metavar="NPZ", help="one a task")
    parser.add_argument("--devices", default="8,16", metavar="A,B", help="emulated devices (default: 8,16)")
    parser.add_argument("--skew", default="real,paper", metavar="A,B", help="real, paper, balanced (default: real,paper)")
    parser.add_argument("--modes", default="", metavar="A,B", help=f"default: {','.join(MODES)}")
    parser.add_argument("--ablations", action="store_true", help=f"instead: {','.join(ABLATIONS)}")
    parser.add_argument(
        "--slots", type=int, default=4, help="of a device in each layer, in all modes (default: 4, as in the paper)"
    )
    parser.add_argument("--layers", type=int, default=12, help="of the trace, from its first on (default: 12)")
    parser.add_argument("--batch-tokens", type=int, default=512, help="of all devices together (default: 512)")
    parser.add_argument("--batches", type=int, default=16, help="at most so many are served (default: 16)")
    parser.add_argument("--attention-ms", type=float, default=6.5, help="a layer (default: 6.5)")
    parser.add_argument("--experts-ms", type=float, default=19.5, help="a layer, at even load (default: 19.5)")
    parser.add_argument("--expert-ms", type=float, default=0.35, help="to fetch one: 4.2 MB at 12 GB/s (default: 0.35)")
    parser.add_argument("--slow-motion", type=float, default=6.0, metavar="F", help="(default: 6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="the last batch's timeline on device 0, of the first setting")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank:
        return rank(json.loads(args.rank.read_text()))
    try:
        settings = list(settings_of(args))
        found = [run({**setting, "picture": args.picture if i == 0 else None}) for i, setting in enumerate(settings)]
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except RankFailed as error:
        print(error, file=sys.stderr)
        return FAILED
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    for result in found:
        print(table(result))
    print("\n".join(["| the paper | |", "|---|---|", *(f"| {name} | {value} |" for name, value in PAPER.items())]))
    if args.json:
        args.json.write_text(json.dumps({"settings": found, "paper": PAPER}, indent=1, allow_nan=False) + "\n")
    return 0


def settings_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each number of devices and skew, checked."""
    modes = args.modes.split(",") if args.modes else list(ABLATIONS if args.ablations else MODES)
    if "static" not in modes:
        modes = ["static", *modes]
    for skewed in args.skew.split(","):
        if skewed not in ("real", "paper", "balanced"):
            raise ValueError(f"--skew {skewed}: choose among real, paper, balanced")
    for name in ("layers", "batch_tokens", "batches", "attention_ms", "experts_ms", "slow_motion"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive")
    for path in filter(None, (args.json, args.picture)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    for path in args.traces:
        read_trace(path)
    for devices in map(int, args.devices.split(",")):
        if args.batch_tokens % devices:
            raise ValueError(f"--batch-tokens {args.batch_tokens} must be a multiple of {devices} devices")
        for mode in modes:
            check_infer(replace(config_of(mode), slots_per_device=args.slots), Served(EXPERTS, 1, devices))
        for skewed in args.skew.split(","):
            yield {
                **{k: getattr(args, k) for k in ("layers", "batch_tokens", "batches", "slow_motion", "slots")},
                **{k: getattr(args, k) for k in ("attention_ms", "experts_ms", "expert_ms")},
                "traces": [str(path.absolute()) for path in args.traces],
                "devices": devices,
                "skew": skewed,
                "modes": modes,
            }


def config_of(mode: str) -> InferConfig:
    if mode in VARIANTS:
        return replace(read_mode(CONF, "lina", VARIANTS[mode]), name=mode)
    if mode == "lookahead":
        raise ValueError("traces have no hidden states, so lookahead can't be replayed: tools/evaluate_gpt_moe.py has it")
    return read_mode(CONF, mode)


def run(setting: dict[str, Any]) -> dict[str, Any]:
    picture = setting.pop("picture")
    with tempfile.TemporaryDirectory(prefix="megalina_inference_") as folder:
        spec, out = Path(folder) / "spec.json", Path(folder) / "out.json"
        spec.write_text(json.dumps({**setting, "out": str(out), "picture": str(picture.absolute()) if picture else ""}))
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run_ranks(
            [sys.executable, __file__, "--traces", "-", "--rank", str(spec)], ranks=setting["devices"], logs=Path(folder) / "l"
        )
        return {**setting, **json.loads(out.read_text())}


# one device
def rank(spec: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    mesh = build_mesh(ep=dist.get_world_size())
    me, world = mesh.world.rank, mesh.world.size
    traces = [task_of(Path(path), spec["layers"], spec["skew"]) for path in spec["traces"]]
    profile = joined([halves(trace)[0] for trace in traces])
    served = taking_turns([halves(trace)[1] for trace in traces], spec["batch_tokens"])[: spec["batches"]]
    gpt = tiny_gpt(spec["layers"])
    host = shared_experts(gpt, mesh)
    factor = spec["slow_motion"] / 1e3
    times = Times(spec["attention_ms"] * factor, spec["experts_ms"] * factor, spec["expert_ms"] * factor)
    even_rows = spec["batch_tokens"] // world
    engines = {mode: engine_of(mode, gpt, host, mesh, profile, times, even_rows, spec["slots"]) for mode in spec["modes"]}
    tokens = spec["batch_tokens"] // world
    batch = batch_of(tokens)
    took_s: dict[str, list[float]] = {mode: [] for mode in engines}
    for number in range(-1, len(served)):  # the first one warms up
        own_TL = served[max(0, number)][me * tokens : (me + 1) * tokens, :, 0]
        order = list(engines)[number % len(engines) :] + list(engines)[: number % len(engines)]
        for mode in order:
            engine = engines[mode]
            if not config_of(mode).even_routing:
                engine.functions.reroute = partial(replayed, own_TL)
            everybodys(mesh, None)
            engine.recorder.on = number == len(served) - 1
            engine.recorder.begin()
            began_s = time.perf_counter()
            engine.hidden(batch)
            engine.recorder.end()
            step_s = max(everybodys(mesh, time.perf_counter() - began_s))
            if number >= 0:
                took_s[mode].append(step_s / spec["slow_motion"])
        if me == 0:
            print(f"\r{world} devices, {spec['skew']}: {number + 1}/{len(served)} ", end="", file=sys.stderr, flush=True)
    late = max(everybodys(mesh, max(late_share(engine) for engine in engines.values())))
    if me == 0:
        print(file=sys.stderr)
        counts = [skew(trace) for trace in traces]
        modes = {mode: measured(mode, took_s, engine, len(served)) for mode, engine in engines.items()}
        result = {"modes": modes, "most_over_least": counts, "overrun_fraction": late, "served": len(served)}
        if spec["picture"]:
            shown = {mode: engine.recorder.events() for mode, engine in engines.items()}
            draw(Path(spec["picture"]), shown, note=f"emulated devices, {spec['slow_motion']:g} times in slow motion")
        Path(spec["out"]).write_text(json.dumps(result, allow_nan=False))
    for engine in engines.values():
        engine.close()
    dist.barrier()
    dist.destroy_process_group()
    return 0


def task_of(path: Path, layers: int, skewed: str) -> RoutingTrace:
    """Top-1 of 16 experts, of the first layers."""
    whole = read_trace(path)
    trace = merged_experts(top1(best_first(whole)), EXPERTS)
    if len(trace.layers) < layers:
        raise ValueError(f"{path} has {len(trace.layers)} MoE layers: give --layers {len(trace.layers)} or fewer")
    trace = replace(trace, expert_ids_TLK=trace.expert_ids_TLK[:, :layers], layers=trace.layers[:layers], weights_TLK=None)
    if skewed == "paper":
        return rerouted_evenly(trace, probability_for_skew(trace, PAPER_SKEW), seed=0)
    return rerouted_evenly(trace, 1.0, seed=0) if skewed == "balanced" else trace


def taking_turns(traces: Sequence[RoutingTrace], tokens: int) -> list[Any]:
    lists = [list(batches(trace, tokens, drop_last=True)) for trace in traces]
    return [batch for turn in zip(*lists, strict=False) for batch in turn]


def replayed(own_TL: Any, number: int, chosen_TK: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(own_TL[:, number]).astype(np.int64)).view_as(chosen_TK)


def tiny_gpt(layers: int) -> GPT:
    config = ModelConfig(num_layers=layers, d_model=32, num_heads=2, num_kv_heads=2, d_ff=16, num_experts=EXPERTS)
    gpt = GPT(config, RouterConfig(top_k=1), vocab_size=64, max_positions=4096, seed=0)
    initialise(gpt, seed=0, dtype=torch.float32)
    return gpt


def shared_experts(gpt: GPT, mesh: Mesh) -> HostExperts:
    layers = [dict(gpt.layers[i].experts.named_parameters()) for i in gpt.moe_layers]
    shape, number = experts_of(layers)
    with torch.no_grad():
        return share_experts(shape, len(layers), number, lambda i: layers[i], mesh)


def batch_of(tokens: int) -> Batch:
    token_BS = torch.zeros(1, tokens, dtype=torch.int64)
    everything = torch.ones_like(token_BS, dtype=torch.bool)
    return Batch(token_BS, token_BS, everything, everything, torch.arange(tokens)[None], None, torch.zeros(1, dtype=torch.int64))


def engine_of(
    mode: str,
    gpt: GPT,
    host: HostExperts,
    mesh: Mesh,
    profile: RoutingTrace,
    times: Times,
    even_rows: int,
    slots: int,
) -> Engine:
    config, served = replace(config_of(mode), slots_per_device=slots), Served(EXPERTS, 1, mesh.world.size)
    row_s = times.experts_s / even_rows
    config = replace(config, row_us=row_s * 1e6, replan_ms=slots * times.expert_s * 1e3)
    resident = identity(np.ones(EXPERTS), served.num_devices, slots)
    engine = Engine(
        gpt,
        host,
        mesh,
        policy_of(config, served, profile),
        [resident] * len(gpt.moe_layers),
        EngineSettings(spare_experts=2 * slots),
        device=lambda functions: EmulatedDevice(partial(seconds, functions, times, even_rows)),
    )
    engine.slots.copy = partial(slowly, times.expert_s)
    if config.even_routing:
        engine.functions.reroute = lambda number, chosen_TK: (
            (torch.arange(chosen_TK.numel()) + mesh.world.rank * chosen_TK.numel()).view_as(chosen_TK) % EXPERTS
        )
    return engine


def seconds(functions: InferenceFunctions, times: Times, even_rows: int, stage: Stage) -> float:
    """What a stage takes on the device."""
    if stage.name == "attention":
        return times.attention_s
    if stage.name == "experts":
        return times.experts_s * (SMALLEST_SHARE + functions.rows_here / even_rows)
    return 0.0


def slowly(expert_s: float, to: torch.Tensor, source: torch.Tensor) -> None:
    """As long as a fetch takes on the device."""
    to.copy_(source)
    time.sleep(expert_s)


def late_share(engine: Engine) -> float:
    """Of the device's time, by which real work ended later than the emulated device would have."""
    device = engine.device
    assert device is not None
    return device.overrun_s / max(device.busy_s, 1e-9)


def measured(mode: str, took_s: dict[str, list[float]], engine: Engine, batches: int) -> dict[str, Any]:
    own, static, ideal = took_s[mode], took_s["static"], took_s.get("ideal")
    decided = engine.controller.decided
    loads = [most / mean for d in decided for most, mean in zip(d.largest_load[1:], d.mean_load[1:], strict=True)]
    planned = sum(d.batches for d in decided[engine.controller.policy.first_planned :])
    done = asdict(engine.slots.done)
    return {
        "p50_ms": statistics.median(own) * 1e3,
        "p95_ms": p95(own) * 1e3,
        "p50_ratio_to_static": statistics.median(static) / statistics.median(own),
        "p95_ratio_to_static": p95(static) / p95(own),
        "p95_ratio_to_ideal": p95(own) / p95(ideal) if ideal else None,
        "p50_ratio_to_ideal": statistics.median(own) / statistics.median(ideal) if ideal else None,
        "ratio_spread": [float(q) for q in np.quantile([s / o for s, o in zip(static, own, strict=True)], [0.25, 0.75])],
        "load_max_over_mean": statistics.median(loads),
        "load_max_over_mean_p95": p95(loads),
        "phase2_rate": sum(d.replanned for d in decided) / max(1, planned),
        "swapped_experts_a_batch": done["experts"] / (batches + 1),
        "failed_fetches": done["failed"],
        "waited_ms_a_batch": done["waited_s"] / (batches + 1) * 1e3,
        "batch_ms": [s * 1e3 for s in own],
    }


def p95(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.95))


def table(result: dict[str, Any]) -> str:
    least = ", ".join(f"{s:.1f}" for s in result["most_over_least"])
    late = result["overrun_fraction"]
    valid = "" if late <= 0.05 else " (more than 5%: not valid)"
    lines = [
        f"**{result['devices']} emulated devices, skew {result['skew']}**: most over least popular {least}; "
        f"{result['served']} batches of {result['batch_tokens']} tokens; "
        f"{result['slow_motion']:g} times in slow motion; overrun {late:.1%}{valid}",
        "",
        "| mode | median ms | p95 ms | static / it: median | p95 | it / ideal: median | p95 | load max/mean, p95 | phase 2 "
        "| fetched |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, m in result["modes"].items():
        ideal = [f"{m[k]:.2f}" if m[k] else "" for k in ("p50_ratio_to_ideal", "p95_ratio_to_ideal")]
        lines.append(
            f"| {mode} | {m['p50_ms']:.0f} | {m['p95_ms']:.0f} | {m['p50_ratio_to_static']:.2f} | {m['p95_ratio_to_static']:.2f} "
            f"| {ideal[0]} | {ideal[1]} | {m['load_max_over_mean']:.2f}, {m['load_max_over_mean_p95']:.2f} "
            f"| {m['phase2_rate']:.0%} | {m['swapped_experts_a_batch']:.1f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
