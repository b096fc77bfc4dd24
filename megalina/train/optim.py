"""The optimizers over flat tensors: slices of gradient buckets and the master weights that belong to them.

Which there are, and what they keep and cost: `megalina/blocks/optimizers.py`.

They know neither parameters nor ranks.  What is sharded (ZeRO-1) is simply not in their list.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.reference import load
from megalina.config import OptimConfig


@dataclass(frozen=True, slots=True)
class FlatTensor:
    param: Tensor  # [n] master weights, float32 or float64, without autograd; updated in place
    grad: Tensor  # [n] of the same type; read (and scaled in place) by each step
    decay: bool  # weight decay applies


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors with the same weight decay, and what the optimizer keeps of them."""

    tensors: list[FlatTensor]
    states: list[dict[str, Tensor]]  # by the names that the kind declares, each flat as its tensor
    counts: list[Tensor]  # updates so far, as torch's kernels want them: a float32 scalar for each tensor
    weight_decay: float

    def column(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states]


class Rule(ABC):
    """How an optimizer updates a group in place; of one's own: a subclass, named in `OptimizerKind.functions`."""

    description: ClassVar[str]
    takes_divisor: ClassVar[bool] = False  # its kernel divides float32 gradients by `divisor` as it reads them

    def __init__(self, config: OptimConfig):
        self.config = config

    @abstractmethod
    def update(self, group: Group, lr: float, divisor: Tensor | None) -> None:
        """One update, without autograd.  `divisor`: a float32 scalar, None unless it is `takes_divisor`, and then maybe."""


class AdamW(Rule):
    description = "AdamW: torch, fused kernel"
    takes_divisor = True

    def update(self, group: Group, lr: float, divisor: Tensor | None) -> None:
        adamw(
            [t.param for t in group.tensors],
            [t.grad for t in group.tensors],
            group.column("exp_avg"),
            group.column("exp_avg_sq"),
            [],
            group.counts,
            fused=True,
            grad_scale=divisor,
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=lr,
            weight_decay=group.weight_decay,
            eps=self.config.eps,
            maximize=False,
        )


class Sgd(Rule):
    description = "SGD: torch, fused kernel"
    takes_divisor = True

    def update(self, group: Group, lr: float, divisor: Tensor | None) -> None:
        sgd(
            [t.param for t in group.tensors],
            [t.grad for t in group.tensors],
            [None] * len(group.tensors),
            fused=True,
            grad_scale=divisor,
            weight_decay=group.weight_decay,
            momentum=0.0,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class FlatOptimizer:
    """An optimizer over many flat tensors, with one kernel launch where its rule has such a kernel; ValueError where the
    implementation can't be had.

    AdamW and SGD are torch's fused kernels (on CPU too), or for AdamW NVIDIA Apex's.  torch's kernels are called by torch's
    functions: its optimizer classes import its compiler, a second at each start.
    """

    def __init__(self, config: OptimConfig, tensors: list[FlatTensor]) -> None:
        kind = optimizer_of(config)
        self._config, self._rule = config, cast(Rule, load(kind.functions)(config))
        self._grads = [t.grad for t in tensors]
        # Allocated now, not at the first step, so that a checkpoint can be read into them.
        self._state = [{name: torch.zeros_like(t.param) for name in kind.states} for t in tensors]
        self._groups = []
        for decay in (True, False):
            chosen = [(t, state) for t, state in zip(tensors, self._state, strict=True) if t.decay == decay]
            if chosen:  # a rank may own no shard at all
                own = [t for t, _ in chosen]
                counts = [torch.zeros((), dtype=torch.float32, device=t.param.device) for t in own]
                weight_decay = config.weight_decay if decay else 0.0
                self._groups.append(Group(own, [state for _, state in chosen], counts, weight_decay))
        use_apex = _use_apex(config, kind.has_apex, [t.param for t in tensors])
        self._apex = self._fused_adam() if use_apex and self._groups else None
        self.description = "AdamW: NVIDIA Apex FusedAdam" if use_apex else self._rule.description
        self._step_count = 0

    def step(self, *, lr: float, grad_scale: float = 1.0) -> None:
        """One update with gradients multiplied by `grad_scale` (clipping)."""
        self._step_count += 1
        if not self._groups:
            return
        divisor = self._scale(grad_scale)
        if self._apex is not None:
            for settings in self._apex.param_groups:
                settings["lr"] = lr
            self._apex.step()
            return
        with torch.no_grad():
            for group in self._groups:
                self._rule.update(group, lr, divisor)

    def state(self, i: int) -> Mapping[str, Tensor]:
        """The state of tensor `i`, each flat like it, to be read or overwritten in place: what its kind declares."""
        return self._state[i]

    @property
    def step_count(self) -> int:
        """Updates so far (Adam's bias correction depends on it); set it when a run is resumed."""
        return self._step_count

    @step_count.setter
    def step_count(self, value: int) -> None:
        self._step_count = value
        for settings in [] if self._apex is None else self._apex.param_groups:
            settings["step"] = value
        for group in self._groups:
            for count in group.counts:
                count.fill_(value)

    def _fused_adam(self) -> torch.optim.Optimizer:
        for group in self._groups:
            for t in group.tensors:
                t.param.grad = t.grad
        groups: list[dict[str, Any]] = [
            {"params": [t.param for t in group.tensors], "weight_decay": group.weight_decay} for group in self._groups
        ]
        config = self._config
        settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        optimizer: torch.optim.Optimizer = importlib.import_module("apex.optimizers").FusedAdam(
            groups, **settings, adam_w_mode=True
        )
        for group in self._groups:
            for t, state in zip(group.tensors, group.states, strict=True):
                optimizer.state[t.param].update(state)
        return optimizer

    def _scale(self, grad_scale: float) -> Tensor | None:
        """Let torch's kernel divide by 1 / grad_scale while it has the gradients at hand; it takes a float32 divisor, too
        coarse for float64, and Apex takes none: those gradients are scaled beforehand, in one more pass over memory."""
        in_kernel = self._rule.takes_divisor and self._apex is None and all(g.dtype == torch.float32 for g in self._grads)
        divisor = torch.tensor(1.0 / grad_scale) if in_kernel and grad_scale not in (0.0, 1.0) else None
        if divisor is None and grad_scale != 1.0:
            torch._foreach_mul_(self._grads, grad_scale)
        return divisor


def _use_apex(config: OptimConfig, has_apex: bool, params: list[Tensor]) -> bool:
    """Whether Apex is asked for and can be used; ValueError where it is demanded and can't."""
    if config.implementation not in ("auto", "torch", "apex"):
        raise ValueError(f"optim.implementation must be auto, torch or apex, got {config.implementation!r}")
    if config.implementation == "torch":
        return False
    # amp_C is the compiled half of NVIDIA's package; the `apex` of the package index is another project and has none.
    obstacle = ""
    if not has_apex:
        obstacle = f"optim.name is {config.name}, and only adamw has an Apex version here"
    elif any(p.device.type != "cuda" or p.dtype == torch.float64 for p in params):
        obstacle = "it needs CUDA tensors of at most 32 bits"
    elif importlib.util.find_spec("amp_C") is None or importlib.util.find_spec("apex") is None:
        obstacle = "NVIDIA Apex with its CUDA extensions is not installed"
    if obstacle and config.implementation == "apex":
        raise ValueError(f"optim.implementation=apex can't be used: {obstacle}; set optim.implementation=torch")
    return not obstacle
