"""The kinds of routers, as far as lists, costs and configurations must know them; `megalina/model/routers.py` has their torch
functions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megalina.blocks.reference import is_reference, load
from megalina.config import RouterConfig


class RouterKind:
    """A kind of one's own: a subclass, named in `router.kind=folder/file.py:Name`."""

    functions: ClassVar[
        str
    ]  # its torch class, a `megalina.model.routers.Router`: "package.module:Class" or "folder/file.py:Class"
    has_gate: ClassVar[bool] = True  # its scores are products with a weight [E, D]
    experts_choose: ClassVar[bool] = False  # experts choose tokens: a token gets any number of them
    scores_kept: ClassVar[int] = 3  # times [T, E] numbers that are kept for backward
    rows_kept: ClassVar[int] = 0  # times [T, D] numbers that are, besides what a gate reads
    settings: ClassVar[Sequence[str]] = ()  # settings of `router` that mean something to this kind alone

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        """ValueError for settings that contradict each other."""


class TopK(RouterKind):
    functions = "megalina.model.routers:TopK"


class Sigmoid(RouterKind):
    functions = "megalina.model.routers:Sigmoid"
    scores_kept = 5
    settings: ClassVar[Sequence[str]] = ("bias_update_rate",)


class GroupLimited(Sigmoid):
    functions = "megalina.model.routers:GroupLimited"
    settings = ("bias_update_rate", "num_groups", "groups_per_token")

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
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


class NoisyTopK(RouterKind):
    functions = "megalina.model.routers:NoisyTopK"
    scores_kept = 4  # with noise and without
    settings = ("noise_std",)


class Hash(RouterKind):
    functions = "megalina.model.routers:Hash"
    has_gate = False
    scores_kept = 0


class ExpertChoice(RouterKind):
    functions = "megalina.model.routers:ExpertChoice"
    experts_choose = True


KINDS: Mapping[str, type[RouterKind]] = {  # `router.kind`; each has a file in conf/router/
    "topk": TopK,
    "sigmoid": Sigmoid,
    "group_limited": GroupLimited,
    "noisy_topk": NoisyTopK,
    "hash": Hash,
    "expert_choice": ExpertChoice,
}


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


def check_router(config: RouterConfig, num_experts: int) -> None:
    """ValueError for settings that contradict each other or would do nothing."""
    kind = kind_of(config)
    if config.top_k > num_experts:
        raise ValueError(f"router.top_k ({config.top_k}) is more than model.num_experts ({num_experts}): lower it or add experts")
    for name in sorted({name for known in KINDS.values() for name in known.settings} - {*kind.settings}):
        value = getattr(config, name)
        if value != getattr(RouterConfig(), name):
            kinds = " or ".join(known for known, of in KINDS.items() if name in of.settings)
            raise ValueError(f"router.{name} ({value:g}) works with router={kinds} alone, not with {config.kind}")
    if config.group == "global" and (config.capacity_factor or kind.experts_choose):
        what = f"router={config.kind}" if kind.experts_choose else f"router.capacity_factor={config.capacity_factor:g}"
        raise ValueError(
            f"router.group=global works for the balance loss alone: {what} would need the scores of all ranks "
            "before any token is sent; set router.group=sequence or micro_batch"
        )
    kind.check(config, num_experts)
