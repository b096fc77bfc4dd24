"""Muon and QK-clip by hand, on one process: an oracle that shares no line with `megalina/train/muon.py`.

One matrix after another, by the formulas of the papers (Jordan et al. 2024; Moonlight,
arXiv:2502.16982; Kimi K2, arXiv:2507.20534).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.optimizers import optimizer_of
from megalina.config import OptimConfig
from megalina.model.attention import Heads
from megalina.model.gpt import GPT, Layer
from megalina.model.init import spec_of
from megalina.model.mla import LatentHeads
from megalina.model.rope import rotate


class MuonByHand:
    """As torch's optimizers are used here.  `others`: updates what isn't a hidden matrix."""

    def __init__(self, optim: OptimConfig, parameters: Sequence[nn.Parameter], others: torch.optim.Optimizer):
        self._optim, self._others, self._parameters = optim, others, parameters
        self._momenta = [[torch.zeros_like(m) for m in matrices_of(p)] for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        for p, momenta in zip(self._parameters, self._momenta, strict=True):
            assert p.grad is not None
            for weight, gradient, momentum in zip(matrices_of(p), matrices_of(p, p.grad), momenta, strict=True):
                self._update(weight, gradient, momentum)
        self._others.step()

    def zero_grad(self) -> None:
        for p in self._parameters:
            p.grad = None
        self._others.zero_grad()

    def _update(self, weight_RC: Tensor, gradient_RC: Tensor, momentum_RC: Tensor) -> None:
        optim, keep = self._optim, self._optim.muon_momentum
        momentum_RC.copy_(keep * momentum_RC + gradient_RC)
        x_RC = gradient_RC + keep * momentum_RC if optim.muon_nesterov else momentum_RC
        weight_RC -= optim.lr * (direction(optim, x_RC) + optim.weight_decay * weight_RC)


def direction(optim: OptimConfig, x_RC: Tensor) -> Tensor:
    """Of one matrix: made orthogonal, and scaled by its sides."""
    rows, columns = x_RC.shape
    x_RC = x_RC / max(x_RC.square().sum().sqrt().item(), 1e-7)
    for _ in range(optim.muon_steps):
        gram_CC = x_RC.T @ x_RC
        x_RC = x_RC @ (optim.muon_a * torch.eye(columns).double() + optim.muon_b * gram_CC + optim.muon_c * gram_CC @ gram_CC)
    larger = max(rows, columns)
    scales = {
        "match_rms_adamw": 0.2 * larger**0.5,
        "original": max(1, rows / columns) ** 0.5,
        "spectral": larger**0.5,
        "none": 1.0,
    }
    return scales[optim.muon_scale] * x_RC


def is_hidden(p: nn.Parameter, optim: OptimConfig) -> bool:
    """Whether Muon takes it."""
    return optimizer_of(optim).takes_whole(spec_of(p), optim)


def matrices_of(p: nn.Parameter, values: Tensor | None = None) -> list[Tensor]:
    """Views of a parameter, or of what is shaped like it: each expert's, gate and up apart."""
    spec = spec_of(p)
    whole = (p.detach() if values is None else values).reshape(spec.shape)
    layers = whole.flatten(0, -3) if whole.dim() > 2 else whole.unsqueeze(0)
    return [part for matrix in layers for part in matrix.chunk(spec.stacked)]


@torch.no_grad()
def largest_logits(layer: Layer, x_TD: Tensor, batch: Batch) -> Tensor:
    """[B, H]: of each sequence and head the largest logit between a query and a key that it sees.  `x_TD`: what the attention
    block reads."""
    heads, n_TD = layer.attention, layer.attention_norm(x_TD)
    sequences, length = batch.tokens_BS.shape
    if isinstance(heads, LatentHeads):
        logit_BHSL, window = _latent_logits(heads, n_TD, batch), 0
    else:
        logit_BHSL, window = _grouped_logits(heads, n_TD, batch), heads.window
    seen_BSL = torch.ones(length, length, dtype=torch.bool).tril().expand(sequences, -1, -1)
    if window:
        place_S = torch.arange(length)
        seen_BSL = seen_BSL & (place_S[:, None] - place_S[None, :] < window)
    if batch.document_BS is not None:
        seen_BSL = seen_BSL & (batch.document_BS[:, :, None] == batch.document_BS[:, None, :])
    return logit_BHSL.where(seen_BSL[:, None], float("-inf")).amax(dim=(2, 3))


def _grouped_logits(heads: Heads, n_TD: Tensor, batch: Batch) -> Tensor:
    shape = (*batch.tokens_BS.shape, -1, heads.head_dim)
    q_BSHd, k_BSGd = (
        (n_TD @ w.T + (0.0 if bias is None else bias)).view(shape)
        for w, bias in ((heads.q, heads.q_bias), (heads.k, heads.k_bias))
    )
    if heads.rotary[0] is not None:
        cos, sin = heads.rotary[0].rows(batch, q_BSHd.dtype)
        q_BSHd, k_BSGd = rotate(q_BSHd, cos, sin), rotate(k_BSGd, cos, sin)
    k_BSHd = k_BSGd.repeat_interleave(q_BSHd.shape[2] // k_BSGd.shape[2], dim=2)
    return torch.einsum("bshd,blhd->bhsl", q_BSHd, k_BSHd) / heads.head_dim**0.5


def _latent_logits(heads: LatentHeads, n_TD: Tensor, batch: Batch) -> Tensor:
    """The part without positions and the turned part each by itself (DeepSeek-V2, arXiv:2405.04434, equations 37 to 47)."""
    shape, still, latent = batch.tokens_BS.shape, heads.still, heads.latent
    if heads.q is not None:
        q_TX = n_TD @ heads.q.T
    else:
        assert heads.q_norm is not None and heads.q_down is not None and heads.q_up is not None
        q_TX = heads.q_norm(n_TD @ heads.q_down.T) @ heads.q_up.T
    q_BSHx, down_TX = q_TX.view(*shape, -1, still + heads.turned), n_TD @ heads.kv_down.T
    key_BSHn = (heads.kv_norm(down_TX[:, :latent]) @ heads.kv_up.T).view(*shape, -1, still + heads.value)[..., :still]
    cos, sin = heads.rotary[0].rows(batch, q_TX.dtype)
    q_BSHr, key_BS1r = rotate(q_BSHx[..., still:], cos, sin), rotate(down_TX[:, latent:].view(*shape, 1, -1), cos, sin)
    logit_BHSL = torch.einsum("bshn,blhn->bhsl", q_BSHx[..., :still], key_BSHn)
    return heads.scale * (logit_BHSL + torch.einsum("bshr,blr->bhsl", q_BSHr, key_BS1r[:, :, 0]))


@torch.no_grad()
def clip_heads(gpt: GPT, optim: OptimConfig, logits_LH: Sequence[Tensor]) -> None:
    """Queries and keys of heads whose logits are too large, one group of heads after another."""
    of_queries, of_keys = optim.qk_clip_alpha, 1 - optim.qk_clip_alpha
    for layer, logit_H in zip(gpt.layers, logits_LH, strict=True):
        heads = layer.attention
        latent = isinstance(heads, LatentHeads)
        groups = len(logit_H) if latent else len(heads.k) // heads.head_dim
        for group, logit in enumerate(logit_H.view(groups, -1).amax(dim=1).tolist()):
            factor = min(1.0, optim.qk_clip / logit) if logit > 0 else 1.0
            if latent:
                own_XR = (heads.q_up if heads.q is None else heads.q).data.chunk(groups)[group]
                own_XR[: heads.still].mul_(factor**of_queries)
                own_XR[heads.still :].mul_(factor)
                heads.kv_up.data.chunk(groups)[group][: heads.still].mul_(factor**of_keys)
                continue
            for values, power in (
                (heads.q, of_queries), (heads.q_bias, of_queries), (heads.k, of_keys), (heads.k_bias, of_keys),
            ):  # fmt: skip
                if values is not None:
                    values.data.chunk(groups)[group].mul_(factor**power)
