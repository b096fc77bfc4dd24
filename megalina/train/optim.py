"""The optimizers over flat tensors: slices of gradient buckets and the master weights that belong to them.

Which there are, and what they keep and cost: `megalina/blocks/optimizers.py`.

They know neither parameters nor ranks.  What is sharded (ZeRO-1) is simply not in their list.  Slices that are whole matrices
are updated in three steps: what tp ranks tell one another of those that they cut, directions, update.
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
from megalina.config import OptimConfig
from megalina.mesh import Axis
from megalina.reference import load
from megalina.step.program import Matrices

UNCUT = Axis("tp")


@dataclass(frozen=True, slots=True)
class FlatTensor:
    param: Tensor  # [n] master weights, float32 or float64, without autograd; updated in place
    grad: Tensor  # [n] of the same type; read (and scaled in place) by each step
    decay: bool  # weight decay applies
    matrices: Matrices | None = None  # it is these, updated as wholes


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
    """How an optimizer updates a group in place; of your own: a subclass, named in `OptimizerKind.functions`."""

    description: ClassVar[str]
    takes_divisor: ClassVar[bool] = False  # its kernel divides float32 gradients by `divisor` as it reads them

    def __init__(self, config: OptimConfig):
        self.config = config

    @abstractmethod
    def update(self, group: Group, lr: float, divisor: Tensor | None) -> None:
        """One update, without autograd.  `divisor`: a float32 scalar, None unless it is `takes_divisor`, and then maybe."""


class MatrixRule(Rule):
    """One that takes some parameters as whole matrices; N of them, R rows, C columns.  `state`: by the names of the kind's
    `matrix_states`, each shaped as the gradient."""

    @abstractmethod
    def pursued(self, gradient_NRC: Tensor, state: Mapping[str, Tensor], scale: float) -> Tensor:
        """[N, R, C], element by element: what directions are made of.  Gradients count times `scale`; nothing is changed."""

    @abstractmethod
    def direction(self, pursued_NRC: Tensor) -> Tensor:
        """[N, R, C]: of whole matrices."""

    @abstractmethod
    def apply(
        self,
        weight_NRC: Tensor,
        gradient_NRC: Tensor,
        state: Mapping[str, Tensor],
        direction_NRC: Tensor,
        *,
        scale: float,
        lr: float,
        weight_decay: float,
    ) -> None:
        """One update of weights and state, without autograd."""


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

    def __init__(self, config: OptimConfig, tensors: list[FlatTensor], *, tp: Axis = UNCUT) -> None:
        """`tp`: the ranks that cut matrices."""
        kind = optimizer_of(config)
        self._config, self._rule = config, cast(Rule, load(kind.functions)(config))
        flat = [t for t in tensors if t.matrices is None]
        self._grads = [t.grad for t in flat]
        # Allocated now, not at the first step, so that a checkpoint can be read into them.
        self._state = [
            {name: torch.zeros_like(t.param) for name in (kind.states if t.matrices is None else kind.matrix_states)}
            for t in tensors
        ]
        self._groups = []
        for decay in (True, False):
            chosen = [(t, s) for t, s in zip(tensors, self._state, strict=True) if t.decay == decay and t.matrices is None]
            if chosen:  # a rank may own no shard at all
                own = [t for t, _ in chosen]
                counts = [torch.zeros((), dtype=torch.float32, device=t.param.device) for t in own]
                weight_decay = config.weight_decay if decay else 0.0
                self._groups.append(Group(own, [state for _, state in chosen], counts, weight_decay))
        matrices = [(t, s) for t, s in zip(tensors, self._state, strict=True) if t.matrices is not None]
        self.matrices = MatrixUpdates(cast(MatrixRule, self._rule), matrices, config, tp) if matrices else None
        use_apex = _use_apex(config, kind.has_apex, [t.param for t in tensors])
        self._apex = self._fused_adam() if use_apex and self._groups else None
        self.description = "AdamW: NVIDIA Apex FusedAdam" if use_apex else self._rule.description
        self._step_count = 0

    def step(self, *, lr: float, grad_scale: float = 1.0) -> None:
        """One update with gradients multiplied by `grad_scale` (clipping)."""
        self._step_count += 1
        if self.matrices is not None:
            with torch.no_grad():
                self.matrices.step(lr=lr, scale=grad_scale)
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


class MatrixUpdates:
    """The whole matrices of some slices, from gradients to new weights.

    Directions may be asked for before it is known by what gradients are to be multiplied: then they are made as for 1, and made
    again by `step` where it is something else."""

    def __init__(self, rule: MatrixRule, tensors: list[tuple[FlatTensor, dict[str, Tensor]]], config: OptimConfig, tp: Axis):
        self._rule, self._tp, self._weight_decay = rule, tp, config.weight_decay
        self._all = [_Whole(t, state, tp) for t, state in tensors]
        self._cut = [whole for whole in self._all if whole.cut >= 0]
        self._directions: list[Tensor] = []
        self._gathered: Tensor | None = None  # what directions are made of again
        self._scale = 1.0  # for which they were made

    def send(self, scale: float | None) -> Tensor:
        """[n]: of the matrices that tp cuts what directions are made of; gradients and state where `scale` isn't known yet."""
        told = [self._all[0].gradient.new_empty(0)]
        for whole in self._cut:
            if scale is None:
                told += [whole.gradient.reshape(-1), *(value.reshape(-1) for value in whole.state.values())]
            else:
                told.append(self._rule.pursued(whole.gradient, whole.state, scale).reshape(-1))
        return torch.cat(told)

    def direct(self, scale: float | None, gathered: Tensor | None) -> None:
        """`gathered`: [tp x n], what all ranks have sent."""
        self._gathered = gathered if scale is None else None
        with torch.no_grad():
            self._make(1.0 if scale is None else scale, gathered, told_all=scale is None)

    def _make(self, scale: float, gathered: Tensor | None, *, told_all: bool) -> None:
        self._scale, self._directions = scale, []
        places = [0]
        for whole in self._all:
            if whole.cut < 0:
                pursued = self._rule.pursued(whole.gradient, whole.state, scale)
            else:
                assert gathered is not None
                told = gathered.view(self._tp.size, -1)
                if told_all:
                    gradient, *values = (whole.joined(told, places) for _ in range(1 + len(whole.state)))
                    pursued = self._rule.pursued(gradient, dict(zip(whole.state, values, strict=True)), scale)
                else:
                    pursued = whole.joined(told, places)
            self._directions.append(whole.own(self._rule.direction(pursued)))

    def forget(self) -> None:
        """The step changes nothing."""
        self._directions, self._gathered = [], None

    def step(self, *, lr: float, scale: float) -> None:
        if not self._directions or scale != self._scale:
            self._make(scale, self._gathered, told_all=True)
        for whole, direction in zip(self._all, self._directions, strict=True):
            self._rule.apply(
                whole.weight,
                whole.gradient,
                whole.state,
                direction,
                scale=scale,
                lr=lr,
                weight_decay=self._weight_decay * whole.decay,
            )
        self.forget()


class _Whole:
    """A slice as matrices, [N, R, C] as they are here; views of what is flat."""

    def __init__(self, tensor: FlatTensor, state: dict[str, Tensor], tp: Axis):
        m = tensor.matrices
        assert m is not None
        self.cut, self.decay, self._tp, self._shape = m.cut, tensor.decay, tp, (m.count, m.rows, m.columns)
        self.weight, self.gradient = tensor.param.view(self._shape), tensor.grad.view(self._shape)
        self.state = {name: value.view(self._shape) for name, value in state.items()}

    def joined(self, told: Tensor, places: list[int]) -> Tensor:
        """The next of what ranks have told, [tp, n], from place `places[0]` on, which moves: whole matrices."""
        start, stop = places[0], places[0] + self.weight.numel()
        places[0] = stop
        parts = told[:, start:stop].view(self._tp.size, *self._shape)
        return torch.cat(list(parts), dim=1 + self.cut)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of whole matrices."""
        if self.cut < 0:
            return whole
        width = self._shape[1 + self.cut]
        return whole.narrow(1 + self.cut, self._tp.rank * width, width)


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
