"""Inference on devices that are slow on purpose: how much does it bring to replicate popular experts, and to foresee them?

    python benchmarks/inference.py --traces A.npz B.npz --json FILE   (8 and 16 devices, two strengths of skew: an hour)
    python benchmarks/inference.py --traces A.npz B.npz --devices 8 --skew real --modes static,best
    python benchmarks/inference.py --traces A.npz B.npz --ablations     (no estimation, no phase 2, paths of 1, 3 and 6 layers)
    python benchmarks/inference.py --traces A.npz --profiles B.npz      (what is known before is of another task)
    python benchmarks/inference.py --workloads all --devices 4          (routing made to order instead of traces)

Each rank is a device with its own part of a batch.  The engine, its exchanges, its planning and its fetches are the real ones;
which experts tokens choose is replayed from routing traces (top-1 of 16 experts: 64 merged four to one by their number), so paths
through layers stay what they were, while the model behind it is tiny.  Only time is emulated: a device takes `--attention-ms`
for a layer's attention, `--experts-ms` for its experts, both of an even share of the batch, in proportion for more or fewer, and
`--expert-ms` to fetch an expert.  All are `--slow-motion` times longer, so that many ranks' real work fits into few cores under
it; what is printed is divided by it.  Planning and exchanges are not emulated: they take what they take here.  By default time is
slowed by the number of ranks that share a core, so a host has on the average as much of it as if it had a core of its own.

Profiles are recorded on the first half of each trace, or on the whole of other traces (`--profiles`); the second halves are
served, tasks taking turns batch by batch.
Modes take turns too, on the same batches.  `oracle` is `best`, told the exact counts before; `ideal` forces even routing.
Skew "paper": so many tokens are sent to random experts that the most popular one gets 5.56 times the least popular one (Lina,
figure 6).  Workloads are those of `placement_lab/workloads.py`; their profile is the same workload by another seed.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `benchmarks`, of which this is a program

from benchmarks.replay.report import PAPER, measured, table
from benchmarks.replay.routing import EXPERTS, SKEWS, Routing, routing_of, size_of
from megalina.batch import Batch
from megalina.blocks.dispatch import ONCE_PER_RANK
from megalina.config import InferConfig, ModelConfig, RouterConfig
from megalina.console import StatusLine
from megalina.failure_report import RankFailed
from megalina.launch import Stopped, run_ranks
from megalina.mesh import Mesh, all_gather_object, build_mesh
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.parallel.emulated_device import SMALLEST_SHARE, ServingDevice
from megalina.placement.planners.identity import identity
from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import read_trace
from megalina.serve.engine import Engine, EngineSettings
from megalina.serve.host_experts import HostExperts, experts_of, share_experts
from megalina.serve.modes import read_mode
from megalina.serve.policies import Served, check_infer, policy_of
from megalina.step.program import Instruction
from megalina.timeline.picture import draw
from megalina.timeline.recorder import Recorder
from placement_lab.oracle import OraclePredictor
from placement_lab.workloads import WORKLOADS, own_part

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf" / "infer"
FAILED, BAD_INPUT = 1, 2  # exit codes
WORKLOAD_LAYERS = 12  # unless --layers says otherwise
MODES = ("static", "window", "lina", "best", "oracle", "ideal")
ABLATIONS = ("static", "lina_paper", "no_estimation", "no_phase_2", "path_1", "path_6", "ideal")
VARIANTS: dict[str, tuple[str, ...]] = {  # of the mode that comes first
    "no_estimation": ("lina_paper", "infer.predictor=none", "infer.trigger=always", "infer.first_planned=0"),
    "no_phase_2": ("lina_paper", "infer.trigger=never"),
    "path_1": ("lina_paper", "infer.path_length=1", "infer.first_planned=1"),
    "path_6": ("lina_paper", "infer.path_length=6", "infer.first_planned=6"),
    "oracle": ("best", "infer.predictor=static", "infer.trigger=never"),  # `engine_of` puts an oracle in the predictor's place
}


@dataclass(frozen=True, slots=True)
class Times:
    """Of an emulated device, in slow motion."""

    attention_s: float  # an even share of tokens
    experts_s: float  # an even share of rows
    expert_s: float  # to fetch an expert


@dataclass(frozen=True, slots=True)
class OwnPart:
    """This rank's part of a batch; two ways to route it.  What is more in a batch goes to nobody."""

    ids_TL: Ids
    begin: int  # of its tokens, in the whole batch

    def replayed(self, number: int, chosen_TK: torch.Tensor) -> torch.Tensor:
        return self._sent(self.ids_TL[:, number], chosen_TK)

    def evenly(self, number: int, chosen_TK: torch.Tensor) -> torch.Tensor:
        return self._sent(np.arange(self.begin, self.begin + len(self.ids_TL)) % EXPERTS, chosen_TK)

    def _sent(self, expert_T: Ids, like_TK: torch.Tensor) -> torch.Tensor:
        sent_TK = torch.full_like(like_TK, EXPERTS)
        sent_TK[: len(expert_T), 0] = torch.from_numpy(expert_T.astype(np.int64))
        return sent_TK


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", type=Path, default=[], metavar="NPZ", help="one a task")
    parser.add_argument("--profiles", nargs="+", type=Path, default=[], metavar="NPZ", help="traces of other tasks to profile on")
    parser.add_argument("--workloads", default="", metavar="A,B", help=f"instead of traces: all, or of {', '.join(WORKLOADS)}")
    parser.add_argument("--devices", default="8,16", metavar="A,B", help="emulated devices (default: 8,16)")
    parser.add_argument("--skew", default="", metavar="A,B", help=f"of traces: {', '.join(SKEWS)} (default: real,paper)")
    parser.add_argument("--modes", default="", metavar="A,B", help=f"default: {','.join(MODES)}")
    parser.add_argument("--ablations", action="store_true", help=f"instead: {','.join(ABLATIONS)}")
    parser.add_argument(
        "--slots", type=int, default=4, help="of a device in each layer, in all modes (default: 4, as in the paper)"
    )
    parser.add_argument("--layers", type=int, default=0, help=f"default: 0, all of traces, {WORKLOAD_LAYERS} of workloads")
    parser.add_argument("--batch-tokens", type=int, default=512, help="of all devices together (default: 512)")
    parser.add_argument("--batches", type=int, default=16, help="served: of traces at most so many (default: 16)")
    parser.add_argument("--attention-ms", type=float, default=6.5, help="a layer, at even load (default: 6.5)")
    parser.add_argument("--experts-ms", type=float, default=19.5, help="a layer, at even load (default: 19.5)")
    parser.add_argument("--expert-ms", type=float, default=0.35, help="to fetch one: 4.2 MB at 12 GB/s (default: 0.35)")
    parser.add_argument(
        "--slow-motion", type=float, default=0.0, metavar="F", help="default: 0, devices over this machine's cores"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="the last batch's timeline on device 0, of the first setting")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank:
        return rank(json.loads(args.rank.read_text()))
    try:
        settings = settings_of(args)
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
    if args.traces:
        print("\n".join(["| the paper | |", "|---|---|", *(f"| {name} | {value} |" for name, value in PAPER.items())]))
    if args.json:
        args.json.write_text(json.dumps({"settings": found, "paper": PAPER}, indent=1, allow_nan=False) + "\n")
    return 0


def settings_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each number of devices and skew or workload, checked."""
    modes = args.modes.split(",") if args.modes else list(ABLATIONS if args.ablations else MODES)
    modes = modes if "static" in modes else ["static", *modes]
    if bool(args.traces) == bool(args.workloads):
        raise ValueError(f"{'both' if args.traces else 'neither'} --traces and --workloads are given: give one of them")
    if args.workloads and args.skew:
        raise ValueError(f"--skew {args.skew} is of --traces: workloads have their own")
    if args.profiles and not args.traces:
        raise ValueError("--profiles is for --traces: workloads are profiled on the same workload by another seed")
    if known := {path.resolve() for path in args.profiles} & {path.resolve() for path in args.traces}:
        raise ValueError(f"{min(known)} is both profiled and served, so it isn't held out: leave it out of --profiles")
    kind, choices = ("workload", list(WORKLOADS)) if args.workloads else ("skew", list(SKEWS))
    names = choices if args.workloads == "all" else (args.workloads or args.skew or "real,paper").split(",")
    for name in names:
        if name not in choices:
            raise ValueError(f"--{kind}{'s' * bool(args.workloads)} {name}: choose among {', '.join(choices)}")
    for name in ("batch_tokens", "batches", "attention_ms", "experts_ms"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive")
    if args.slow_motion < 0:
        raise ValueError(f"--slow-motion {args.slow_motion:g} must be positive, or 0 for devices over cores")
    if args.layers < 0:
        raise ValueError(f"--layers {args.layers}: choose 1 or more, or 0 for all")
    for path in filter(None, (args.json, args.picture)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    there = {path: len(read_trace(path).layers) for path in (*args.traces, *args.profiles)}
    layers = args.layers or min(there.values(), default=WORKLOAD_LAYERS)
    for path, most in there.items():
        if most < layers:
            raise ValueError(f"{path} has {most} MoE layers: give --layers {most} or fewer")
    settings = []
    for devices in map(int, args.devices.split(",")):
        if devices < 1 or args.batch_tokens % devices:
            raise ValueError(f"--batch-tokens {args.batch_tokens} must be a multiple of {devices} devices, one or more")
        for mode in modes:
            check_infer(replace(config_of(mode), slots_per_device=args.slots), Served(EXPERTS, 1, devices))
        for name in names:
            setting = {
                **{k: getattr(args, k) for k in ("batch_tokens", "batches", "slots")},
                **{k: getattr(args, k) for k in ("attention_ms", "experts_ms", "expert_ms")},
                "traces": [str(path.absolute()) for path in args.traces],
                "profiles": [str(path.absolute()) for path in args.profiles],
                "slow_motion": args.slow_motion or max(1.0, devices / len(os.sched_getaffinity(0))),
                "layers": layers,
                "devices": devices,
                kind: name,
                "modes": modes,
            }
            if args.workloads:
                WORKLOADS[name](size_of(setting))
            settings.append(setting)
    return settings


def config_of(mode: str) -> InferConfig:
    if mode in VARIANTS:
        base, *overrides = VARIANTS[mode]
        return replace(read_mode(CONF, base, overrides), name=mode)
    if mode == "lookahead":
        raise ValueError("traces have no hidden states, so lookahead can't be replayed: tools/evaluate_gpt_moe.py has it")
    return read_mode(CONF, mode)


def run(setting: dict[str, Any]) -> dict[str, Any]:
    picture = setting.pop("picture")
    with tempfile.TemporaryDirectory(prefix="megalina_inference_") as folder:
        spec, out = Path(folder) / "spec.json", Path(folder) / "out.json"
        spec.write_text(json.dumps({**setting, "out": str(out), "picture": str(picture.absolute()) if picture else ""}))
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run_ranks([sys.executable, __file__, "--rank", str(spec)], ranks=setting["devices"], logs=Path(folder) / "l")
        return {**setting, **json.loads(out.read_text())}


# one device
def rank(spec: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    mesh = build_mesh(ep=dist.get_world_size())
    me, world = mesh.world.rank, mesh.world.size
    routing = routing_of(spec)
    served, name = len(routing.batches), spec.get("workload") or spec["skew"]
    gpt = tiny_gpt(spec["layers"])
    host = shared_experts(gpt, mesh)
    factor = spec["slow_motion"] / 1e3
    status = StatusLine()
    times = Times(spec["attention_ms"] * factor, spec["experts_ms"] * factor, spec["expert_ms"] * factor)
    even_rows = spec["batch_tokens"] // world
    engines = {mode: engine_of(mode, gpt, host, mesh, routing, times, even_rows, spec["slots"]) for mode in spec["modes"]}
    took_s: dict[str, list[float]] = {mode: [] for mode in engines}
    recorders = {mode: Recorder() for mode in engines}  # of the last batch
    for number in range(-1, served):  # the first one warms up
        own = own_part(routing.tokens_BR[max(0, number)], me)
        part = OwnPart(routing.batches[max(0, number)][own, :, 0], own.start)
        batch = batch_of(own.stop - own.start)
        order = list(engines)[number % len(engines) :] + list(engines)[: number % len(engines)]
        for mode in order:
            engine = engines[mode]
            all_gather_object(mesh, None)
            reroute = part.evenly if config_of(mode).even_routing else part.replayed
            recorder = recorders[mode] if number == served - 1 else None
            began_s = time.perf_counter()
            engine.run(batch, reroute=reroute, record=recorder, emulate=True)
            step_s = max(all_gather_object(mesh, time.perf_counter() - began_s))
            if number >= 0:
                took_s[mode].append(step_s / spec["slow_motion"])
        if me == 0:
            status.show(f"{world} devices, {name}: {number + 1}/{served}")
    late = max(late_share(engine) for engine in engines.values())
    status.end()
    if me == 0:
        modes = {mode: measured(mode, took_s, engine, served) for mode, engine in engines.items()}
        ratios = [ratio if math.isfinite(ratio) else None for ratio in routing.most_over_least]
        result = {"modes": modes, "most_over_least": ratios, "overrun_fraction": late, "served": served}
        if spec["picture"]:
            shown = {mode: recorder.events() for mode, recorder in recorders.items()}
            draw(Path(spec["picture"]), shown, note=f"emulated devices, {spec['slow_motion']:g} times in slow motion")
        Path(spec["out"]).write_text(json.dumps(result, allow_nan=False))
    for engine in engines.values():
        engine.close()
    dist.barrier()
    dist.destroy_process_group()
    return 0


def tiny_gpt(layers: int) -> GPT:
    config = ModelConfig(num_layers=layers, d_model=32, num_heads=2, num_kv_heads=2, d_ff=16, num_experts=EXPERTS)
    gpt = GPT(config, RouterConfig(top_k=1), vocab_size=64, max_positions=4096, seed=0)
    initialize(gpt, seed=0, dtype=torch.float32)
    return gpt


def shared_experts(gpt: GPT, mesh: Mesh) -> HostExperts:
    layers = [dict(gpt.layers[i].experts.named_parameters()) for i in gpt.moe_layers]
    shape, number = experts_of(layers)
    with torch.no_grad():
        return share_experts(shape, len(layers), number, lambda i: layers[i], mesh)


def batch_of(tokens: int) -> Batch:
    """Of one sequence; without a token a rank takes part with one of padding, as in decoding."""
    token_BS = torch.zeros(1, max(1, tokens), dtype=torch.int64)
    valid_BS = torch.full_like(token_BS, tokens > 0, dtype=torch.bool)
    position_BS = torch.arange(token_BS.shape[1])[None]
    return Batch(token_BS, token_BS, valid_BS, valid_BS, position_BS, None, torch.zeros(1, dtype=torch.int64))


def engine_of(
    mode: str,
    gpt: GPT,
    host: HostExperts,
    mesh: Mesh,
    routing: Routing,
    times: Times,
    even_rows: int,
    slots: int,
) -> Engine:
    config, served = replace(config_of(mode), slots_per_device=slots), Served(EXPERTS, 1, mesh.world.size)
    row_s = times.experts_s / even_rows
    config = replace(config, row_us=row_s * 1e6, replan_ms=slots * times.expert_s * 1e3)
    policy = policy_of(config, served, routing.profile)
    if mode == "oracle":
        policy = replace(policy, predictor=oracle_of(routing))
    resident = identity(np.ones(EXPERTS), served.num_devices, slots)
    engine = Engine(
        gpt,
        host,
        mesh,
        policy,
        [resident] * len(gpt.moe_layers),
        EngineSettings(combine_chunks=config.combine_chunks, once_per_rank=config.dispatch == ONCE_PER_RANK),
        device=ServingDevice(partial(seconds, times, even_rows)),
    )
    engine.slots.copy = partial(slowly, times.expert_s)
    return engine


def oracle_of(routing: Routing) -> OraclePredictor:
    """The first batch comes twice: it warms up, too."""
    return OraclePredictor(np.concatenate([routing.counts_BLE[:1], routing.counts_BLE]))


def seconds(times: Times, even_rows: int, instruction: Instruction, tokens: int, rows: int) -> float:
    """What an instruction takes on the device."""
    if instruction.name == "attention":
        return times.attention_s * tokens / even_rows
    if instruction.name == "experts":
        return times.experts_s * (SMALLEST_SHARE + rows / even_rows)
    return 0.0


def slowly(expert_s: float, to: torch.Tensor, source: torch.Tensor) -> None:
    """As long as a fetch takes on the device."""
    to.copy_(source)
    time.sleep(expert_s)


def late_share(engine: Engine) -> float:
    """Of the busiest device's time, by which real work ended later than the emulated device would have, on the worst one."""
    device = engine.device
    assert device is not None
    overrun_R, busy_R = zip(*all_gather_object(engine.mesh, (device.overrun_s, device.busy_s)), strict=True)
    return max(overrun_R) / max(*busy_R, 1e-9)


if __name__ == "__main__":
    from megalina.console import command

    command(main)
