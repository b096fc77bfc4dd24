"""The optimizer over flat tensors: slices of gradient buckets and the master weights that belong to them.

It knows neither parameters nor ranks.  What is sharded (ZeRO-1) is simply not in its list.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from megalina.config import OptimConfig


@dataclass(frozen=True, slots=True)
class FlatTensor:
    param: Tensor  # [n] master weights, float32 or float64, without autograd; updated in place
    grad: Tensor  # [n] of the same type; read (and scaled in place) by each step
    decay: bool  # weight decay applies


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors with the same weight decay."""

    tensors: list[FlatTensor]
    states: list[dict[str, Tensor]]
    counts: list[Tensor]  # updates so far, as torch's kernels want them: a float32 scalar for each tensor
    weight_decay: float

    def column(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states]


class FlatOptimizer:
    """AdamW or SGD with one kernel launch for many flat tensors; ValueError where the implementation can't be had.

    AdamW: decoupled weight decay (Loshchilov and Hutter 2019), torch's fused kernel (on CPU too) or NVIDIA Apex's.
    SGD: no momentum; weight decay is added to the gradient, as torch does.

    torch's kernels are called by torch's functions: its optimizer classes import its compiler, a second at each start.
    """

    def __init__(self, config: OptimConfig, tensors: list[FlatTensor]) -> None:
        if config.name not in ("adamw", "sgd"):
            raise ValueError(f"optim.name must be adamw or sgd, got {config.name!r}")
        self._config = config
        self._grads = [t.grad for t in tensors]
        # Allocated now, not at the first step, so that a checkpoint can be read into them.
        names = ("exp_avg", "exp_avg_sq") if config.name == "adamw" else ()
        self._state = [{name: torch.zeros_like(t.param) for name in names} for t in tensors]
        self._groups = []
        for decay in (True, False):
            chosen = [(t, state) for t, state in zip(tensors, self._state, strict=True) if t.decay == decay]
            if chosen:  # a rank may own no shard at all
                own = [t for t, _ in chosen]
                counts = [torch.zeros((), dtype=torch.float32, device=t.param.device) for t in own]
                weight_decay = config.weight_decay if decay else 0.0
                self._groups.append(_Group(own, [state for _, state in chosen], counts, weight_decay))
        use_apex = _use_apex(config, [t.param for t in tensors])
        self._apex = self._fused_adam() if use_apex and self._groups else None
        if config.name == "sgd":
            self.description = "SGD: torch, fused kernel"
        else:
            self.description = "AdamW: NVIDIA Apex FusedAdam" if use_apex else "AdamW: torch, fused kernel"
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
        update = self._adamw if self._config.name == "adamw" else self._sgd
        with torch.no_grad():
            for group in self._groups:
                update(group, lr, divisor)

    def state(self, i: int) -> Mapping[str, Tensor]:
        """The state of tensor `i`, each flat like it, to be read or overwritten in place: exp_avg and exp_avg_sq for
        AdamW, nothing for SGD."""
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

    def _adamw(self, group: _Group, lr: float, divisor: Tensor | None) -> None:
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
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=lr,
            weight_decay=group.weight_decay,
            eps=self._config.eps,
            maximize=False,
        )

    def _sgd(self, group: _Group, lr: float, divisor: Tensor | None) -> None:
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
        in_kernel = self._apex is None and all(g.dtype == torch.float32 for g in self._grads)
        divisor = torch.tensor(1.0 / grad_scale) if in_kernel and grad_scale not in (0.0, 1.0) else None
        if divisor is None and grad_scale != 1.0:
            torch._foreach_mul_(self._grads, grad_scale)
        return divisor


def _use_apex(config: OptimConfig, params: list[Tensor]) -> bool:
    """Whether Apex is asked for and can be used; ValueError where it is demanded and can't."""
    if config.implementation not in ("auto", "torch", "apex"):
        raise ValueError(f"optim.implementation must be auto, torch or apex, got {config.implementation!r}")
    if config.implementation == "torch":
        return False
    # amp_C is the compiled half of NVIDIA's package; the `apex` of the package index is another project and has none.
    obstacle = ""
    if config.name != "adamw":
        obstacle = f"optim.name is {config.name}, and only adamw has an Apex version here"
    elif any(p.device.type != "cuda" or p.dtype == torch.float64 for p in params):
        obstacle = "it needs CUDA tensors of at most 32 bits"
    elif importlib.util.find_spec("amp_C") is None or importlib.util.find_spec("apex") is None:
        obstacle = "NVIDIA Apex with its CUDA extensions is not installed"
    if obstacle and config.implementation == "apex":
        raise ValueError(f"optim.implementation=apex can't be used: {obstacle}; set optim.implementation=torch")
    return not obstacle
