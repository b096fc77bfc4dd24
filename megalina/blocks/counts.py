"""How many parameters a model has, and its FLOPs for a token, as its blocks say: total, active for a token, held by one rank."""

from dataclasses import dataclass

from megalina.blocks.model import Blocks, blocks_of
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.pipelined import most_moe_layers
from megalina.blocks.routers import visited
from megalina.blocks.sizes import Rank
from megalina.config import BYTES, ModelConfig, PretrainConfig, RouterConfig
from megalina.step.forward import plain
from megalina.step.program import Kind


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    embedding: int  # token embedding, learned positions, output matrix when it isn't tied
    dense: int  # everything else that every token uses: attention, norms, routers, dense MLPs, shared experts
    expert: int  # one routed expert
    num_moe_layers: int
    num_experts: int
    top_k: int  # experts that a token visits in training

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
    blocks = blocks_of(model, router, vocab_size=vocab_size, max_positions=model.max_positions or seq_len)
    embedding = sum(p.numel for p in blocks.embedding.parameters())
    experts = sum(p.numel for _, p in blocks.parameters() if "ep" in p.sharded)
    moe_layers = sum(blocks.moe)
    return ParameterCounts(
        embedding=embedding,
        dense=sum(p.numel for _, p in blocks.parameters()) - embedding - experts,
        expert=_of_one_expert(blocks),
        num_moe_layers=moe_layers,
        num_experts=model.num_experts,
        top_k=visited(router, model.num_experts),
    )


def _of_one_expert(blocks: Blocks) -> int:
    """Of a model without MoE layers: what one would have."""
    if not any(blocks.moe):
        whole = blocks.whole
        blocks = blocks_of(whole.model, whole.router, moe=(True,))
    layer = blocks.moe.index(True)
    return sum(p.numel // p.shape[p.sharded["ep"]] for i, p in blocks.parameters() if i == layer and "ep" in p.sharded)


def expert_params_on_rank(config: PretrainConfig, packing: int = 1, *, layers: int | None = None) -> int:
    """Parameters of the routed experts that one rank holds, if it holds `packing` times as many as parallel.ep says; `layers`: of
    so many MoE layers, None: all."""
    counts = count_parameters(config.model, config.router, vocab_size=1, seq_len=1)
    layers = counts.num_moe_layers if layers is None else layers
    return layers * counts.num_experts * packing // config.parallel.ep * counts.expert


def expert_bytes_on_rank(config: PretrainConfig, world: int, packing: int = 1) -> int:
    """Bytes of their weights, gradients, master weights and moments.  ZeRO-1 shards the last two over the ranks with the same
    experts, of which there are `packing` times as many too.  In a pipeline of the rank with most MoE layers."""
    width = BYTES[config.train.dtype]
    main = max(width, 4)  # gradients, master weights and moments are never below float32
    kind = optimizer_of(config.optim)
    weights = [p for _, p in blocks_of(config.model, config.router).parameters() if "ep" in p.sharded and p.decay]
    states = kind.states_of(weights[0], config.optim) if weights else kind.states  # biases are next to nothing
    copies = len(states) + (1 if width < main else 0)
    pp = config.parallel.pp
    params = expert_params_on_rank(config, packing, layers=most_moe_layers(config, world) if pp > 1 else None)
    shards = world // pp * packing // config.parallel.ep if config.parallel.zero else 1
    return params * (width + main) + copies * main * params // shards


def training_flops_per_token(model: ModelConfig, router: RouterConfig, *, vocab_size: int, seq_len: int) -> float:
    """Model FLOPs of one token's forward and backward pass: three times those of forward's matrix products; what is computed
    again doesn't count.

    Of the routed experts a token uses its top_k, with router=dense all; the lookup in the embedding costs nothing, the head does;
    of attention's two products, queries with keys and weights with values, the causal mask leaves a half on average (PaLM,
    Chowdhery et al. 2022, appendix B).  Attention cut at document ends is counted as if it were not."""
    config = PretrainConfig(model=model, router=router)
    config.train.micro_batch_size, config.train.seq_len = 1, seq_len
    rank = Rank(config=config, ep=1, vocab_rows=vocab_size)
    blocks = blocks_of(model, router, max_positions=model.max_positions or seq_len)
    flops = 0.0
    for instruction in plain(blocks.shape(tp=1, sequence=True)):
        if instruction.kind is Kind.COMPUTE:
            piece = blocks.block_of(instruction).work(rank.at(instruction))
            flops += sum(work.flops for work in (piece.forward, piece.backward, piece.weights))
    return flops / seq_len


@dataclass(frozen=True, slots=True)
class ModelFlops:
    total_params: int
    active_params: int  # used for one token, embeddings included, as model cards count it
    per_token: float  # FLOPs of forward and backward


def model_flops(model: ModelConfig, router: RouterConfig, *, vocab_size: int, seq_len: int) -> ModelFlops:
    """Counts of a model whose vocabulary isn't padded."""
    counts = count_parameters(model, router, vocab_size=vocab_size, seq_len=seq_len)
    per_token = training_flops_per_token(model, router, vocab_size=vocab_size, seq_len=seq_len)
    return ModelFlops(counts.total, counts.active, per_token)
