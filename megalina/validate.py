"""The check of a configuration: every mistake that can be seen without data, tensors or other ranks is one ValueError.

`check_config` is pure.  `check_machine` and `check_paths` take facts of this machine, so that a test can make them up.
"""

import math
import netrc
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlparse

from megalina.blocks.activation import check_activation
from megalina.blocks.dispatch import ONCE_PER_NODE, ONCE_PER_RANK, nodes_along_ep
from megalina.blocks.heads import check_rope, check_window
from megalina.blocks.model import attention_of, blocks_of, check_layer, check_own
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.routers import check_router, kind_of
from megalina.config import (
    BELOW_ONE,
    POSITIVE,
    ClusterConfig,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    ScheduleConfig,
    is_moe_layer,
    settings,
)
from megalina.nearest import nearest
from megalina.placement.expert_order import ExpertOrders, read_orders
from megalina.reference import is_reference
from megalina.step.strategy import STRATEGIES, strategy_named
from megalina.validate_data import check_data, check_eval, check_profile
from megalina.validate_pipeline import check_pipeline
from megalina.validate_strategy import check_strategy

MAX_RANKS_A_CORE = 64
MTP_SCHEDULE = ("mtp_final_fraction", "mtp_final_ratio")
AUTO = "auto"  # strategy.name: measured steps choose one

# What a simulation must know of a cluster's links, and of its devices unless they are emulated.
NEEDED_OF_LINKS = ("nodes", "ranks_per_node", "link_gbit", "nics_per_node", "oversubscription", "collective_efficiency")
NEEDED_OF_DEVICES = (
    *("memory_gib", "memory_gbyte_s", "memory_efficiency", "float32_tflops", "bfloat16_tflops"),
    *("product_efficiency", "attention_efficiency", "domain_ranks", "domain_gbyte_s"),
)


def check_config(config: PretrainConfig, world: int) -> None:
    """Raises ValueError, one line with the numbers and what to change, if `world` ranks can't run `config`."""
    _check_choices(config)
    _check_numbers(config)
    _check_model(config)
    check_activation(config.model)
    _check_mtp(config)
    if config.model.shared_gate and not config.model.shared_d_ff:
        raise ValueError(
            "model.shared_gate=true does nothing with model.shared_d_ff=0: give shared experts a width, or set it to false"
        )
    check_layer(config.model.layer)
    check_router(config.router, config.model.num_experts, config.model.d_model)
    _check_optimizer(config)
    if config.router.losses or any(map(is_reference, config.model.layer)):
        check_own(blocks_of(config.model, config.router))
    _check_layout(config, world)
    _check_batch(config, world)
    check_strategy(config, world)
    check_pipeline(config, world)
    _check_emulation(config)
    _check_length(config)
    check_data(config.data)
    check_profile(config)
    check_eval(config)


def _check_optimizer(config: PretrainConfig) -> None:
    kind, name, model = optimizer_of(config.optim), config.optim.name, config.model
    if kind.clips_heads and model.qk_norm != "none":
        raise ValueError(
            f"optim={name} scales queries and keys, which model.qk_norm={model.qk_norm} brings back to one length: set "
            "model.qk_norm=none, "
            "or take optim=muon, as norms bound the logits already"
        )
    if kind.clips_heads and not blocks_of(model, config.router).clipped_groups:
        raise ValueError(f"optim={name} needs attention that declares which rows of queries and keys it clips: take optim=muon")


def check_hardware(cluster: ClusterConfig) -> None:
    """Raises ValueError, naming file and field, unless `cluster` says all that a simulation must know.

    An emulated device has times of its own and needs nothing but its links."""
    where, hardware = f"conf/cluster/{cluster.name}.yaml", cluster.hardware
    emulated = cluster.device_gflops or cluster.attention_ms
    for key, value, may_be in settings(cluster, having="low"):
        low, high, name = may_be["low"], may_be["high"], key.rpartition(".")[2]
        needed = name in NEEDED_OF_LINKS or (not emulated and name in NEEDED_OF_DEVICES)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{where}: {key} is {value:g}, which must be from {low:g} to {high:g}: correct it")
        if needed and not value:
            raise ValueError(f"{where}: {key} is 0, which stands for unknown, and a simulation needs it: give it")
    if hardware.oversubscription and hardware.oversubscription < 1:
        raise ValueError(
            f"{where}: hardware.oversubscription is {hardware.oversubscription:g}, which must be at least 1 "
            "(all links at full rate): give how many times more the links carry than the switches"
        )
    sizes, shares = hardware.product_sizes, hardware.product_shares
    if len(sizes) != len(shares):
        raise ValueError(
            f"{where}: hardware.product_sizes has {len(sizes)} numbers and hardware.product_shares {len(shares)}: "
            "give a share for each size"
        )
    if sizes and not (all(0 < a < b for a, b in pairwise(sizes)) and sizes[0] > 0 and sizes[-1] < math.inf):
        raise ValueError(f"{where}: hardware.product_sizes ({_listed(sizes)}) must rise from above 0: put them in order")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"{where}: hardware.product_shares ({_listed(shares)}) must be above 0 and at most 1: correct them")
    for (small, a), (large, b) in pairwise(zip(sizes, shares)):
        if b / a > 1.001 * large / small:  # figures are rounded
            raise ValueError(
                f"{where}: hardware.product_shares rise from {a:g} to {b:g} between sizes {small:g} and {large:g}, more than the "
                "sizes do, so the larger product would take less time: correct them"
            )
    node, domain, ranks = cluster.ranks_per_node, hardware.domain_ranks, cluster.nodes * cluster.ranks_per_node
    if domain and ((node % domain and domain % node) or ranks % domain):
        raise ValueError(
            f"{where}: hardware.domain_ranks ({domain}) must be some whole nodes of ranks_per_node ({node}), or divide one, and "
            f"divide the {ranks} ranks: correct one of them"
        )


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def check_machine(
    config: PretrainConfig, *, local_ranks: int, num_cores: int, num_gpus: int, apex: bool, wandb_key: bool
) -> None:
    """Raises ValueError if this machine can't start `local_ranks` ranks of `config`.

    `apex`: NVIDIA's package is installed with its kernels; `wandb_key`: W&B can log in."""
    if local_ranks > MAX_RANKS_A_CORE * num_cores:
        raise ValueError(
            f"launch.ranks ({local_ranks}) is more than {MAX_RANKS_A_CORE} ranks for each of {num_cores} cores: "
            "start fewer, or look at the layout with launch.dry_run=true"
        )
    if config.launch.device == "cuda" and num_gpus == 0:
        raise ValueError("launch.device=cuda, but torch sees no GPU: set launch.device=cpu, or install a CUDA build of torch")
    if config.launch.device != "cpu" and 0 < num_gpus < local_ranks:
        raise ValueError(
            f"{local_ranks} local ranks need as many GPUs, torch sees {num_gpus}: "
            f"set launch.ranks={num_gpus}, or launch.device=cpu"
        )
    if config.optim.implementation == "apex":
        obstacles = {
            f"has no {config.optim.name}": not optimizer_of(config.optim).has_apex,
            "has no float64": config.train.dtype == "float64",
            "needs GPUs": config.launch.device == "cpu" or num_gpus == 0,
            "needs NVIDIA Apex with its CUDA extensions, which isn't installed": not apex,
        }
        for obstacle in (text for text, found in obstacles.items() if found):
            raise ValueError(f"optim.implementation=apex {obstacle}: set optim.implementation=torch")
    if config.tracker.wandb.mode == "online" and not wandb_key:
        raise ValueError(
            "tracker.wandb.mode=online needs a key: set WANDB_API_KEY or run `wandb login`, "
            "or stay offline with tracker.wandb.mode=offline"
        )


def check_paths(config: PretrainConfig) -> None:
    """Raises ValueError if run.dir can't be written, or a checkpoint that is named isn't there, or a placement doesn't fit."""
    if not config.run.dir.strip():
        raise ValueError("run.dir is empty: give a folder for this run, or leave run.dir out")
    if not config.data.cache_dir.strip():
        raise ValueError("data.cache_dir is empty: give a folder for prepared text, or leave data.cache_dir out")
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"run.dir={config.run.dir}: {folder} is a file, not a folder: choose another run.dir")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"run.dir={config.run.dir}: {folder} can't be written: choose another run.dir")
    if placement := config.parallel.placement:
        try:
            orders = read_orders(Path(placement))
        except ValueError as error:
            raise ValueError(f"parallel.placement={placement}: {error}") from error
        check_orders(config, orders)
    resume, init_from = config.train.resume, config.train.init_from
    for name, path in (("train.resume", "" if resume in ("auto", "verify", "none") else resume), ("train.init_from", init_from)):
        if path and (Path(path) / "checkpoints").is_dir() and not any(Path(path).glob("checkpoints/step_*")):
            raise ValueError(f"{name}={path} has no checkpoint yet: name another run's folder, or one of its checkpoints")
        if path and not Path(path).is_dir():
            raise ValueError(f"{name}={path}: there is no such folder; give a run's folder, or RUN/checkpoints/step_00000100")


def check_orders(config: PretrainConfig, orders: ExpertOrders) -> None:
    """Raises ValueError if the experts of `config` can't lie as the file of parallel.placement says."""
    where, model, router = f"parallel.placement={config.parallel.placement}", config.model, config.router
    if config.parallel.ep == 1:
        raise ValueError(f"{where} does nothing with parallel.ep=1, where each rank has all experts: raise parallel.ep")
    moe = [layer for layer in range(model.num_layers) if is_moe_layer(model, layer)]
    if orders.num_experts != model.num_experts or sorted(orders.layers) != moe:
        raise ValueError(
            f"{where} is of {orders.num_experts} experts in layers {sorted(orders.layers)}, and the model has "
            f"{model.num_experts} in layers {moe}: make one from a profile of this model"
        )
    if router.locality_loss and not orders.stays(router.locality_nodes):
        raise ValueError(
            f"{where} moves experts to other nodes, and router.locality_loss={router.locality_loss:g} keeps tokens with those "
            "whose numbers say that they are at home: set one of the two to nothing"
        )


def advice(config: PretrainConfig, *, local_ranks: int, num_cores: int, num_gpus: int) -> list[str]:
    """What is allowed but probably not meant, one line each."""
    lines = []
    on_cpu = config.launch.device == "cpu" or num_gpus == 0
    if on_cpu and local_ranks > num_cores:
        lines.append(f"{local_ranks} ranks share {num_cores} cores: right, but slow")
    warmup = config.schedule.warmup_steps
    if warmup >= config.train.steps:
        lines.append(
            f"schedule.warmup_steps ({warmup}) is not below train.steps ({config.train.steps}): the peak is never reached"
        )
    if config.launch.device != "cuda" and on_cpu and config.train.dtype == "bfloat16":
        lines.append("train.dtype=bfloat16 on a CPU: right, but often slower than float32")
    return lines


def has_wandb_key(environ: Mapping[str, str], home: Path) -> bool:
    """Whether W&B finds a key in the environment or in the netrc file that `wandb login` writes."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in (Path(environ["NETRC"]),) if environ.get("NETRC") else (home / ".netrc", home / "_netrc"):
        if path.is_file():
            try:
                found = netrc.netrc(path).authenticators(host)
                return found is not None and bool(found[2])
            except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} can't be read as a netrc file ({error}): repair it, or set WANDB_API_KEY") from error
    return False


def value_at(config: object, key: str) -> object:
    """The value at a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _check_choices(config: PretrainConfig) -> None:
    if is_reference(config.strategy.name):
        strategy_named(config.strategy.name)
    else:
        _check_choice("strategy.name", config.strategy.name, (*STRATEGIES, AUTO))
    for key, value, may_be in settings(config, having="choices"):
        if not (may_be["own"] and is_reference(str(value))):
            _check_choice(key, value, may_be["choices"])


def _check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    if str(value) not in choices:
        raise ValueError(f"{key}={value} is not one of {', '.join(choices)}{nearest(str(value), choices)}")


def _check_numbers(config: PretrainConfig) -> None:
    for key, value, may_be in settings(config, having="low"):
        if may_be["low"] <= value <= may_be["high"]:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} must be a finite number")
        raise ValueError(f"{key}={value} must be {in_words(may_be['low'], may_be['high'])}")


def in_words(low: float, high: float) -> str:
    """Bounds for people: "at least 0 and below 1"."""
    least = "above 0" if low == POSITIVE else f"at least {low:g}"
    most = "below 1" if high == BELOW_ONE else f"at most {int(high) if 1 <= high < 1e16 else high}"
    return f"{least} and {most}"


def _check_model(config: PretrainConfig) -> None:
    model = config.model
    attention_of(model).check(model)
    check_rope(model)
    check_window(model)
    if model.dense_layers_first > model.num_layers:
        raise ValueError(
            f"model.dense_layers_first ({model.dense_layers_first}) is more than model.num_layers ({model.num_layers}): lower it"
        )
    if model.max_positions and config.train.seq_len > model.max_positions:
        raise ValueError(
            f"train.seq_len ({config.train.seq_len}) is more than model.max_positions ({model.max_positions}): "
            "shorten the sequences or raise model.max_positions"
        )


def _check_mtp(config: PretrainConfig) -> None:
    model, schedule, length = config.model, config.schedule, config.train.seq_len
    if model.mtp_layers >= length:
        raise ValueError(
            f"model.mtp_layers ({model.mtp_layers}): the last predicts {model.mtp_layers + 1} tokens ahead, and train.seq_len "
            f"is {length}: lower it, or take longer sequences"
        )
    given = {"model.mtp_loss": (model.mtp_loss, ModelConfig().mtp_loss)}
    given |= {f"schedule.{k}": (getattr(schedule, k), getattr(ScheduleConfig(), k)) for k in MTP_SCHEDULE}
    for key, (value, default) in given.items():
        if value != default and not model.mtp_layers:
            raise ValueError(f"{key}={value:g} does nothing with model.mtp_layers=0: give that a number, or leave it out")
    fraction, ratio = schedule.mtp_final_fraction, schedule.mtp_final_ratio
    if (fraction > 0) != (ratio != 1):
        raise ValueError(
            f"schedule.mtp_final_fraction={fraction:g} and schedule.mtp_final_ratio={ratio:g} go together: give both, "
            "0.3 and 0.33 say"
        )


def _check_layout(config: PretrainConfig, world: int) -> None:
    parallel = config.parallel
    model, tp, ep, cp, pp = config.model, parallel.tp, parallel.ep, parallel.cp, parallel.pp
    named, smaller = (f" x parallel.cp ({cp})", ", parallel.cp") if cp > 1 else ("", "")
    if pp > 1 and world % (tp * ep * cp * pp):
        raise ValueError(
            f"parallel.pp ({pp}) x parallel.tp ({tp}){named} x parallel.ep ({ep}) must divide the number of ranks ({world}): "
            f"use a multiple of {tp * cp * ep * pp} ranks, or smaller parallel.pp, parallel.tp{smaller} or parallel.ep"
        )
    if world % (tp * ep * cp):
        raise ValueError(
            f"parallel.tp ({tp}){named} x parallel.ep ({ep}) must divide the number of ranks ({world}): "
            f"use a multiple of {tp * cp * ep} ranks, or smaller parallel.tp{smaller} or parallel.ep"
        )
    if model.num_experts % ep:
        raise ValueError(f"parallel.ep ({ep}) must divide model.num_experts ({model.num_experts})")
    dense = model.dense_layers_first > 0 or model.moe_every > 1
    cut = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "train.seq_len": config.train.seq_len,
        "model.dense_d_ff": (model.dense_d_ff or config.router.top_k * model.d_ff) if dense else 0,
        "model.shared_d_ff": model.shared_d_ff,
    }
    for name, size in cut.items():
        if size % tp:
            raise ValueError(f"parallel.tp ({tp}) must divide {name} ({size})")
    if parallel.reduce == "by_node" and world < 4:
        raise ValueError(
            f"parallel.reduce=by_node on {world} rank{'s' * (world > 1)}: it needs two nodes of two ranks at least; use flat, "
            "or auto"
        )
    if parallel.dispatch == ONCE_PER_NODE and world < 4:
        raise ValueError(
            f"parallel.dispatch=once_per_node on {world} rank{'s' * (world > 1)}: it needs two nodes of two ranks at least; use "
            "once_per_rank, or auto"
        )
    if parallel.dispatch == ONCE_PER_NODE and config.cluster.ranks_per_node and not nodes_along_ep(config):
        raise ValueError(
            f"parallel.dispatch=once_per_node: on nodes of {config.cluster.ranks_per_node} ranks (cluster.ranks_per_node) the "
            f"{ep} ranks of parallel.ep are on one node, or each on one of its own: use once_per_rank, or auto"
        )
    if parallel.dispatch in (ONCE_PER_RANK, ONCE_PER_NODE):
        if ep == 1:
            raise ValueError(f"parallel.dispatch={parallel.dispatch} does nothing with parallel.ep=1: no token travels; use rows")
        if kind_of(config.router).is_dense:
            raise ValueError(
                f"parallel.dispatch={parallel.dispatch} with router={config.router.kind}: every token goes to all ranks once "
                "there: use rows"
            )
    if parallel.rebalance_interval:
        _check_rebalancing(config)
    _check_context(config)


def _check_rebalancing(config: PretrainConfig) -> None:
    parallel, model, router = config.parallel, config.model, config.router
    where, held = f"parallel.rebalance_interval={parallel.rebalance_interval}", model.num_experts // parallel.ep
    nothing = "set it to 0, or leave it out"
    if parallel.ep == 1:
        raise ValueError(f"{where} does nothing with parallel.ep=1, where each rank has all experts: {nothing}")
    if held == 1 and config.strategy.packing == "1":
        raise ValueError(
            f"{where} does nothing where each rank has one of the {model.num_experts} experts: {nothing}, or lower parallel.ep"
        )
    if kind_of(router).is_dense:
        raise ValueError(f"{where} with router={router.kind}: every expert has all tokens, so loads are even: {nothing}")
    if parallel.placement:
        raise ValueError(f"{where} and parallel.placement={parallel.placement} both say where experts are: set one of them")
    if router.locality_loss:
        raise ValueError(
            f"{where} moves experts to other nodes, and router.locality_loss={router.locality_loss:g} keeps tokens with those "
            "whose numbers say that they are at home: set one of the two to nothing"
        )


def _check_context(config: PretrainConfig) -> None:
    """What cutting sequences over parallel.cp needs."""
    model, parallel, length = config.model, config.parallel, config.train.seq_len
    cp, tp = parallel.cp, parallel.tp
    if cp == 1:
        if parallel.cp_kind != ParallelConfig().cp_kind:
            raise ValueError(
                f"parallel.cp_kind={parallel.cp_kind} does nothing with parallel.cp=1: set that to 2, or leave "
                f"parallel.cp_kind at {ParallelConfig().cp_kind}"
            )
        return
    if length % (2 * cp):
        below, above = length // (2 * cp) * 2 * cp, -(-length // (2 * cp)) * 2 * cp
        raise ValueError(
            f"train.seq_len ({length}) must be a multiple of 2 x parallel.cp ({cp}) = {2 * cp}, as a sequence is cut in so many "
            f"pieces: set it to {f'{below} or ' if below else ''}{above}"
        )
    if length // cp % tp:
        raise ValueError(
            f"parallel.tp ({tp}) must divide the {length // cp} tokens that a rank of parallel.cp ({cp}) has of train.seq_len "
            f"({length}): take a multiple of {2 * cp * tp}"
        )
    if mixing := [block.name for _, block in blocks_of(model, config.router).all() if block.mixes_tokens]:
        raise ValueError(
            f"block {mixing[0]} mixes tokens, and with parallel.cp ({cp}) a rank has a part of each sequence: set parallel.cp=1"
        )
    if parallel.cp_kind == "all_to_all":
        heads, groups = model.num_heads // tp, model.num_kv_heads // tp
        of_rank = f" / parallel.tp ({tp})" if tp > 1 else ""
        if heads % cp:
            raise ValueError(
                f"parallel.cp_kind=all_to_all exchanges heads: parallel.cp ({cp}) must divide model.num_heads "
                f"({model.num_heads}){of_rank} = {heads}; set parallel.cp_kind=all_gather, or a smaller parallel.cp"
            )
        if groups % cp and cp % groups:
            raise ValueError(
                f"parallel.cp_kind=all_to_all: model.num_kv_heads ({model.num_kv_heads}){of_rank} = {groups} must be a multiple "
                f"of parallel.cp ({cp}), or divide it (ranks then hold copies): set parallel.cp_kind=all_gather"
            )


def _check_batch(config: PretrainConfig, world: int) -> None:
    parallel, batch, micro = config.parallel, config.train.global_batch_size, config.train.micro_batch_size
    cp, stages = parallel.cp, f" / parallel.pp {parallel.pp}" if parallel.pp > 1 else ""
    dp = world // (parallel.tp * cp * parallel.pp)
    alike = f"parallel.tp {parallel.tp}{f' / parallel.cp {cp}' if cp > 1 else ''}{stages}"
    if batch % (micro * dp):
        below, above = batch // (micro * dp) * micro * dp, -(-batch // (micro * dp)) * micro * dp
        near = f"{below} or {above}" if below else f"{above}"
        fits = next((m for m in range(min(micro, batch // dp), 0, -1) if batch % (m * dp) == 0), 0)
        smaller = f", or train.micro_batch_size to {fits}" if fits else ""
        stages = f" / parallel.pp {config.parallel.pp}" if config.parallel.pp > 1 else ""
        raise ValueError(
            f"train.global_batch_size ({batch}) must be a multiple of train.micro_batch_size ({micro}) x {dp} data-parallel "
            f"ranks ({world} ranks / {alike}) = {micro * dp}: set it to {near}{smaller}"
        )
    if config.router.group == "global" and batch > micro * dp:
        raise ValueError(
            f"router.group=global can't be exact with gradient accumulation ({batch // (micro * dp)} micro-batches a step): "
            f"set train.micro_batch_size={batch // dp}, or router.group=sequence"
        )


def _check_emulation(config: PretrainConfig) -> None:
    cluster = config.cluster
    given = [k for k in ("device_gflops", "attention_ms", "experts_ms") if getattr(cluster, k)]
    if given and config.launch.device == "cuda":
        raise ValueError(f"cluster.{given[0]} emulates a device on CPUs: set launch.device=cpu")
    if bool(cluster.attention_ms) != bool(cluster.experts_ms):
        raise ValueError(
            f"cluster.attention_ms ({cluster.attention_ms:g}) and cluster.experts_ms ({cluster.experts_ms:g}) go together: "
            "give both"
        )
    if cluster.device_gflops and cluster.attention_ms:
        raise ValueError("cluster.device_gflops and cluster.attention_ms exclude each other: give rates or times")


def _check_length(config: PretrainConfig) -> None:
    train, schedule = config.train, config.schedule
    if train.exit_step > train.steps:
        raise ValueError(f"train.exit_step ({train.exit_step}) is beyond train.steps ({train.steps})")
    if schedule.warmup_steps and schedule.warmup_tokens:
        raise ValueError(
            f"schedule.warmup_steps ({schedule.warmup_steps}) and schedule.warmup_tokens ({schedule.warmup_tokens}) "
            "exclude each other: set one of them to 0"
        )
    if train.init_from and train.resume not in ("auto", "verify", "none"):
        raise ValueError(f"train.init_from={train.init_from} and train.resume={train.resume} exclude each other: give one")
