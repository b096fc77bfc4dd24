"""The kinds of routers, as far as lists, costs and configurations must know them; `megalina/model/routers.py` has their torch
functions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megalina.blocks.reference import is_reference, load
from megalina.config import RouterConfig


class RouterKind:
    """A kind of one's own: a subclass, named in `router.kind=folder/file.py:Name`."""

    functions: ClassVar[str]  # its torch class, a `megalina.model.routers.Router`: "package.module:Class" or "folder/file.py:Class"
    has_gate: ClassVar[bool] = True  # its scores are products with a weight [E, D]
    has_bias: ClassVar[bool] = False  # scores are independent of each other, so that a selection bias can balance them
    experts_choose: ClassVar[bool] = False  # experts choose tokens: a token gets any number of them
    scores_kept: ClassVar[int] = 3  # times [T, E] numbers that are kept for backward
    settings: ClassVar[Sequence[str]] = ()  # settings of `router` that mean something to this kind alone

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        """ValueError for settings that contradict each other."""


class TopK(RouterKind):
    functions = "megalina.model.routers:TopK"


class Sigmoid(RouterKind):
    functions = "megalina.model.routers:Sigmoid"
    has_bias = True
    scores_kept = 5
    settings = ("bias_update_rate",)


class GroupLimited(Sigmoid):
    functions = "megalina.model.routers:GroupLimited"
    settings = ("bias_update_rate", "num_groups", "groups_per_token")

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        groups, chosen = config.num_groups, config.groups_per_token
        if groups < 1 or num_experts % groups:
            raise ValueError(f"router.num_groups is {groups}: choose a divisor of {num_experts}, the number of experts")
        if not 1 <= chosen <= groups:
            raise ValueError(f"router.groups_per_token is {chosen}: choose 1 to {groups}, the number of groups")
        if chosen * (num_experts // groups) < config.top_k:
            raise ValueError(
                f"router.top_k is {config.top_k} but {chosen} groups hold {chosen * (num_experts // groups)} experts: "
                "raise groups_per_token or lower top_k"
            )


class NoisyTopK(RouterKind):
    functions = "megalina.model.routers:NoisyTopK"
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
