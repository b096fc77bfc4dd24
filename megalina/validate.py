"""The check of a configuration: every mistake that can be seen without data, tensors or other ranks is one ValueError.

`check_config` is pure.  `check_machine` and `check_paths` take facts of this machine, so that a test can make them up.
"""

import difflib
import math
import netrc
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlparse

from megalina.config import ClusterConfig, DataConfig, PretrainConfig
from megalina.parameters import is_moe_layer
from megalina.step.strategy import STRATEGIES
from megalina.validate_strategy import check_strategy

MAX_RANKS_A_CORE = 64

CHOICES: dict[str, tuple[str, ...]] = {
    "launch.device": ("auto", "cpu", "cuda"),
    "model.activation": ("swiglu", "gelu", "relu"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.positions": ("rope", "learned"),
    "router.kind": ("topk", "sigmoid", "group_limited", "noisy_topk", "hash", "expert_choice"),
    "router.group": ("sequence", "micro_batch", "global"),
    "router.drop": ("position", "probability"),
    "strategy.name": (*STRATEGIES, "auto"),
    "strategy.windows": ("none", "auto"),
    "optim.name": ("adamw", "sgd"),
    "optim.implementation": ("auto", "torch", "apex"),
    "schedule.name": ("cosine", "wsd", "linear", "constant"),
    "train.dtype": ("float32", "bfloat16", "float64"),
    "train.recompute": ("none", "selective", "full"),
    "guard.spike": ("none", "skip", "rewind"),
    "data.kind": ("stdlib", "prose", "indexed"),
    "tracker.wandb.mode": ("offline", "online", "disabled"),
    "tracker.progress": ("auto", "plain", "none"),
}

# Smallest and largest value; every number of the schema has a row.
POSITIVE = 5e-324  # the smallest float above zero
LARGEST_FLOAT = 3e38  # float32 holds no more
LARGEST_SIZE = 2**31 - 1  # of a dimension
LARGEST_COUNT = 2**53  # metrics are floats, which count no further
RANGES: dict[str, tuple[float, float]] = {
    "launch.ranks": (1, 1_000_000),
    "launch.restarts": (0, LARGEST_COUNT),
    "model.num_layers": (1, 100_000),
    "model.d_model": (1, LARGEST_SIZE),
    "model.num_heads": (1, LARGEST_SIZE),
    "model.num_kv_heads": (1, LARGEST_SIZE),
    "model.head_dim": (0, LARGEST_SIZE),
    "model.num_experts": (1, 1 << 20),
    "model.d_ff": (1, LARGEST_SIZE),
    "model.dense_layers_first": (0, LARGEST_SIZE),
    "model.moe_every": (1, LARGEST_SIZE),
    "model.dense_d_ff": (0, LARGEST_SIZE),
    "model.shared_d_ff": (0, LARGEST_SIZE),
    "model.norm_eps": (0, LARGEST_FLOAT),
    "model.rope_theta": (POSITIVE, LARGEST_FLOAT),
    "model.max_positions": (0, LARGEST_SIZE),
    "model.vocab_size": (0, LARGEST_SIZE),
    "model.init_std": (0, LARGEST_FLOAT),
    "model.dropout": (0, 1 - 2**-53),
    "router.top_k": (1, LARGEST_SIZE),
    "router.scale": (POSITIVE, LARGEST_FLOAT),
    "router.capacity_factor": (0, 1e6),
    "router.balance_loss": (0, LARGEST_FLOAT),
    "router.z_loss": (0, LARGEST_FLOAT),
    "router.bias_update_rate": (0, LARGEST_FLOAT),
    "router.num_groups": (1, LARGEST_SIZE),
    "router.groups_per_token": (1, LARGEST_SIZE),
    "router.noise_std": (0, LARGEST_FLOAT),
    "parallel.tp": (1, LARGEST_SIZE),
    "parallel.ep": (1, LARGEST_SIZE),
    "parallel.zero": (0, 1),
    "strategy.bucket_mb": (0, 1e9),
    "strategy.parts": (1, 1024),
    "strategy.late_layers": (0, 100000),
    "strategy.packing_memory_gb": (0, 1e9),
    "optim.lr": (0, LARGEST_FLOAT),
    "optim.beta1": (0, 1 - 2**-53),
    "optim.beta2": (0, 1 - 2**-53),
    "optim.eps": (0, LARGEST_FLOAT),
    "optim.weight_decay": (0, LARGEST_FLOAT),
    "optim.clip_norm": (0, LARGEST_FLOAT),
    "schedule.warmup_steps": (0, LARGEST_COUNT),
    "schedule.warmup_tokens": (0, LARGEST_COUNT),
    "schedule.min_ratio": (0, 1),
    "schedule.decay_fraction": (0, 1),
    "train.steps": (1, LARGEST_COUNT),
    "train.global_batch_size": (1, 1 << 24),
    "train.micro_batch_size": (1, 1 << 24),
    "train.seq_len": (1, LARGEST_SIZE),
    "train.seed": (0, 2**63 - 1),
    "train.eval_interval": (0, LARGEST_COUNT),
    "train.eval_sequences": (1, LARGEST_SIZE),
    "train.exit_step": (0, LARGEST_COUNT),
    "train.max_minutes": (0, 1e9),
    "checkpoint.interval": (0, LARGEST_COUNT),
    "checkpoint.keep_last": (1, LARGEST_COUNT),
    "checkpoint.keep_every": (0, LARGEST_COUNT),
    "data.vocab_size": (1, 1 << 24),
    "guard.window": (8, LARGEST_SIZE),
    "guard.threshold": (POSITIVE, LARGEST_FLOAT),
    "guard.min_rise": (0, LARGEST_FLOAT),
    "guard.max_spikes": (0, LARGEST_COUNT),
    "guard.min_entropy": (0, 1),
    "hang.timeout_s": (0, 1e9),
    "tracker.image_interval": (0, LARGEST_COUNT),
    "tracker.samples": (0, LARGEST_SIZE),
    "tracker.sample_tokens": (1, LARGEST_SIZE),
    "cluster.peak_tflops": (0, LARGEST_FLOAT),
    "cluster.timeout_s": (POSITIVE, 1e9),
    "cluster.nodes": (0, 1_000_000),
    "cluster.ranks_per_node": (0, 1_000_000),
    "cluster.link_gbit": (0, 1e9),
    "cluster.latency_us": (0, 1e9),
    "cluster.device_gflops": (0, 1e15),
    "cluster.attention_ms": (0, 1e9),
    "cluster.experts_ms": (0, 1e9),
    "cluster.kernel_floor_ms": (0, 1e9),
    "cluster.hardware.memory_gib": (0, 1e9),
    "cluster.hardware.memory_gbyte_s": (0, 1e9),
    "cluster.hardware.memory_efficiency": (0, 1),
    "cluster.hardware.float32_tflops": (0, 1e9),
    "cluster.hardware.bfloat16_tflops": (0, 1e9),
    "cluster.hardware.product_efficiency": (0, 1),
    "cluster.hardware.product_half_size": (0, LARGEST_SIZE),
    "cluster.hardware.attention_efficiency": (0, 1),
    "cluster.hardware.kernel_us": (0, 1e9),
    "cluster.hardware.host_stage_us": (0, 1e9),
    "cluster.hardware.domain_ranks": (0, 1_000_000),
    "cluster.hardware.domain_gbyte_s": (0, 1e9),
    "cluster.hardware.domain_latency_us": (0, 1e9),
    "cluster.hardware.nics_per_node": (0, 1_000_000),
    "cluster.hardware.oversubscription": (0, 1e9),
    "cluster.hardware.collective_efficiency": (0, 1),
    "profile.tokens": (1, 1 << 24),
    "profile.last_steps": (1, 1_000_000),
    "profile.window": (1, 1_000_000),
    "profile.stable_change": (0, 1e9),
}

# What a simulation must know of a cluster's links, and of its devices unless they are emulated.
NEEDED_OF_LINKS = ("nodes", "ranks_per_node", "link_gbit", "nics_per_node", "oversubscription", "collective_efficiency")
NEEDED_OF_DEVICES = (
    *("memory_gib", "memory_gbyte_s", "memory_efficiency", "float32_tflops", "bfloat16_tflops"),
    *("product_efficiency", "attention_efficiency", "domain_ranks", "domain_gbyte_s"),
)


def nearest(word: str, words: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the nearest of `words`, or nothing when none is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def check_config(config: PretrainConfig, world: int) -> None:
    """Raises ValueError, one line with the numbers and what to change, if `world` ranks can't run `config`."""
    _check_choices(config)
    _check_numbers(config)
    _check_model(config)
    _check_router(config)
    _check_layout(config, world)
    _check_batch(config, world)
    check_strategy(config, world)
    _check_emulation(config)
    _check_length(config)
    _check_data(config.data)
    _check_profile(config)


def check_hardware(cluster: ClusterConfig) -> None:
    """Raises ValueError, naming file and field, unless `cluster` says all that a simulation must know.

    An emulated device has times of its own and needs nothing but its links."""
    where, hardware = f"conf/cluster/{cluster.name}.yaml", cluster.hardware
    emulated = cluster.device_gflops or cluster.attention_ms
    for key, (low, high) in RANGES.items():
        head, _, name = key.rpartition(".")
        if head not in ("cluster", "cluster.hardware"):
            continue
        value = getattr(cluster if head == "cluster" else hardware, name)
        needed = name in NEEDED_OF_LINKS or (not emulated and name in NEEDED_OF_DEVICES)
        field = name if head == "cluster" else f"hardware.{name}"
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{where}: {field} is {value:g}, which must be from {low:g} to {high:g}: correct it")
        if needed and not value:
            raise ValueError(f"{where}: {field} is 0, which stands for unknown, and a simulation needs it: give it")
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
            f"has no {config.optim.name}": config.optim.name != "adamw",
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
    """Raises ValueError if run.dir can't be written, or a checkpoint that is named isn't there."""
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"run.dir={config.run.dir}: {folder} is a file, not a folder: choose another run.dir")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"run.dir={config.run.dir}: {folder} can't be written: choose another run.dir")
    resume, init_from = config.train.resume, config.train.init_from
    for name, path in (("train.resume", "" if resume in ("auto", "verify", "none") else resume), ("train.init_from", init_from)):
        if path and (Path(path) / "checkpoints").is_dir() and not any(Path(path).glob("checkpoints/step_*")):
            raise ValueError(f"{name}={path} has no checkpoint yet: name another run's folder, or one of its checkpoints")
        if path and not Path(path).is_dir():
            raise ValueError(f"{name}={path}: there is no such folder; give a run's folder, or RUN/checkpoints/step_00000100")


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
    for key, choices in CHOICES.items():
        value = str(value_at(config, key))
        if value not in choices:
            raise ValueError(f"{key}={value} is not one of {', '.join(choices)}{nearest(value, choices)}")


def _check_numbers(config: PretrainConfig) -> None:
    for key, (low, high) in RANGES.items():
        value = value_at(config, key)
        assert isinstance(value, int | float)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} must be a finite number")
        if not low <= value <= high:
            least = "above 0" if low == POSITIVE else f"at least {low:g}"
            most = " and below 1" if 1 - 1e-9 < high < 1 else f" and at most {int(high) if 1 <= high < 1e16 else high}"
            raise ValueError(f"{key}={value} must be {least}{most}")


def _check_model(config: PretrainConfig) -> None:
    model = config.model
    if model.head_dim == 0 and model.d_model % model.num_heads:
        raise ValueError(
            f"model.num_heads ({model.num_heads}) must divide model.d_model ({model.d_model}): change one, or give model.head_dim"
        )
    if model.num_heads % model.num_kv_heads:
        raise ValueError(f"model.num_kv_heads ({model.num_kv_heads}) must divide model.num_heads ({model.num_heads})")
    head_dim = model.head_dim or model.d_model // model.num_heads
    if model.positions == "rope" and head_dim % 2:
        raise ValueError(
            f"model.positions=rope needs an even head size, not {head_dim}: change model.head_dim or model.num_heads"
        )
    if model.dense_layers_first > model.num_layers:
        raise ValueError(
            f"model.dense_layers_first ({model.dense_layers_first}) is more than model.num_layers ({model.num_layers}): lower it"
        )
    if model.max_positions and config.train.seq_len > model.max_positions:
        raise ValueError(
            f"train.seq_len ({config.train.seq_len}) is more than model.max_positions ({model.max_positions}): "
            "shorten the sequences or raise model.max_positions"
        )


def _check_router(config: PretrainConfig) -> None:
    router, num_experts = config.router, config.model.num_experts
    if router.top_k > num_experts:
        raise ValueError(f"router.top_k ({router.top_k}) is more than model.num_experts ({num_experts}): lower it or add experts")
    if router.kind == "group_limited":
        if num_experts % router.num_groups:
            raise ValueError(f"router.num_groups ({router.num_groups}) must divide model.num_experts ({num_experts})")
        if router.groups_per_token > router.num_groups:
            raise ValueError(
                f"router.groups_per_token ({router.groups_per_token}) is more than router.num_groups ({router.num_groups})"
            )
        within = router.groups_per_token * num_experts // router.num_groups
        if router.top_k > within:
            raise ValueError(
                f"router.top_k ({router.top_k}) is more than the {within} experts of router.groups_per_token "
                f"({router.groups_per_token}) of router.num_groups ({router.num_groups}) groups: raise router.groups_per_token"
            )
    elif router.num_groups > 1 or router.groups_per_token > 1:
        raise ValueError(f"router.num_groups ({router.num_groups}) works with router=group_limited alone, not with {router.kind}")
    if router.bias_update_rate and router.kind not in ("sigmoid", "group_limited"):
        raise ValueError(
            f"router.bias_update_rate ({router.bias_update_rate:g}) works with router=sigmoid or group_limited, "
            f"not with {router.kind}"
        )
    if router.noise_std and router.kind != "noisy_topk":
        raise ValueError(f"router.noise_std ({router.noise_std:g}) works with router=noisy_topk alone, not with {router.kind}")
    if router.group == "global":
        if router.capacity_factor or router.kind == "expert_choice":
            choice = router.kind == "expert_choice"
            what = "router=expert_choice" if choice else f"router.capacity_factor={router.capacity_factor:g}"
            raise ValueError(
                f"router.group=global works for the balance loss alone: {what} would need the scores of all ranks "
                "before any token is sent; set router.group=sequence or micro_batch"
            )


def _check_layout(config: PretrainConfig, world: int) -> None:
    model, tp, ep = config.model, config.parallel.tp, config.parallel.ep
    if world % (tp * ep):
        raise ValueError(
            f"parallel.tp ({tp}) x parallel.ep ({ep}) must divide the number of ranks ({world}): "
            f"use a multiple of {tp * ep} ranks, or smaller parallel.tp or parallel.ep"
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


def _check_batch(config: PretrainConfig, world: int) -> None:
    tp, batch, micro = config.parallel.tp, config.train.global_batch_size, config.train.micro_batch_size
    dp = world // tp
    if batch % (micro * dp):
        below, above = batch // (micro * dp) * micro * dp, -(-batch // (micro * dp)) * micro * dp
        near = f"{below} or {above}" if below else f"{above}"
        fits = next((m for m in range(min(micro, batch // dp), 0, -1) if batch % (m * dp) == 0), 0)
        smaller = f", or train.micro_batch_size to {fits}" if fits else ""
        raise ValueError(
            f"train.global_batch_size ({batch}) must be a multiple of train.micro_batch_size ({micro}) x {dp} data-parallel "
            f"ranks ({world} ranks / parallel.tp {tp}) = {micro * dp}: set it to {near}{smaller}"
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


def _check_data(data: DataConfig) -> None:
    if not all(isinstance(entry, str) for entry in data.blend):  # omegaconf lets lists in lists pass
        raise ValueError(f"data.blend={data.blend} must be a list of words, as [0.7,stdlib,0.3,PREFIX]")
    if data.kind == "indexed" and not data.prefix and not data.blend:
        raise ValueError("data=indexed needs data.prefix=PREFIX (of PREFIX.bin and PREFIX.idx) or data.blend=[WEIGHT,CORPUS,...]")
    if data.prefix and data.blend:
        raise ValueError(f"data.prefix={data.prefix} and data.blend exclude each other: put the prefix into the blend")
    if data.prefix and data.kind != "indexed":
        raise ValueError(f"data.prefix={data.prefix} needs data=indexed, not data={data.kind}")
    if len(data.blend) % 2:
        raise ValueError(
            f"data.blend has {len(data.blend)} entries: weights and corpora must take turns, as in [0.7,stdlib,0.3,PREFIX]"
        )
    total = 0.0
    for text, corpus in zip(data.blend[::2], data.blend[1::2], strict=True):
        weight = _number(text, f"data.blend: the weight of {corpus}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"data.blend: the weight of {corpus} is {text}; weights must be finite and not negative")
        total += weight
    if data.blend and total <= 0:
        raise ValueError("data.blend: all weights are zero; give at least one corpus a positive weight")
    shares = [_number(text, f"data.split={data.split}: a share") for text in data.split.split(",")]
    if len(shares) > 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or shares[0] <= 0:
        raise ValueError(
            f"data.split={data.split} must be shares of training, validation, test as 969,30,1: none negative, the first not 0"
        )
    _check_skip(data.skip_samples)


def _check_profile(config: PretrainConfig) -> None:
    model, router = config.model, config.router
    if not config.profile.record:
        return
    if router.kind == "expert_choice":
        raise ValueError("profile.record with router=expert_choice: a token has no choices there: set profile.record=false")
    if router.capacity_factor > 0:
        raise ValueError(
            f"profile.record with router.capacity_factor={router.capacity_factor:g}: capacity takes choices away in training and "
            "not in serving: set profile.record=false, and record afterwards with tools/record_routing.py"
        )
    if not any(is_moe_layer(model, layer) for layer in range(model.num_layers)):
        raise ValueError(
            f"profile.record, but none of {model.num_layers} layers is MoE (model.dense_layers_first={model.dense_layers_first}, "
            f"model.moe_every={model.moe_every}): set profile.record=false"
        )


def _check_skip(ends: list[int]) -> None:
    odd = len(ends) % 2 or not all(isinstance(end, int) for end in ends)
    if odd or sorted(ends) != ends or (ends and ends[0] < 0) or any(a == b for a, b in zip(ends[::2], ends[1::2], strict=True)):
        raise ValueError(
            f"data.skip_samples={ends} must be pairs FIRST,STOP of training sequences in rising order, as [640,704,1280,1344]"
        )


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} is {text!r}, not a number") from None
