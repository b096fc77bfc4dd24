"""The input of a popularity lab: what is asked for, read, cut and checked before anything is replayed.

What is wrong is said with the names of the tool's flags.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalina.config import InferConfig
from megalina.placement.predictors.predictor import Ids
from megalina.placement.routing_trace import (
    RoutingTrace,
    alternate,
    batches,
    best_first,
    halves,
    joined,
    merged_experts,
    read_trace,
    top1,
)
from megalina.serve.modes import read_mode
from megalina.serve.policies import LOOKING_AHEAD, Served

CONTESTANTS: Mapping[str, Mapping[str, Any]] = {  # settings of conf/infer, where it has them
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
    "online_paths": {"predictor": "online_paths"},
    "look_ahead": {"predictor": "look_ahead"},
    "look_ahead_map": {},
    "look_ahead_online": {"predictor": "look_ahead_online"},
    "oracle": {},
}
NEEDING_AHEAD = tuple(name for name in CONTESTANTS if name.startswith("look_ahead"))


@dataclass(frozen=True, slots=True)
class Asked:
    """The tool's flags of the same names."""

    train: Sequence[Path]
    serve: Sequence[Path]
    alternate: bool
    batch_tokens: int
    devices: int
    devices_per_node: int
    slots: int
    first_layer: int
    warm_up_batches: int
    experts: int
    top1_experts: int
    replan_rows: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class Lab:
    """What is replayed: checked input, read and cut."""

    profile: RoutingTrace  # trained on
    batches: Sequence[Ids]  # served, in their order
    ahead: Sequence[Ids] | None  # of the same tokens, what routers say ahead; None unless all traces have it
    lacking_ahead: Sequence[str]  # names of the traces that don't
    served: Served
    slots: int
    warm_up: int  # batches that are served first, and don't count
    first_layer: int
    replan_rows: float
    settings: Mapping[str, Any]  # for the report


def names_of(predictors: str) -> tuple[str, ...]:
    """Of --predictors; ValueError for one that isn't there, or where nothing is left that predicts."""
    names = tuple(dict.fromkeys(predictors.split(","))) if predictors else tuple(CONTESTANTS)
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise ValueError(f"--predictors {','.join(unknown)}: there are {', '.join(CONTESTANTS)}")
    if names == ("none",):
        raise ValueError("--predictors none predicts nothing: name another one too")
    return names


def replayable(names: Sequence[str], lab: Lab, *, all_asked: bool) -> tuple[list[str], dict[str, str]]:
    """Those that the lab's traces are enough for, and why others can't be replayed.

    ValueError for one of these that was asked for by name, which is so unless `all_asked`."""
    skipped = {name: _lacking_ahead(lab) for name in names if name in NEEDING_AHEAD and lab.ahead is None}
    if skipped and not all_asked:
        raise ValueError(f"--predictors {','.join(skipped)} {_lacking_ahead(lab)}, or leave it out")
    return [name for name in names if name not in skipped], skipped


def modes_of(conf: Path, lab: Lab) -> tuple[dict[str, InferConfig], dict[str, str]]:
    """Those of the folder `conf`, by name, and why others can't be replayed."""
    modes, skipped = {}, {}
    for path in sorted(conf.glob("*.yaml")):
        config = read_mode(conf, path.stem)
        if config.predictor in LOOKING_AHEAD and lab.ahead is None:
            skipped[config.name] = _lacking_ahead(lab)
        elif config.even_routing:
            skipped[config.name] = "routes evenly whatever the trace says: 1.00"
        else:
            enough = config.slots_per_device * lab.served.num_devices >= lab.served.num_experts
            config = replace(config, slots_per_device=config.slots_per_device if enough else lab.slots)
            modes[config.name] = config if config.row_us or config.replan_ms else with_cost(config, lab)
    return modes, skipped


def with_cost(config: InferConfig, lab: Lab) -> InferConfig:
    """Planning anew takes as long as --replan-rows rows on the busiest device; only the ratio matters."""
    return replace(config, row_us=1.0, replan_ms=lab.replan_rows / 1e3)


def _lacking_ahead(lab: Lab) -> str:
    return f"needs ahead_ids, which traces lack: {', '.join(lab.lacking_ahead)}; record them with tools/record_routing.py"


def lab_of(asked: Asked) -> Lab:
    """Reads the traces and cuts them.  ValueError or OSError, in one line, for whatever can't be."""
    for name, least in (
        ("batch_tokens", 1),
        ("devices", 1),
        ("slots", 1),
        ("first_layer", 0),
        ("warm_up_batches", 0),
        ("seed", 0),
    ):
        if getattr(asked, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(asked, name)} must be at least {least}")
    if asked.devices > asked.batch_tokens:
        raise ValueError(
            f"--devices {asked.devices}: a batch of {asked.batch_tokens} tokens has none for some; raise --batch-tokens"
        )
    train, serve = traces_of(asked)
    joined([*train, *serve])  # ValueError unless they are of one shape of model
    first = train[0]
    if asked.first_layer >= first.num_layers:
        raise ValueError(f"--first-layer {asked.first_layer}: the traces' MoE layers are 0 to {first.num_layers - 1}")
    if asked.devices * asked.slots < first.num_experts:
        raise ValueError(
            f"--slots {asked.slots}: {asked.devices} devices then have {asked.devices * asked.slots} slots for "
            f"{first.num_experts} experts; give {-(-first.num_experts // asked.devices)} or more"
        )
    for trace in serve:
        if trace.num_tokens < asked.batch_tokens:
            raise ValueError(
                f"{trace.name} has {trace.num_tokens} tokens to serve, no batch of {asked.batch_tokens}: lower --batch-tokens"
            )
    served = _in_order(asked, serve, ahead=False)
    lacking = tuple(dict.fromkeys(trace.name for trace in (*train, *serve) if trace.ahead_ids_TLK is None))
    if asked.warm_up_batches >= len(served):
        raise ValueError(f"--warm-up-batches {asked.warm_up_batches} of {len(served)} leaves none that counts: lower it")
    per_node = asked.devices_per_node or (asked.devices // 2 if asked.devices % 2 == 0 else asked.devices)
    if asked.devices_per_node < 0 or asked.devices % per_node:
        raise ValueError(f"--devices-per-node {asked.devices_per_node} must divide {asked.devices} devices")
    mean_rows = asked.batch_tokens * first.top_k / asked.devices
    replan_rows = mean_rows / 10 if asked.replan_rows is None else asked.replan_rows
    if not 0 <= replan_rows < float("inf"):
        raise ValueError(f"--replan-rows {replan_rows} must be a number of rows, at least 0")
    return Lab(
        profile=joined(train),
        batches=served,
        ahead=None if lacking else _in_order(asked, serve, ahead=True),
        lacking_ahead=lacking,
        served=Served(first.num_experts, first.top_k, asked.devices, per_node),
        slots=asked.slots,
        warm_up=asked.warm_up_batches,
        first_layer=asked.first_layer,
        replan_rows=replan_rows,
        settings={
            "train": [{"name": trace.name, "tokens": trace.num_tokens} for trace in train],
            "serve": [
                {"name": trace.name, "tokens": trace.num_tokens // asked.batch_tokens * asked.batch_tokens} for trace in serve
            ],
            "alternate": asked.alternate,
            "experts": first.num_experts,
            "top_k": first.top_k,
            "layers": first.num_layers,
            "first_layer": asked.first_layer,
            "batches": len(served),
            "warm_up_batches": asked.warm_up_batches,
            "batch_tokens": asked.batch_tokens,
            "devices": asked.devices,
            "devices_per_node": per_node,
            "slots": asked.slots,
            "replan_rows": replan_rows,
            "seed": asked.seed,
        },
    )


def _in_order(asked: Asked, serve: Sequence[RoutingTrace], *, ahead: bool) -> list[Ids]:
    if asked.alternate:
        return list(alternate(serve, asked.batch_tokens, drop_last=True, ahead=ahead))
    return [batch for trace in serve for batch in batches(trace, asked.batch_tokens, drop_last=True, ahead=ahead)]


def traces_of(asked: Asked) -> tuple[list[RoutingTrace], list[RoutingTrace]]:
    """What is trained on and what is served.  Choices come best first, as a router gives them."""
    train, serve = asked.train or asked.serve, asked.serve or asked.train
    if not train:
        raise ValueError("there is no trace: give --train, --serve or both")
    for flag, paths in (("--train", asked.train), ("--serve", asked.serve)):
        if len({path.resolve() for path in paths}) < len(paths):
            raise ValueError(f"{flag} names the same trace twice: {' '.join(map(str, paths))}")
    train_traces, serve_traces = {}, {}
    for path in dict.fromkeys([*train, *serve]):
        key = path.resolve()
        if key in train_traces or key in serve_traces:
            continue  # another name of the same file
        trace = best_first(read_trace(path, num_experts=asked.experts or None))
        if asked.top1_experts:
            trace = merged_experts(top1(trace), asked.top1_experts)
        trained, is_served = (key in {p.resolve() for p in paths} for paths in (train, serve))
        first, second = halves(trace) if trained and is_served else (trace, trace)
        if trained:
            train_traces[key] = first
        if is_served:
            serve_traces[key] = second
    return [train_traces[path.resolve()] for path in train], [serve_traces[path.resolve()] for path in serve]
