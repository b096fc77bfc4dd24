"""Parameter counts of a model, by arithmetic: total, active for a token, and held by one rank."""

from dataclasses import dataclass

from megalina.config import ModelConfig, PretrainConfig, RouterConfig

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}  # train.dtype -> of one number


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    embedding: int  # token embedding, learned positions, output matrix when it isn't tied
    dense: int  # everything else that every token uses: attention, norms, routers, dense MLPs, shared experts
    expert: int  # one routed expert
    num_moe_layers: int
    num_experts: int
    top_k: int

    @property
    def total(self) -> int:
        return self.embedding + self.dense + self.num_moe_layers * self.num_experts * self.expert

    @property
    def active(self) -> int:
        """Used for one token, embeddings included, as model cards count it."""
        return self.embedding + self.dense + self.num_moe_layers * self.top_k * self.expert

    @property
    def without_embeddings(self) -> int:
        return self.total - self.embedding


def count_parameters(model: ModelConfig, router: RouterConfig, *, vocab_size: int, seq_len: int) -> ParameterCounts:
    """Counts of a model whose embedding has `vocab_size` rows."""
    d, head_dim = model.d_model, model.head_dim or model.d_model // model.num_heads
    q, kv = model.num_heads * head_dim, model.num_kv_heads * head_dim
    attention = d * q + 2 * d * kv + q * d + (q + 2 * kv + d if model.bias else 0) + (2 * head_dim if model.qk_norm else 0)
    norm = d if model.norm == "rmsnorm" else 2 * d
    moe_layers = sum(is_moe_layer(model, layer) for layer in range(model.num_layers))
    gate = 0 if router.kind == "hash" else d * model.num_experts
    shared = _mlp(model, model.shared_d_ff) if model.shared_d_ff else 0
    dense_mlp = _mlp(model, model.dense_d_ff or router.top_k * model.d_ff)
    positions = (model.max_positions or seq_len) * d if model.positions == "learned" else 0
    return ParameterCounts(
        embedding=vocab_size * d * (1 if model.tie_embeddings else 2) + positions,
        dense=model.num_layers * (attention + 2 * norm)
        + norm
        + moe_layers * (gate + shared)
        + (model.num_layers - moe_layers) * dense_mlp,
        expert=_mlp(model, model.d_ff),
        num_moe_layers=moe_layers,
        num_experts=model.num_experts,
        top_k=router.top_k,
    )


def expert_params_on_rank(config: PretrainConfig, packing: int = 1) -> int:
    """Parameters of the routed experts that one rank holds, if it holds `packing` times as many as parallel.ep says."""
    model = config.model
    layers = sum(is_moe_layer(model, layer) for layer in range(model.num_layers))
    return layers * model.num_experts * packing // config.parallel.ep * _mlp(model, model.d_ff)


def expert_bytes_on_rank(config: PretrainConfig, world: int, packing: int = 1) -> int:
    """Bytes of their weights, gradients, master weights and moments.  ZeRO-1 shards the last two over the ranks with the same
    experts, of which there are `packing` times as many too."""
    width = BYTES[config.train.dtype]
    main = max(width, 4)  # gradients, master weights and moments are never below float32
    copies = (2 if config.optim.name == "adamw" else 0) + (1 if width < main else 0)
    params = expert_params_on_rank(config, packing)
    shards = world * packing // config.parallel.ep if config.parallel.zero else 1
    return params * (width + main) + copies * main * params // shards


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    above = layer - model.dense_layers_first
    return above >= 0 and above % model.moe_every == model.moe_every - 1


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding: a multiple of 128 on each tensor-parallel rank."""
    return -(-vocab_size // (128 * tp)) * 128 * tp


def _mlp(model: ModelConfig, width: int) -> int:
    inputs = 2 if model.activation == "swiglu" else 1  # gate and value
    return (inputs + 1) * model.d_model * width + (inputs * width + model.d_model if model.bias else 0)
