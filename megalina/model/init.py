"""Initial values of parameters, from what their blocks declare.

A model is built on the meta device, without memory.  `initialize` then fills each parameter with values that are a
function of (seed, name, expert): the same on every layout, and a rank draws no expert but its own.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megalina.blocks.parameter import Parameter


@dataclass(frozen=True, slots=True)
class Cut:
    """This rank's place along the axes that cut parameters: axis -> (rank, size)."""

    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def of(self, spec: Parameter) -> dict[int, slice]:
        """dimension -> the indices that this rank holds."""
        out = {}
        for axis, dim in spec.sharded.items():
            rank, size = self.places.get(axis, (0, 1))
            width = spec.shape[dim] // size
            assert width * size == spec.shape[dim], (spec, axis, size)
            out[dim] = slice(rank * width, (rank + 1) * width)
        return out

    def local(self, whole: Tensor, spec: Parameter) -> Tensor:
        """This rank's part of a whole tensor (a view, but where experts have an order of their own)."""
        indices = self.of(spec)
        if spec.order:
            whole = whole.index_select(spec.sharded["ep"], torch.tensor(spec.order, device=whole.device))
        return whole[tuple(indices.get(d, slice(None)) for d in range(whole.dim()))]


def parameter(declared: Parameter) -> nn.Parameter:
    """A parameter without memory, with its declaration as `spec`."""
    out = nn.Parameter(torch.empty(_held(declared.shape, declared.dims), device="meta"))
    out.spec = declared  # type: ignore[attr-defined]
    return out


def spec_of(p: Tensor) -> Parameter:
    return p.spec  # type: ignore[attr-defined]


def initialize(model: nn.Module, *, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu", cut: Cut = Cut()) -> None:
    """Replace every parameter of `model` (on meta) by this rank's part with its initial values."""

    def values(name: str, spec: Parameter) -> Tensor:
        return _initial(name, spec, seed, cut).to(device, dtype)

    _replace(model, values, device)


def allocate(model: nn.Module, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Replace every parameter of `model` (on meta) by memory for all of it, for who fills it at once."""
    _replace(model, lambda _, spec: torch.empty(spec.shape, dtype=dtype, device=device), device)


def _replace(model: nn.Module, values: Callable[[str, Parameter], Tensor], device: torch.device | str) -> None:
    for module_name, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            full = f"{module_name}.{name}" if module_name else name
            spec = spec_of(old)
            local = values(full, spec)
            new = nn.Parameter(local.reshape(_held(local.shape, spec.dims)))
            new.spec = spec  # type: ignore[attr-defined]
            module.register_parameter(name, new)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                raise RuntimeError(f"buffer {name} has no values")
            module._buffers[name] = buffer.to(device)


def local_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of this rank's part in the dimensions of the spec."""
    spec = spec_of(parameter)
    if not spec.dims:
        return tuple(parameter.shape)
    shape, ranks = list(spec.shape), math.prod(spec.shape) // parameter.numel()
    for dim in spec.sharded.values():  # the dimensions that are merged in memory are cut along one axis at the most
        shape[dim] //= ranks
    return tuple(shape)


def _held(shape: torch.Size | tuple[int, ...], dims: int) -> tuple[int, ...]:
    split = len(shape) - dims + 1 if dims else 1
    return (math.prod(shape[:split]), *shape[split:])


def _initial(name: str, spec: Parameter, seed: int, cut: Cut) -> Tensor:
    if not spec.std:
        indices = cut.of(spec)
        shape = [indices[d].stop - indices[d].start if d in indices else n for d, n in enumerate(spec.shape)]
        return torch.ones(shape) if spec.std is None else torch.zeros(shape)
    if "ep" in spec.sharded:  # one generator an expert
        experts = cut.of(spec)[spec.sharded["ep"]]
        rest = Parameter(name, spec.shape[1:], spec.std, {a: d - 1 for a, d in spec.sharded.items() if a != "ep"})
        here = (spec.order or range(spec.shape[spec.sharded["ep"]]))[experts]
        return torch.stack([cut.local(_normal(f"{name}.{e}", rest, seed), rest) for e in here])
    return cut.local(_normal(name, spec, seed), spec).clone()


def drawn(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal numbers in float32 that follow from the seed and the name alone."""
    number = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest())
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(number))


def _normal(name: str, spec: Parameter, seed: int) -> Tensor:
    rows = spec.rows or spec.shape[0]
    values = drawn(name, (rows, *spec.shape[1:]), spec.std or 0.0, seed)
    padding = spec.shape[0] - rows  # drawn apart, so that padding changes nothing
    return torch.cat([values, values.new_zeros(padding, *spec.shape[1:])]) if padding else values
