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

from megalina.config import OptimConfig


@dataclass(frozen=True, slots=True)
class FlatTensor:
    param: Tensor  # [n] master weights, float32 or float64, without autograd; updated in place
    grad: Tensor  # [n] of the same type; read (and scaled in place) by each step
    decay: bool  # weight decay applies


class FlatOptimizer:
    """AdamW or SGD with one kernel launch for many flat tensors; ValueError where the implementation can't be had.

    AdamW: decoupled weight decay (Loshchilov and Hutter 2019), torch's fused kernel (on CPU too) or NVIDIA Apex's.
    SGD: no momentum; weight decay is added to the gradient, as torch does.
    """

    def __init__(self, config: OptimConfig, tensors: list[FlatTensor]) -> None:
        self._tensors = list(tensors)
        self._grads = [t.grad for t in tensors]
        for t in self._tensors:
            t.param.grad = t.grad
        groups: list[dict[str, Any]] = []
        for decay in (True, False):
            params = [t.param for t in self._tensors if t.decay == decay]
            if params:
                groups.append({"params": params, "weight_decay": config.weight_decay if decay else 0.0})
        use_apex = _use_apex(config, [t.param for t in self._tensors])
        self._optimizer: torch.optim.Optimizer | None = None  # a rank may own no shard at all
        if config.name == "adamw":
            # Allocated now, not at the first step, so that a checkpoint can be read into them.
            self._state = [{"exp_avg": torch.zeros_like(t.param), "exp_avg_sq": torch.zeros_like(t.param)} for t in tensors]
            settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
            if groups and use_apex:
                fused_adam = importlib.import_module("apex.optimizers").FusedAdam
                self._optimizer = fused_adam(groups, **settings, adam_w_mode=True)
            elif groups:
                self._optimizer = torch.optim.AdamW(groups, **settings, fused=True)
            self.description = "AdamW: NVIDIA Apex FusedAdam" if use_apex else "AdamW: torch, fused kernel"
        elif config.name == "sgd":
            self._state = [{} for _ in tensors]
            if groups:
                self._optimizer = torch.optim.SGD(groups, lr=config.lr, fused=True)
            self.description = "SGD: torch, fused kernel"
        else:
            raise ValueError(f"optim.name must be adamw or sgd, got {config.name!r}")
        self._apex = use_apex
        self._step_count = 0
        if self._optimizer is not None:
            for t, state in zip(self._tensors, self._state, strict=True):
                self._optimizer.state[t.param].update(state)
            if config.name == "adamw" and not use_apex:
                for t in self._tensors:
                    self._optimizer.state[t.param]["step"] = torch.zeros((), dtype=torch.float32, device=t.param.device)

    def step(self, *, lr: float, grad_scale: float = 1.0) -> None:
        """One update with gradients multiplied by `grad_scale` (clipping)."""
        self._step_count += 1
        if self._optimizer is None:
            return
        self._scale(self._optimizer, grad_scale)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

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
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            if self._apex:
                group["step"] = value
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(value)

    def _scale(self, optimizer: torch.optim.Optimizer, grad_scale: float) -> None:
        """Let torch's kernel divide by 1 / grad_scale while it has the gradients at hand; it takes a float32 divisor, too
        coarse for float64, and Apex takes none: those gradients are scaled beforehand, in one more pass over memory."""
        in_kernel = not self._apex and all(g.dtype == torch.float32 for g in self._grads)
        divisor = torch.tensor(1.0 / grad_scale) if in_kernel and grad_scale not in (0.0, 1.0) else None
        if divisor is None and grad_scale != 1.0:
            torch._foreach_mul_(self._grads, grad_scale)
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]  # what torch.amp.GradScaler sets


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
