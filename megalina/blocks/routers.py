"""The kinds of routers, as far as lists, costs and configurations must know them; `megalina/model/routers.py` has their torch
functions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megalina.config import RouterConfig
from megalina.reference import is_reference, load


class RouterKind:
    """A kind of your own: a subclass, named in `router.kind=folder/file.py:Name`."""

    functions: ClassVar[
        str
    ]  # its torch class, a `megalina.model.routers.Router`: "package.module:Class" or "folder/file.py:Class"
    has_gate: ClassVar[bool] = True  # its scores are products with a weight that is learned, [E, D] or `gate_shape`
    gate_std: ClassVar[float | None] = 0.0  # of its initial values; 0: as of other matrices, None: all are one
    has_scores: ClassVar[bool] = True  # its choices follow from scores, through which gradients flow
    has_rows: ClassVar[bool] = (
        False  # tokens go where the products with an expert's row are largest: their cosines mean something
    )
    features_per_expert: ClassVar[int] = 0  # of a token, that its scores need at least
    even_features: ClassVar[bool] = False  # and of which each expert must have as many as the others
    defers: ClassVar[bool] = False  # its `logits` takes `later`: the gradients of its weights may be an instruction of their own
    is_dense: ClassVar[bool] = False  # all experts compute every token in training; where it is served, few may be chosen
    experts_choose: ClassVar[bool] = False  # experts choose tokens: a token gets any number of them
    scores_kept: ClassVar[int] = 3  # times [T, E] numbers that are kept for backward
    rows_kept: ClassVar[int] = 0  # times [T, D] numbers that are, besides what a gate reads
    settings: ClassVar[Sequence[str]] = ()  # settings of `router` that mean something to this kind alone

    @classmethod
    def gate_shape(cls, num_experts: int, d_model: int) -> tuple[int, int]:
        """Of the weight, a row an expert."""
        return num_experts, d_model

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        """ValueError for settings that contradict each other."""


WITH_BIAS = ("bias",)  # of kinds whose logits are products with a gate, and no more
SELECTION_BIAS = ("bias_update_rate", "bias_update", "bias_centered")
GROUPS = ("num_groups", "groups_per_token")


class TopK(RouterKind):
    defers = has_rows = True
    functions = "megalina.model.routers:TopK"
    settings = WITH_BIAS


class Sigmoid(RouterKind):
    defers = True
    functions = "megalina.model.routers:Sigmoid"
    scores_kept = 5
    settings: ClassVar[Sequence[str]] = (*WITH_BIAS, *SELECTION_BIAS)


class GroupLimited(Sigmoid):
    """DeepSeek-V3: a group is worth its two best biased scores."""

    functions = "megalina.model.routers:GroupLimited"
    settings = (*WITH_BIAS, *SELECTION_BIAS, *GROUPS)

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        check_groups(config, num_experts)


class GroupLimitedSoftmax(RouterKind):
    """DeepSeek-V2: a group is worth its best probability."""

    functions = "megalina.model.routers:GroupLimitedSoftmax"
    defers = True
    settings = (*WITH_BIAS, *GROUPS)

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        check_groups(config, num_experts)


class NoisyTopK(RouterKind):
    defers = True
    functions = "megalina.model.routers:NoisyTopK"
    scores_kept = 4  # with noise and without
    settings = (*WITH_BIAS, "noise_std")


class Hash(RouterKind):
    functions = "megalina.model.routers:Hash"
    has_gate = has_scores = False
    scores_kept = 0


class ExpertChoice(RouterKind):
    defers = True
    functions = "megalina.model.routers:ExpertChoice"
    experts_choose = True
    settings = WITH_BIAS


class LocMoE(RouterKind):
    functions = "megalina.model.locmoe:LocMoE"
    has_gate = False
    has_rows = True
    features_per_expert = 1
    scores_kept = 5  # with the rectified scores and their sign
    settings: ClassVar[Sequence[str]] = ("temperature",)


class LocMoEPlus(LocMoE):
    functions = "megalina.model.locmoe:LocMoEPlus"
    scores_kept = 4  # with cosines before they are divided
    rows_kept = 1  # tokens at length one


class Dense(RouterKind):
    """Dense training, sparse inference (DS-MoE, Pan et al. 2024)."""

    defers = True
    functions = "megalina.model.dense_moe:Dense"
    is_dense = True
    scores_kept = 1  # their softmax
    settings = WITH_BIAS

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        refused = {  # setting -> (its value, what it must be, why)
            "balance_loss": (config.balance_loss, 0, "all experts get all tokens, so there is no load to balance"),
            "capacity_factor": (config.capacity_factor, 0, "all experts get all tokens, so none can be too full"),
            "locality_loss": (config.locality_loss, 0, "all experts get all tokens, wherever they are"),
            "renormalize": (config.renormalize, False, "a token's weights are the softmax over all experts as it is"),
        }
        for name, (value, needed, why) in refused.items():
            if value != needed:
                shown = str(needed).lower()
                raise ValueError(f"router=dense with router.{name}={str(value).lower()}: {why}; set router.{name}={shown}")
        if config.group == "global":
            raise ValueError(
                "router=dense with router.group=global: that is the balance loss' group, and there is none; set "
                "router.group=sequence or micro_batch, over which router.mutual_information_loss is taken"
            )


class LocMoEPlusLearned(LocMoEPlus):
    functions = "megalina.model.locmoe:LocMoEPlusLearned"
    has_gate = defers = even_features = True
    gate_std = None

    @classmethod
    def gate_shape(cls, num_experts: int, d_model: int) -> tuple[int, int]:
        return num_experts, d_model // num_experts


KINDS: Mapping[str, type[RouterKind]] = {  # `router.kind`; each has a file in conf/router/
    "topk": TopK,
    "sigmoid": Sigmoid,
    "group_limited": GroupLimited,
    "group_limited_softmax": GroupLimitedSoftmax,
    "noisy_topk": NoisyTopK,
    "hash": Hash,
    "expert_choice": ExpertChoice,
    "locmoe": LocMoE,
    "locmoe_plus": LocMoEPlus,
    "dense": Dense,
    "locmoe_plus_learned": LocMoEPlusLearned,
}


def check_groups(config: RouterConfig, num_experts: int) -> None:
    """ValueError for groups of experts that don't fit."""
    groups, chosen = config.num_groups, config.groups_per_token
    if num_experts % groups:
        raise ValueError(f"router.num_groups ({groups}) must divide model.num_experts ({num_experts})")
    if chosen > groups:
        raise ValueError(f"router.groups_per_token ({chosen}) is more than router.num_groups ({groups})")
    if config.top_k > (within := chosen * num_experts // groups):
        raise ValueError(
            f"router.top_k ({config.top_k}) is more than the {within} experts of router.groups_per_token ({chosen}) of "
            f"router.num_groups ({groups}) groups: raise router.groups_per_token"
        )


def kind_of(config: RouterConfig) -> type[RouterKind]:
    """ValueError for a kind that isn't there."""
    if is_reference(config.kind):
        kind = load(config.kind)
        if not (isinstance(kind, type) and issubclass(kind, RouterKind)):
            raise ValueError(f"router.kind={config.kind} is no RouterKind: derive it from megalina.blocks.routers.RouterKind")
        return kind
    if config.kind not in KINDS:
        raise ValueError(f"router.kind is {config.kind!r}: choose one of {', '.join(KINDS)}, or folder/file.py:Name")
    return KINDS[config.kind]


def takes_whole_micro_batch(config: RouterConfig, *, tp: int) -> bool:
    """Whether a router must see a whole micro-batch at once: what becomes of a token, or a loss, follows from tokens behind it,
    or of other ranks.  Else a part's routing follows from it and the parts before it.

    Of a micro-batch in parts, each of `tp` ranks has a slice of every part: so parts are not in the order of tokens, in which the
    places in experts' queues are given away."""
    if config.group != "micro_batch":
        return config.group == "global"
    in_order = config.has_capacity and (config.drop == "probability" or tp > 1)
    return in_order or bool(config.mutual_information_loss) or kind_of(config).experts_choose


def visited(config: RouterConfig, num_experts: int) -> int:
    """Experts that a token visits in training."""
    return num_experts if kind_of(config).is_dense else config.top_k


def has_state(config: RouterConfig) -> bool:
    """Whether a step moves something of a router that is no weight: `Router.bias_E`, `Router.delta`."""
    return config.bias_update_rate > 0 or config.capacity_bound != "none"


def capacity_text(config: RouterConfig) -> str:
    """Which setting gives experts a capacity, for errors."""
    if config.capacity_factor:
        return f"router.capacity_factor={config.capacity_factor:g}"
    return f"router.capacity_bound={config.capacity_bound}"


def check_router(config: RouterConfig, num_experts: int, d_model: int) -> None:
    """ValueError for settings that contradict each other or would do nothing."""
    kind = kind_of(config)
    if d_model < (least := kind.features_per_expert * num_experts):
        raise ValueError(
            f"router={config.kind} gives each of model.num_experts ({num_experts}) features of its own, {least} in all, and "
            f"model.d_model is {d_model}: raise it, or take fewer experts"
        )
    if kind.even_features and d_model % num_experts:
        raise ValueError(
            f"router={config.kind} gives each of model.num_experts ({num_experts}) equally many features, and model.d_model is "
            f"{d_model}: make it a multiple"
        )
    if config.top_k > num_experts:
        raise ValueError(f"router.top_k ({config.top_k}) is more than model.num_experts ({num_experts}): lower it or add experts")
    if unknown := sorted({*kind.settings} - RouterConfig.__dataclass_fields__.keys()):
        raise ValueError(
            f"router={config.kind} declares settings that `router` doesn't have: {', '.join(unknown)}; see docs/config.md"
        )
    for name in sorted({name for known in KINDS.values() for name in known.settings} - {*kind.settings}):
        value = getattr(config, name)
        if value != getattr(RouterConfig(), name):
            kinds = " or ".join(known for known, of in KINDS.items() if name in of.settings)
            shown = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value:g}"
            cure = f"; if it does, add {name} to its `settings`" if is_reference(config.kind) else ""
            raise ValueError(f"router.{name} ({shown}) works with router={kinds} alone, not with {config.kind}{cure}")
    if config.group == "global" and (config.capacity_factor or kind.experts_choose):
        what = f"router={config.kind}" if kind.experts_choose else f"router.capacity_factor={config.capacity_factor:g}"
        raise ValueError(
            f"router.group=global works for the balance loss alone: {what} would need the scores of all ranks "
            "before any token is sent; set router.group=sequence or micro_batch"
        )
    _check_selection_bias(config)
    _check_bound(config, kind)
    _check_locality(config, kind, num_experts)
    _check_replay(config, kind)
    if (weight := config.mutual_information_loss) and (not kind.has_scores or kind.experts_choose):
        raise ValueError(
            f"router.mutual_information_loss={weight:g} needs probabilities of a token's experts, and router={config.kind} has "
            "none: set it to 0"
        )
    if weight and config.group == "global":
        raise ValueError(
            "router.mutual_information_loss is no sum over ranks, and router.group=global is over all of them: set "
            "router.group=sequence or micro_batch"
        )
    kind.check(config, num_experts)


def _check_selection_bias(config: RouterConfig) -> None:
    default = RouterConfig()
    for name in ("bias_update", "bias_centered"):
        if (value := getattr(config, name)) != getattr(default, name) and not config.bias_update_rate:
            raise ValueError(
                f"router.{name}={str(value).lower()} does nothing with router.bias_update_rate=0: give that a rate, 0.001 say"
            )
    if config.bias_centered and config.bias_update == "proportional":
        raise ValueError(
            "router.bias_centered=true does nothing with router.bias_update=proportional, whose updates sum to 0 over experts: "
            "leave it at false"
        )


def _check_bound(config: RouterConfig, kind: type[RouterKind]) -> None:
    default = RouterConfig()
    if config.capacity_bound == "none":
        for name in ("capacity_delta", "capacity_ema", "capacity_min"):
            if (value := getattr(config, name)) != getattr(default, name):
                raise ValueError(f"router.{name}={value} does nothing with router.capacity_bound=none: set that to locmoe")
    if config.capacity_quantile != default.capacity_quantile and config.capacity_delta != "quantile":
        raise ValueError(
            f"router.capacity_quantile={config.capacity_quantile:g} does nothing with router.capacity_delta="
            f"{config.capacity_delta}: set that to quantile"
        )
    if config.capacity_bound == "none":
        return
    if not kind.has_rows:
        kinds = ", ".join(name for name, known in KINDS.items() if known.has_rows)
        raise ValueError(
            f"router.capacity_bound={config.capacity_bound} is of the cosines between tokens and their experts' rows, by which "
            f"router={config.kind} does not choose: set it to none, or take one of {kinds}"
        )
    if config.bias:
        raise ValueError(
            f"router.capacity_bound={config.capacity_bound} is of cosines, and router.bias=true adds to the products that they "
            "are made of: set router.bias=false"
        )
    if config.group == "global":
        raise ValueError(
            f"router.capacity_bound={config.capacity_bound} needs a group whose tokens are known before any is sent, and "
            "router.group=global is of all ranks: set router.group=sequence or micro_batch"
        )


def _check_replay(config: RouterConfig, kind: type[RouterKind]) -> None:
    for name in ("replay", "replay_validation"):
        if not (path := getattr(config, name)):
            continue
        if kind.experts_choose or kind.is_dense:
            why = "experts choose tokens there" if kind.experts_choose else "all experts get all tokens there"
            raise ValueError(
                f"router.{name}={path} gives each token its experts, and with router={config.kind} {why}: leave it out, or take "
                "a router whose tokens choose"
            )
        if config.has_capacity:
            raise ValueError(
                f"router.{name}={path} with {capacity_text(config)}: capacity would take given choices away: "
                "set router.capacity_factor=0 and router.capacity_bound=none"
            )


def _check_locality(config: RouterConfig, kind: type[RouterKind], num_experts: int) -> None:
    nodes, weight = config.locality_nodes, config.locality_loss
    if weight and not nodes:
        raise ValueError(f"router.locality_loss={weight:g} needs to know of how many nodes: give router.locality_nodes")
    if nodes > num_experts:
        raise ValueError(
            f"router.locality_nodes ({nodes}) is more than model.num_experts ({num_experts}): nodes without an expert are "
            "home to no sequence; lower it"
        )
    if weight and (not kind.has_scores or kind.experts_choose):
        raise ValueError(
            f"router.locality_loss={weight:g} needs probabilities of a token's experts, and router={config.kind} has none: "
            "set it to 0"
        )
