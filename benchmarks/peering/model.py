"""The ladder's model as plain modules, around a mixture of experts of another framework.

Shapes: B sequences, S tokens of each, D model width, H heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peering.pace import Pace, Paced, at
from megalina.config import PretrainConfig

MixtureOf = Callable[[PretrainConfig, Pace], nn.Module]  # [B, S, D] -> [B, S, D]


class PeerGPT(nn.Module):
    """ValueError for a model that isn't as plain as the ladder's."""

    def __init__(self, config: PretrainConfig, vocab_size: int, mixture: MixtureOf, pace: Pace):
        super().__init__()
        model = config.model
        check_model(config)
        self.tokens = nn.Embedding(vocab_size, model.d_model)
        self.positions = nn.Embedding(config.train.seq_len, model.d_model)
        self.layers = nn.ModuleList(_Layer(config, mixture, pace) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        for p in (self.tokens.weight, self.positions.weight):
            nn.init.normal_(p, std=model.init_std)

    def forward(self, token_BS: Tensor) -> Tensor:
        """The mean loss of the next token, nats."""
        h_BSD = self.tokens(token_BS) + self.positions.weight[: token_BS.shape[1]]
        for layer in self.layers:
            h_BSD = layer(h_BSD)
        logits = F.linear(self.norm(h_BSD[:, :-1]), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), token_BS[:, 1:].flatten())


class _Layer(nn.Module):
    def __init__(self, config: PretrainConfig, mixture: MixtureOf, pace: Pace):
        super().__init__()
        width, eps = config.model.d_model, config.model.norm_eps
        attention = nn.Sequential(nn.RMSNorm(width, eps=eps), _Attention(config))
        self.attention = Paced(attention, pace, config.cluster.attention_ms / 1e3)
        self.norm, self.mixture, self._pace = nn.RMSNorm(width, eps=eps), mixture(config, pace), pace

    def forward(self, h_BSD: Tensor) -> Tensor:
        h_BSD = h_BSD + self.attention(h_BSD)
        pace = self._pace
        routed_BSD = self.mixture(self.norm(at(h_BSD, backward=pace.waited)))
        return h_BSD + at(routed_BSD, forward=pace.waited)


class _Attention(nn.Module):
    def __init__(self, config: PretrainConfig):
        super().__init__()
        model = config.model
        self._heads = model.num_heads
        inner = model.num_heads * (model.head_dim or model.d_model // model.num_heads)
        self.qkv = nn.Linear(model.d_model, 3 * inner, bias=False)
        self.out = nn.Linear(inner, model.d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, length = x_BSD.shape[:2]
        q, k, v = self.qkv(x_BSD).view(batch, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        y_BHSd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BHSd.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def check_model(config: PretrainConfig) -> None:
    model = config.model
    plain = {
        "model.attention": (model.attention, "gqa"),
        "model.num_kv_heads": (model.num_kv_heads, model.num_heads),
        "model.activation": (model.activation, "gelu"),
        "model.norm": (model.norm, "rmsnorm"),
        "model.positions": (model.positions, "learned"),
        "model.bias": (model.bias, False),
        "model.shared_d_ff": (model.shared_d_ff, 0),
        "model.dense_layers_first": (model.dense_layers_first, 0),
        "model.moe_every": (model.moe_every, 1),
        "model.mtp_layers": (model.mtp_layers, 0),
        "model.tie_embeddings": (model.tie_embeddings, True),
        "train.dtype": (config.train.dtype, "float32"),
    }
    for name, (value, wanted) in plain.items():
        if value != wanted:
            raise ValueError(f"{name}={value}: peers train the ladder's model, which has {wanted}")


def sizes(module: nn.Module, is_expert: Callable[[str], bool]) -> tuple[int, int]:
    """Numbers in dense parameters and in experts'."""
    found = [0, 0]
    for name, p in module.named_parameters():
        found[is_expert(name)] += p.numel()
    return found[0], found[1]


def random_tokens(config: PretrainConfig, vocab_size: int, *, rank: int, step: int) -> Tensor:
    """[B, S] of this rank."""
    generator = torch.Generator().manual_seed(1_000_003 * step + rank)
    shape = (config.train.micro_batch_size, config.train.seq_len)
    return torch.randint(0, vocab_size, shape, generator=generator)
