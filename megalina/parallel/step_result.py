"""The result of a step: what its last reduction told all ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """What all ranks know at the end of a step, before anything is updated.  Losses are means over tokens."""

    loss: float  # nats, without auxiliary terms
    auxiliary: Mapping[str, float]  # name -> mean over MoE layers, unweighted; balance_loss is 1 at perfect balance
    grad_norm: float  # over all parameters, before clipping
    grad_scale: float  # what the update multiplies gradients by
    finite: bool  # False: the step is skipped, on all ranks alike
    spike: bool  # the guard refuses this loss: the step is skipped, on all ranks alike
    loss_tokens: int
    valid_tokens: int
    stop: bool  # some rank was asked to stop after this step
    loads: Tensor  # int64 [MoE layers, E + 1]: tokens that chose each expert, choices lost to capacity
    nearness: (
        Tensor  # int64 [MoE layers, NEARNESS_BINS]: choices by how near the token is to the expert's row; x 0 without a bound
    )
    tokens_digest: int  # 64 bits, of the step's global batch; 0 without ledger
    routing_digests: tuple[int, ...]  # 64 bits per MoE layer, of the step's routing decisions; 0 without ledger
    token_bytes_between_nodes: int = 0  # that all ranks' all-to-alls of tokens sent, there and back, forward and backward
    token_bytes_within_nodes: int = 0  # the same to other ranks of the sender's node
    non_finite: tuple[str, ...] = ()  # of this rank alone: parameters whose gradients are not finite; () if `finite`
    head_logits: Tensor | None = None  # float64 [layers, G]: the step's largest of each group of heads, of those that are here
    max_logit: float | None = None  # of all heads

    @property
    def balance_loss(self) -> float:
        return self.auxiliary.get("balance_loss", 0.0)

    @property
    def z_loss(self) -> float:
        return self.auxiliary.get("z_loss", 0.0)

    @property
    def updates(self) -> bool:
        """Whether the step changes the weights."""
        return self.finite and not self.spike


Update = Callable[[str, StepResult], None]  # bucket, result: the optimizer's part of a step


class Directions(Protocol):
    """Where whole matrices are to go, bucket by bucket; `scale` multiplies gradients, None: it isn't known yet."""

    def send(self, bucket: str, scale: float | None) -> Tensor:
        """What goes to all tp ranks of the matrices that tp cuts, [n]."""
        ...

    def direct(self, bucket: str, scale: float | None, gathered: Tensor | None) -> None:
        """Find the directions, of which the bucket's update takes care.  `gathered`: what all tp ranks have sent, [tp x n]."""
        ...


class CollectivesDiffer(RuntimeError):
    """The ranks have not submitted the same collectives in this step; nothing was updated."""
