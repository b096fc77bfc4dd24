"""Stages of a GPT for torch's own pipelines: the layers of `megalina.model.gpt` with the same weights, as plain torch modules.

Products are torch's own.  Torch splits a backward pass by walking its graph, and a product of ours has the gradients of its input
and of its weight in one node, so torch would compute both twice.  What has no weights is ours, so that both sides run the same
kernels: rotary positions, the attention core, the order of rows.  The stream between stages is [T, D], and no output is a view,
which torch could not detach.

Shapes: B sequences, S tokens a sequence, T = B x S tokens, D model width, V words, X and Y numbers of a token's queries and keys,
N rows, E experts, K experts a token.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalina.blocks.heads import head_dim
from megalina.config import ModelConfig, PretrainConfig, RouterConfig, is_moe_layer
from megalina.model.attend import attend
from megalina.model.gpt import GPT
from megalina.model.init import Cut, initialize
from megalina.model.permute import permute, row_order, unpermute
from megalina.model.rope import attention_factor, frequencies, rope_table, rotate
from megalina.parallel.emulated_device import EmulatedDevice
from megalina.step.pipeline.stages import StageLayers
from megalina.step.program import Instruction, Kind
from megalina.verify.start import shake

FREE_OF_MODEL = (  # what may differ from ModelConfig's defaults
    *("name", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "num_experts", "d_ff", "dense_layers_first"),
    *("moe_every", "dense_d_ff", "activation", "norm_eps", "rope_theta", "max_positions", "vocab_size", "init_std"),
)
MODEL = ModelConfig(tie_embeddings=False)
ROUTER = RouterConfig(balance_loss=0.0)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter of a stage comes from: parameters of the GPT, one below another, or what one of its experts has."""

    names: tuple[str, ...]
    expert: int | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The same of tensors that are shaped as the GPT's parameters."""
        found = [tensors[name] for name in self.names]
        return torch.cat(found) if self.expert is None else found[0][self.expert]


def check_model(config: PretrainConfig) -> None:
    """ValueError for what these modules don't have.  Losses of routers are left out: torch's stages hand on the stream alone."""
    for given, plain, free in (
        (config.model, MODEL, FREE_OF_MODEL),
        (config.router, ROUTER, ("top_k", "renormalize", "scale", "group")),
    ):
        for name in (f.name for f in fields(given) if f.name not in free):
            if (value := getattr(given, name)) != (wanted := getattr(plain, name)):
                part = "model" if given is config.model else "router"
                raise ValueError(f"{part}.{name}={value}: the stages for torch's pipelines have {wanted} alone; leave it out")
    if config.model.activation not in ("swiglu", "gelu"):
        raise ValueError(f"model.activation={config.model.activation}: the stages for torch's pipelines have swiglu and gelu")


def whole_model(config: PretrainConfig, *, dtype: torch.dtype, shaken: bool = False) -> GPT:
    """The model at the start, on one device.  `shaken`: with noise on all weights, so that none is one or zero."""
    train, model = config.train, config.model
    gpt = GPT(model, config.router, vocab_size=model.vocab_size, max_positions=train.seq_len, seed=train.seed)
    initialize(gpt, seed=train.seed, dtype=dtype)
    if shaken:
        shake(gpt, train.seed, Cut())
    return gpt.train()


class Sections:
    """The parts of layers that take an emulated device's time, from when their real math begins: those that are instructions in a
    list of ours, so that what stands between them (norms, routers, the order of rows, the loss) counts alike on both sides."""

    def __init__(self, device: EmulatedDevice):
        self.device = device
        self.late = False  # backward leaves out the gradients of weights
        self.counts = True  # False: while something takes its time as a whole
        self._began_s: dict[tuple[str, str, int], float] = {}

    def begins(self, phase: str, name: str, layer: int) -> None:
        if self.counts:
            self._began_s[phase, name, layer] = time.perf_counter()

    def ends(self, phase: str, name: str, layer: int) -> None:
        if not self.counts:
            return
        instruction = Instruction(phase, Kind.COMPUTE, name, layer, late=self.late and phase == "B")
        self.device.ran(instruction, self._began_s.pop((phase, name, layer)), time.perf_counter())


class _Border(torch.autograd.Function):
    """Where a section begins or ends: a value goes through as it is, its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sections: Sections, name: str, layer: int, first: bool) -> Tensor:
        ctx.of = sections, name, layer, first
        (sections.begins if first else sections.ends)("F", name, layer)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None, None]:
        sections, name, layer, first = ctx.of
        (sections.ends if first else sections.begins)("B", name, layer)
        return dx, None, None, None, None


class Stage(nn.Module):
    """Tokens [B, S] or the stream [T, D] in; the stream or the logits [T, V] out.  `sources`: of each parameter, by its name."""

    def __init__(
        self, config: PretrainConfig, weights: Mapping[str, Tensor], layers: StageLayers, sections: Sections | None = None
    ):
        """`sections`: of an emulated device, if there is one."""
        super().__init__()
        model = config.model
        self.sources: dict[str, Source] = {}
        self._weights: Mapping[str, Tensor] | None = weights
        self.embedding = self.take("embedding", "embedding") if layers.embedding else None
        self.layers = nn.ModuleList()
        for place, number in enumerate(layers.layers):
            self.layers.append(Layer(self, f"layers.{place}.", f"layers.{number}.", number, config, sections))
        self.norm = self.take("norm", "final_norm.weight") if layers.head else None
        self.head = self.take("head", "head") if layers.head else None
        self.eps, self._weights = model.norm_eps, None
        cos_Si, sin_Si = rope_table(config.train.seq_len, frequencies(model, head_dim(model)), attention_factor(model))
        dtype = next(self.parameters()).dtype
        self.rows = cos_Si.to(dtype)[None], sin_Si.to(dtype)[None]

    def take(self, own: str, *names: str, expert: int | None = None) -> nn.Parameter:
        """A parameter with the values of the GPT's."""
        assert self._weights is not None
        self.sources[own] = source = Source(names, expert)
        return nn.Parameter(source.of(self._weights).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = F.embedding(x.flatten(), self.embedding)
        for layer in self.layers:
            x = layer(x, *self.rows)
        if self.head is not None and self.norm is not None:
            x = F.linear(F.rms_norm(x, self.norm.shape, self.norm, self.eps), self.head)
        return x


class Layer(nn.Module):
    """Attention, then a dense MLP or a mixture of experts.  One product makes queries, keys and values."""

    def __init__(self, stage: Stage, own: str, theirs: str, number: int, config: PretrainConfig, sections: Sections | None):
        """`own`, `theirs`: how its parameters' names begin in the stage and in the GPT."""
        super().__init__()
        model, router = config.model, config.router
        self.number, self.sections = number, sections

        def take(name: str, *names: str, expert: int | None = None) -> nn.Parameter:
            return stage.take(own + name, *(theirs + of for of in names), expert=expert)

        self.eps, self.activation, self.seq_len, self.head_dim = (
            model.norm_eps,
            model.activation,
            config.train.seq_len,
            head_dim(model),
        )
        keys = model.num_kv_heads * self.head_dim
        self.widths = model.num_heads * self.head_dim, keys, keys
        self.attention_norm = take("attention_norm", "attention_norm.weight")
        self.qkv = take("qkv", "attention.q", "attention.k", "attention.v")
        self.proj = take("proj", "attention.proj")
        self.mlp_norm = take("mlp_norm", "mlp_norm.weight")
        self.router: nn.Parameter | None = None
        if is_moe_layer(model, number):
            self.router = take("router", "router.weight")
            self.top_k, self.renormalize, self.scale = router.top_k, router.renormalize, router.scale
            experts = range(model.num_experts)
            self.w1 = nn.ParameterList([take(f"w1.{e}", "experts.w1", expert=e) for e in experts])
            self.w2 = nn.ParameterList([take(f"w2.{e}", "experts.w2", expert=e) for e in experts])
        else:
            self.w1 = nn.ParameterList([take("w1.0", "mlp.w1")])
            self.w2 = nn.ParameterList([take("w2.0", "mlp.w2")])

    def forward(self, x_TD: Tensor, cos_1Si: Tensor, sin_1Si: Tensor) -> Tensor:
        x_TD = self._border(x_TD, "attention", first=True)
        n_TD = F.rms_norm(x_TD, self.attention_norm.shape, self.attention_norm, self.eps)
        q_BSHd, k_BSGd, v_BSGd = (
            part.view(-1, self.seq_len, part.shape[1] // self.head_dim, self.head_dim)
            for part in F.linear(n_TD, self.qkv).split(self.widths, dim=1)
        )
        mixed_BSX = attend(rotate(q_BSHd, cos_1Si, sin_1Si), rotate(k_BSGd, cos_1Si, sin_1Si), v_BSGd)
        h_TD = self._border(x_TD + F.linear(mixed_BSX.reshape(len(x_TD), -1), self.proj), "attention", first=False)
        if self.router is None:
            in_TD = self._border(h_TD, "mlp", first=True)
            n_TD = F.rms_norm(in_TD, self.mlp_norm.shape, self.mlp_norm, self.eps)
            return h_TD + self._border(self._expert(0, n_TD), "mlp", first=False)
        return self._routed(h_TD, F.rms_norm(h_TD, self.mlp_norm.shape, self.mlp_norm, self.eps), self.router)

    def _border(self, x: Tensor, name: str, *, first: bool) -> Tensor:
        out: Tensor = x if self.sections is None else _Border.apply(x, self.sections, name, self.number, first)
        return out

    def _routed(self, h_TD: Tensor, n_TD: Tensor, router_ED: Tensor) -> Tensor:
        logits_TE = F.linear(n_TD, router_ED)
        expert_TK = logits_TE.detach().topk(self.top_k, dim=1).indices
        chosen_TK = logits_TE.gather(1, expert_TK) if self.renormalize else logits_TE.log_softmax(1).gather(1, expert_TK)
        weight_TK = chosen_TK.softmax(dim=1) if self.renormalize else chosen_TK.exp()
        order = row_order(expert_TK, len(router_ED))
        rows = self._border(permute(n_TD, order), "experts", first=True).split(order.count_E.tolist())
        back_ND = self._border(torch.cat([self._expert(e, rows_nD) for e, rows_nD in enumerate(rows)]), "experts", first=False)
        return unpermute(h_TD, back_ND, weight_TK * self.scale if self.scale != 1 else weight_TK, order)

    def _expert(self, number: int, x_ND: Tensor) -> Tensor:
        h_NH = F.linear(x_ND, self.w1[number])
        if self.activation == "gelu":
            return F.linear(F.gelu(h_NH), self.w2[number])
        gate_NF, up_NF = h_NH.chunk(2, dim=1)
        return F.linear(F.silu(gate_NF) * up_NF, self.w2[number])
