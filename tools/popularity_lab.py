"""Popularity lab: predictors, planners, splits and triggers replayed on recorded routing.  No weights are needed.

python tools/popularity_lab.py --train A.npz --serve B.npz [--alternate] [--optimum] [--json FILE] [--plot PNG]
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalina.config import InferConfig
    from megalina.infer.policies import Served
    from megalina.placement.controller import Planner, Policy
    from megalina.placement.offline import Replay
    from megalina.placement.placement import Placement
    from megalina.placement.predictors.predictor import Floats, Ids, Predictor, Seen
    from megalina.placement.routing_trace import RoutingTrace

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf" / "infer"
BAD_INPUT = 2  # exit code
PICTURES = (".png", ".svg")
CONTESTANTS: Mapping[str, Mapping[str, Any]] = {  # settings of conf/infer; the oracle has none there
    "none": {"predictor": "none", "planner": "none"},
    "static": {"predictor": "static"},
    "window": {"predictor": "window"},
    "ema": {"predictor": "ema"},
    "distribution": {"predictor": "distribution"},
    "path_table_1": {"predictor": "path_table", "path_length": 1},
    "path_table": {"predictor": "path_table"},
    "path_table_kept": {"predictor": "path_table", "kept": -1},
    "linear_map_1": {"predictor": "linear_map", "layers_back": 1},
    "linear_map": {"predictor": "linear_map"},
    "online_map": {"predictor": "online_map"},
    "oracle": {},
}
PLANNERS = ("none", "first_fit", "greedy", "hierarchical")
SPLITS = ("even", "load_aware", "local_first")
TRIGGERS = ("never", "always", "ordered_top", "top_set", "distance", "gain")
SMALL = 32  # so many experts at most: the optimum of every case is asked for
SAMPLE = 12  # cases of more experts
SOLVER_S = 20.0  # for one case


@dataclass(frozen=True, slots=True)
class Lab:
    """What is replayed: checked input, read and cut."""

    profile: "RoutingTrace"  # trained on
    batches: "Sequence[Ids]"  # served, in their order
    served: "Served"
    slots: int
    warm_up: int  # batches that are served first, and don't count
    first_layer: int
    replan_rows: float
    settings: Mapping[str, Any]  # for the report


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        check_files(args)
        names = names_of(args.predictors)
        lab = lab_of(args)
        modes, skipped = modes_of(lab)
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return BAD_INPUT
    result = results(lab, names, modes, skipped, seed=args.seed, with_optimum=args.optimum)
    from megalina.infer.lab_report import report

    print(report(result))
    return write(result, args)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).splitlines()[0]


# what is asked for


def check_files(args: argparse.Namespace) -> None:
    """ValueError for a file that could not be written at the end, or a solver that is not there."""
    for flag, endings in (("json", ()), ("plot", PICTURES)):
        path: Path | None = getattr(args, flag)
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ValueError(f"--{flag} {path}: there is no folder {path.absolute().parent}")
        if path.is_dir():
            raise ValueError(f"--{flag} {path} is a folder: name a file")
        if endings and not path.name.endswith(endings):
            raise ValueError(f"--{flag} {path}: the name must end in {' or '.join(endings)}")
    if args.optimum and find_spec("scipy") is None:
        raise ValueError("--optimum needs scipy, which is not installed: pip install 'megalina[dev]'")


def names_of(predictors: str) -> tuple[str, ...]:
    """Of --predictors; ValueError for one that isn't there, or where nothing is left that predicts."""
    names = tuple(dict.fromkeys(predictors.split(","))) if predictors else tuple(CONTESTANTS)
    if "look_ahead" in names:
        raise ValueError("--predictors look_ahead needs hidden states, which a routing trace doesn't hold: leave it out")
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise ValueError(f"--predictors {','.join(unknown)}: there are {', '.join(CONTESTANTS)}")
    if names == ("none",):
        raise ValueError("--predictors none predicts nothing: name another one too")
    return names


def lab_of(args: argparse.Namespace) -> Lab:
    """Reads the traces and cuts them.  ValueError or OSError, in one line, for whatever can't be."""
    from megalina.infer.policies import Served
    from megalina.placement.routing_trace import alternate, batches, joined

    for name, least in (
        ("batch_tokens", 1),
        ("devices", 1),
        ("slots", 1),
        ("first_layer", 0),
        ("warm_up_batches", 0),
        ("seed", 0),
    ):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if args.devices > args.batch_tokens:
        raise ValueError(
            f"--devices {args.devices}: a batch of {args.batch_tokens} tokens has none for some; raise --batch-tokens"
        )
    train, serve = traces_of(args)
    joined([*train, *serve])  # ValueError unless they are of one shape of model
    first = train[0]
    if args.first_layer >= first.num_layers:
        raise ValueError(f"--first-layer {args.first_layer}: the traces' MoE layers are 0 to {first.num_layers - 1}")
    if args.devices * args.slots < first.num_experts:
        raise ValueError(
            f"--slots {args.slots}: {args.devices} devices then have {args.devices * args.slots} slots for {first.num_experts} "
            f"experts; give {-(-first.num_experts // args.devices)} or more"
        )
    for trace in serve:
        if trace.num_tokens < args.batch_tokens:
            raise ValueError(
                f"{trace.name} has {trace.num_tokens} tokens to serve, no batch of {args.batch_tokens}: lower --batch-tokens"
            )
    if args.alternate:
        served = list(alternate(serve, args.batch_tokens, drop_last=True))
    else:
        served = [batch for trace in serve for batch in batches(trace, args.batch_tokens, drop_last=True)]
    if args.warm_up_batches >= len(served):
        raise ValueError(f"--warm-up-batches {args.warm_up_batches} of {len(served)} leaves none that counts: lower it")
    per_node = args.devices_per_node or (args.devices // 2 if args.devices % 2 == 0 else args.devices)
    if args.devices_per_node < 0 or args.devices % per_node:
        raise ValueError(f"--devices-per-node {args.devices_per_node} must divide {args.devices} devices")
    mean_rows = args.batch_tokens * first.top_k / args.devices
    replan_rows = mean_rows / 10 if args.replan_rows is None else args.replan_rows
    if not 0 <= replan_rows < float("inf"):
        raise ValueError(f"--replan-rows {replan_rows} must be a number of rows, at least 0")
    settings = {
        "train": [{"name": trace.name, "tokens": trace.num_tokens} for trace in train],
        "serve": [{"name": trace.name, "tokens": trace.num_tokens // args.batch_tokens * args.batch_tokens} for trace in serve],
        "alternate": args.alternate,
        "experts": first.num_experts,
        "top_k": first.top_k,
        "layers": first.num_layers,
        "first_layer": args.first_layer,
        "batches": len(served),
        "warm_up_batches": args.warm_up_batches,
        "batch_tokens": args.batch_tokens,
        "devices": args.devices,
        "devices_per_node": per_node,
        "slots": args.slots,
        "replan_rows": replan_rows,
        "seed": args.seed,
    }
    kind = Served(first.num_experts, first.top_k, args.devices, per_node)
    return Lab(joined(train), served, kind, args.slots, args.warm_up_batches, args.first_layer, replan_rows, settings)


def traces_of(args: argparse.Namespace) -> "tuple[list[RoutingTrace], list[RoutingTrace]]":
    """What is trained on and what is served.  Choices come best first, as a router gives them."""
    from megalina.placement.routing_trace import best_first, halves, merged_experts, read_trace, top1

    train, serve = args.train or args.serve, args.serve or args.train
    if not train:
        raise ValueError("there is no trace: give --train, --serve or both")
    for flag, paths in (("--train", args.train), ("--serve", args.serve)):
        if len({path.resolve() for path in paths}) < len(paths):
            raise ValueError(f"{flag} names the same trace twice: {' '.join(map(str, paths))}")
    train_traces, serve_traces = {}, {}
    for path in dict.fromkeys([*train, *serve]):
        key = path.resolve()
        if key in train_traces or key in serve_traces:
            continue  # another name of the same file
        trace = best_first(read_trace(path, num_experts=args.experts or None))
        if args.top1_experts:
            trace = merged_experts(top1(trace), args.top1_experts)
        trained, is_served = (key in {p.resolve() for p in paths} for paths in (train, serve))
        first, second = halves(trace) if trained and is_served else (trace, trace)
        if trained:
            train_traces[key] = first
        if is_served:
            serve_traces[key] = second
    return [train_traces[path.resolve()] for path in train], [serve_traces[path.resolve()] for path in serve]


def modes_of(lab: Lab) -> "tuple[dict[str, InferConfig], dict[str, str]]":
    """Those of conf/infer, by name, and why others can't be replayed."""
    from megalina.infer.modes import read_mode

    modes, skipped = {}, {}
    for path in sorted(CONF.glob("*.yaml")):
        config = read_mode(CONF, path.stem)
        if config.predictor == "look_ahead":
            skipped[config.name] = "looks at hidden states, which a routing trace doesn't hold"
        elif config.even_routing:
            skipped[config.name] = "routes evenly whatever the trace says: 1.00"
        else:
            enough = config.slots_per_device * lab.served.num_devices >= lab.served.num_experts
            config = replace(config, slots_per_device=config.slots_per_device if enough else lab.slots)
            modes[config.name] = config if config.row_us or config.replan_ms else with_cost(config, lab)
    return modes, skipped


def with_cost(config: "InferConfig", lab: Lab) -> "InferConfig":
    """Planning anew takes as long as --replan-rows rows on the busiest device; only the ratio matters."""
    return replace(config, row_us=1.0, replan_ms=lab.replan_rows / 1e3)


# replays


def results(
    lab: Lab,
    names: Sequence[str],
    modes: "Mapping[str, InferConfig]",
    skipped: Mapping[str, str],
    *,
    seed: int,
    with_optimum: bool,
) -> dict[str, Any]:
    """All numbers, as they go into the JSON."""
    contest = _Contest(lab)
    cases = cases_of(lab, seed) if with_optimum else []
    total = 2 * len(names) + len(PLANNERS) * len(SPLITS) + 2 * len(TRIGGERS) + len(modes) + len(cases)
    with _Progress(total) as progress:

        def row(name: str, split: str, *, planner: str = "greedy", trigger: str = "never") -> dict[str, Any]:
            progress.update(f"{name}, {planner}, {split}, {trigger}")
            return contest.row(name, split, planner=planner, trigger=trigger)

        predictors = {name: row(name, "even") for name in names}
        load_aware = {name: row(name, "load_aware") for name in names}
        own = [name for name in names if name not in ("none", "oracle")] or ["oracle"]
        best = min(own, key=lambda name: predictors[name]["p95"])
        planners = {p: {s: _some(row(best, s, planner=p), "planner_us") for s in SPLITS} for p in PLANNERS}
        triggers = {t: {s: _some(row(best, s, trigger=t), "replanned") for s in ("even", "load_aware")} for t in TRIGGERS}
        found = {}
        for name, config in modes.items():
            progress.update(f"mode {name}")
            found[name] = contest.mode(config)
        optimum = _optimum(contest, cases, best, progress) if cases else None
    return {
        "predictors": predictors,
        "load_aware": {name: _some(figures) for name, figures in load_aware.items()},
        "planners": planners,
        "triggers": triggers,
        "modes": found,
        "skipped_modes": dict(skipped),
        "optimum": optimum,
        "best": best,
        "settings": dict(lab.settings),
    }


def _some(figures: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Without what is the predictor's own affair."""
    return {key: figures[key] for key in ("median", "p95", "moved", "local", *more) if key in figures}


class _Contest:
    """Replays each combination once.  Predictors are fitted once: what they learn while serving is the controller's."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self._predictors: dict[str, Predictor] = {}
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}
        self.loads: dict[tuple[str, ...], Any] = {}  # load_BLN

    def row(self, name: str, split: str, *, planner: str = "greedy", trigger: str = "never") -> dict[str, Any]:
        if name == "none":
            planner = "none"
        if planner == "none":
            trigger = "never"
        key = (name, split, planner, trigger)
        if key not in self._rows:
            self._rows[key] = self._replayed(key, self._policy(name, split, planner, trigger))
        return self._rows[key]

    def mode(self, config: "InferConfig") -> dict[str, Any]:
        from megalina.infer.policies import policy_of, slots_of

        slots = slots_of(config, self.lab.served)
        figures = self._replayed((f"mode {config.name}",), policy_of(config, self.lab.served, self.lab.profile), slots)
        return figures | {"slots": slots}

    def _policy(self, name: str, split: str, planner: str, trigger: str) -> "Policy":
        """As the same settings of conf/infer give it."""
        from megalina.config import InferConfig
        from megalina.infer.policies import policy_of

        lab = self.lab
        common = {"name": name, "split": split, "planner": planner, "trigger": trigger, "slots_per_device": lab.slots}
        if name == "none":
            return policy_of(InferConfig(predictor="none", **common), lab.served, None)
        # any predictor will do for the rest of the policy
        policy = policy_of(with_cost(InferConfig(predictor="static", **common), lab), lab.served, lab.profile)
        return replace(policy, predictor=self._predictor(name))

    def _predictor(self, name: str) -> "Predictor":
        from megalina.config import InferConfig
        from megalina.infer.policies import policy_of
        from megalina.placement.offline import counts_of_batches
        from megalina.placement.predictors.oracle import OraclePredictor

        lab = self.lab
        if name not in self._predictors:
            if name == "oracle":
                predictor: Predictor | None = OraclePredictor(counts_of_batches(lab.batches, lab.served.num_experts))
            else:
                config = InferConfig(slots_per_device=lab.slots, **CONTESTANTS[name])
                predictor = policy_of(config, lab.served, lab.profile).predictor
            assert predictor is not None
            self._predictors[name] = predictor
        return self._predictors[name]

    def _replayed(self, key: tuple[str, ...], policy: "Policy", slots: int | None = None) -> dict[str, Any]:
        from megalina.placement.offline import replay

        lab = self.lab
        timed, planner_s = None, list[float]()
        if policy.predictor is not None:
            timed = _TimedPredictor(policy.predictor, lab.first_layer)
        planner = None if policy.planner is None else _timed_planner(policy.planner, planner_s)
        found = replay(
            lab.batches,
            replace(policy, predictor=timed, planner=planner),
            num_experts=lab.served.num_experts,
            num_devices=lab.served.num_devices,
            slots_per_device=slots or lab.slots,
        )
        self.loads[key] = found.load_BLN
        figures = figures_of(found, lab.warm_up, lab.first_layer, lab.served.top_k)
        if planner_s:
            figures["planner_us"] = 1e6 * statistics.median(planner_s)
        if timed is not None:
            figures["predictor_us"] = 1e6 * timed.typical_s()
        return figures


def figures_of(found: "Replay", warm_up: int, first_layer: int, top_k: int) -> dict[str, Any]:
    """Of the batches and layers that count."""
    from megalina.placement.offline import accuracy, balance, max_over_mean

    count = (slice(warm_up, None), slice(first_layer, None))
    load_BLN = found.load_BLN[count]
    figures: dict[str, Any] = asdict(balance(max_over_mean(load_BLN)))
    figures |= {
        "moved": float(found.moved_BL[count].mean()),
        "local": float(found.local_BL[count].sum() / load_BLN.sum()),
        "replanned": float(found.replanned_BL[count].mean()),
    }
    if found.expected_BLE is not None:
        figures |= asdict(accuracy(found.expected_BLE[count], found.counts_BLE[count], top_k))
    return figures


class _TimedPredictor:
    """A predictor and a clock, for layers from `first_layer` on."""

    def __init__(self, predictor: "Predictor", first_layer: int):
        self._predictor, self._first_layer = predictor, first_layer
        self._times_s: dict[str, list[float]] = {"features": [], "expect": [], "evidence": [], "learn": []}

    def typical_s(self) -> float:
        """What one rank spends on one layer of one batch: medians, added."""
        return sum(statistics.median(times_s) for times_s in self._times_s.values() if times_s)

    def start(self, layer: int) -> Any:
        return self._predictor.start(layer)

    def features(self, layer: int, seen: "Seen") -> "Floats":
        return self._timed("features", layer, seen)

    def expect(self, layer: int, features: "Floats", state: Any) -> "Floats":
        return self._timed("expect", layer, features, state)

    def evidence(self, layer: int, seen: "Seen", chosen_TK: "Ids") -> "Floats":
        return self._timed("evidence", layer, seen, chosen_TK)

    def learn(self, layer: int, features: "Floats", evidence: "Floats", state: Any) -> Any:
        return self._timed("learn", layer, features, evidence, state)

    def _timed(self, what: str, layer: int, *arguments: Any) -> Any:
        begin_s = time.perf_counter()
        found = getattr(self._predictor, what)(layer, *arguments)
        if layer >= self._first_layer:
            self._times_s[what].append(time.perf_counter() - begin_s)
        return found


def _timed_planner(planner: "Planner", times_s: list[float]) -> "Planner":
    def timed(share_E: "Floats", num_devices: int, slots_per_device: int) -> "Placement":
        begin_s = time.perf_counter()
        placement = planner(share_E, num_devices, slots_per_device)
        times_s.append(time.perf_counter() - begin_s)
        return placement

    return timed


# the optimum


def cases_of(lab: Lab, seed: int) -> list[tuple[int, int]]:
    """(batch, layer): all where experts are few, else a sample."""
    import numpy as np

    cases = [(b, layer) for b in range(lab.warm_up, len(lab.batches)) for layer in range(lab.first_layer, lab.profile.num_layers)]
    if lab.served.num_experts <= SMALL or len(cases) <= SAMPLE:
        return cases
    chosen = np.random.default_rng(seed).choice(len(cases), SAMPLE, replace=False)
    return [cases[i] for i in sorted(chosen.tolist())]


def _optimum(contest: _Contest, cases: Sequence[tuple[int, int]], best: str, progress: "_Progress") -> dict[str, Any]:
    """How far the busiest device is from the optimum's, which knows the batch and splits rows at will."""
    import numpy as np

    from megalina.placement.offline import counts_of_batches
    from megalina.placement.planners.optimum import optimum
    from megalina.placement.split import device_load, load_aware

    lab = contest.lab
    counts_BLE = counts_of_batches(lab.batches, lab.served.num_experts)
    rivals = {
        f"{name}, {split}": (name, split, "greedy", "never") for name in dict.fromkeys(("oracle", best)) for split in SPLITS[:2]
    }
    for name, split, *_ in rivals.values():
        contest.row(name, split)
    over_mean, ratios, unproven, not_found = list[float](), {rival: list[float]() for rival in rivals}, 0, 0
    for batch, layer in cases:
        progress.update(f"optimum of batch {batch}, layer {layer}")
        count_E = counts_BLE[batch, layer]
        begin_s = time.monotonic()
        try:
            placement = optimum(count_E.astype(np.float64), lab.served.num_devices, lab.slots, time_limit_s=SOLVER_S)
        except TimeoutError:
            not_found += 1
            continue
        count_RE = np.zeros((lab.served.num_devices, lab.served.num_experts), np.int64)
        count_RE[0] = count_E  # where rows come from doesn't matter for the load
        rows = int(device_load(load_aware(count_RE, placement)).max())
        # no placement is below an even load, so that one needs no proof by the solver
        even = rows == -(-int(count_E.sum()) // lab.served.num_devices)
        unproven += not even and time.monotonic() - begin_s >= SOLVER_S
        over_mean.append(rows * lab.served.num_devices / int(count_E.sum()))
        for rival, key in rivals.items():
            ratios[rival].append(int(contest.loads[key][batch, layer].max()) / rows)
    found: dict[str, Any] = {
        "cases": len(cases),
        "of": (len(lab.batches) - lab.warm_up) * (lab.profile.num_layers - lab.first_layer),
        "not_found": not_found,
        "not_proven": unproven,
        "solver_limit_s": SOLVER_S,
    }
    if over_mean:
        found["max_over_mean"] = {"median": statistics.median(over_mean), "max": max(over_mean)}
        found["over_optimum"] = {rival: {"median": statistics.median(r), "max": max(r)} for rival, r in ratios.items()}
    return found


# the report


def write(result: Mapping[str, Any], args: argparse.Namespace) -> int:
    """The files that are asked for: each as a whole, or as it was before."""
    writers: list[tuple[Path, Callable[[Path], object]]] = []
    if args.json:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        writers.append((args.json, lambda path: path.write_text(text)))
    if args.plot:
        from megalina.infer.lab_report import draw

        writers.append((args.plot, lambda path: draw(path, result)))
    aside = [path.with_name(f".{path.stem}.{os.getpid()}.new{path.suffix}") for path, _ in writers]
    try:
        for temporary, (_, write_to) in zip(aside, writers, strict=True):
            write_to(temporary)
        for temporary, (path, _) in zip(aside, writers, strict=True):
            os.replace(temporary, path)
    except OSError as error:
        print(one_line(error), file=sys.stderr)
        return BAD_INPUT
    finally:
        for temporary in aside:
            temporary.unlink(missing_ok=True)
    return 0


class _Progress:
    """How far it is, on stderr: a live bar on a terminal, else a line now and then."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._total, self._begun, self._live = total, 0, sys.stderr.isatty()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
            console=Console(file=sys.stderr),
            redirect_stdout=False,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task("replays", total=total, what="")

    def update(self, what: str) -> None:
        """One more begins."""
        self._bar.update(self._task, completed=self._begun, what=what)
        self._begun += 1
        if not self._live and self._begun % max(1, self._total // 5) == 0:
            print(f"{self._begun}/{self._total} replays", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Replays batches of recorded routing under each predictor, planner, split and trigger, with the controller "
        "that serves: how even devices' loads would be, how well popularity was predicted, what that takes.",
        epilog="which part of a trace is used: a trace that is given to --train alone is trained on as a whole, one that is "
        "given to --serve alone is served as a whole.  One that is given to both is cut in halves, at the end of the sample "
        "nearest the middle: the first is trained on, the second served.  Without --train or without --serve, what the other "
        "names counts as given to both.  Tokens that fill no whole batch are not served.\n\n"
        "predictors: none (experts stay where training had them, once each), static (the trace's shares), window (the last "
        "batch), ema, distribution, path_table (Lina's, of paths of 3 layers), path_table_1 (of 1), path_table_kept (the top_k "
        "likeliest of a path alone), linear_map, linear_map_1 (looks one layer back), online_map, oracle (knows the batch).\n\n"
        "examples:\n  tools/popularity_lab.py --serve a.npz\n"
        "  tools/popularity_lab.py --train a.npz b.npz --serve a.npz b.npz --alternate --json lab.json --plot lab.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", nargs="+", type=Path, default=[], metavar="NPZ", help="traces that predictors are fitted to")
    parser.add_argument("--serve", nargs="+", type=Path, default=[], metavar="NPZ", help="traces that are replayed")
    parser.add_argument(
        "--alternate", action="store_true", help="a batch of each served trace in turn (default: one after another)"
    )
    parser.add_argument("--batch-tokens", type=int, default=1024, metavar="N", help="(default: 1024)")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="each has an equal part of the tokens (default: 8)")
    parser.add_argument("--devices-per-node", type=int, default=0, metavar="N", help="planner hierarchical (default: two nodes)")
    parser.add_argument("--slots", type=int, default=10, metavar="N", help="places for experts on a device (default: 10)")
    parser.add_argument("--first-layer", type=int, default=3, metavar="L", help="MoE layers from this one on count (default: 3, "
                        "the fourth, from which on paths of three layers are known)")  # fmt: skip
    parser.add_argument("--warm-up-batches", type=int, default=0, metavar="N", help="served first, not counted (default: 0)")
    parser.add_argument("--experts", type=int, default=0, metavar="E", help="of the traces, where their files don't say")
    parser.add_argument("--top1-experts", type=int, default=0, metavar="E", help="first choices alone, experts merged to so many")
    parser.add_argument("--predictors", default="", metavar="A,B", help="default: all")
    parser.add_argument("--replan-rows", type=float, metavar="X", help="trigger gain: planning anew takes as long as so many "
                        "rows on the busiest device (default: a tenth of a device's mean rows)")  # fmt: skip
    parser.add_argument("--optimum", action="store_true", help=f"how far from the exact optimum: all layers of batches up to "
                        f"{SMALL} experts, else {SAMPLE} by chance (needs scipy; up to {SOLVER_S:g} s each)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that sample (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="95th percentiles as bars by predictor; .svg too")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy comes in: small products are faster so, and steadier
    sys.exit(main())
