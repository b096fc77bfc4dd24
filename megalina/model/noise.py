"""Noise: random numbers that are a pure function of what they are for, so no layout, rank or device changes them.

T tokens, C columns (experts, or features of a hidden vector).

A number depends on (seed, layer, site) and on its token's (sample, position) and column, and on nothing else: not on
which tokens are in the same tensor, nor on how often noise was drawn before.  That is counter-based generation as in
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with a cheaper mixer: a row's key and a
column's key are mixed with full avalanche, their product once more, and the high bits are used.
"""

import hashlib
import math

import torch
from torch import Tensor

_ODD_1 = 0xBF58476D1CE4E5B9 - (1 << 64)  # multipliers of the splitmix64 finalizer, as signed 64-bit numbers
_ODD_2 = 0x94D049BB133111EB - (1 << 64)
_STEP_1 = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, made odd
_STEP_2 = 0xD1B54A32D192ED03 - (1 << 64)  # 2^64 / plastic number, made odd


def _key(*parts: int | str) -> int:
    """A signed 64-bit number from a few Python values; the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """Full avalanche of int64 numbers (splitmix64's finalizer); products wrap around."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _ODD_1  # the masks make torch's arithmetic shift a logical one
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _ODD_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _bits(seed: int, layer: int, site: str, sample_T: Tensor, position_T: Tensor, columns: int) -> Tensor:
    """[T, columns] int64 whose high 32 bits are random; few passes, since this is as large as a hidden state."""
    key = _key(seed, layer, site)
    row_T = _mix(_mix(sample_T * _STEP_1 + key) + position_T * _STEP_2)
    column_C = _mix(torch.arange(columns, device=sample_T.device) * _STEP_1 + (key ^ _STEP_2)) | 1
    bits_TC = row_T[:, None] * column_C
    # An arithmetic shift repeats the sign in the upper half: one of 64 bits is lost, and a pass over the tensor saved.
    return bits_TC.bitwise_xor_(bits_TC >> 32).mul_(_ODD_1)


def uniform(seed: int, layer: int, site: str, sample_T: Tensor, position_T: Tensor, columns: int) -> Tensor:
    """[T, columns] float64 in [0, 1), multiples of 2^-32.  `sample_T`, `position_T`: int64; `site` names the use."""
    bits_TC = _bits(seed, layer, site, sample_T, position_T, columns)
    return (bits_TC >> 32).double().add_(2.0**31).mul_(2.0**-32)


def normal(seed: int, layer: int, site: str, sample_T: Tensor, position_T: Tensor, columns: int) -> Tensor:
    """[T, columns] float64, standard normal (Box-Muller; beyond 6.8 never).  Equal across devices up to rounding."""
    u_TC, v_TC = uniform(seed, layer, site, sample_T, position_T, 2 * columns).split(columns, dim=1)
    radius_TC = (u_TC + 2.0**-33).log_().mul_(-2.0).sqrt_()  # half a step up: log of zero is out of reach
    return (v_TC * (2.0 * math.pi)).cos_().mul_(radius_TC)


def dropout(x_TD: Tensor, rate: float, seed: int, layer: int, site: str, sample_T: Tensor, position_T: Tensor) -> Tensor:
    """Inverted dropout: each element is zero with probability `rate`, else divided by 1 - rate; differentiable."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout is {rate}: choose at least 0 and less than 1")
    if rate == 0.0:
        return x_TD
    threshold = round(rate * 2.0**64) - (1 << 63)  # the signed number below which the share `rate` of all numbers lies
    kept_TD = _bits(seed, layer, site, sample_T, position_T, x_TD.shape[1]) >= threshold
    return x_TD * kept_TD.to(x_TD.dtype).mul_(1.0 / (1.0 - rate))
