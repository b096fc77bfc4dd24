"""The text of a dry run: layout, groups, sizes and length of a run that isn't started."""

from collections.abc import Sequence

from megalina.blocks.counts import ParameterCounts, count_parameters
from megalina.config import PretrainConfig
from megalina.parameters import BYTES, padded_vocab_size

SHOWN_GROUPS = 4  # of each axis


def axis_groups(world: int, *, tp: int, ep: int) -> dict[str, list[list[int]]]:
    """The ranks of every group of each axis; world = edp x ep x tp with tp innermost."""
    edp = world // (tp * ep)
    dp = edp * ep
    return {
        "tp": [[d * tp + t for t in range(tp)] for d in range(dp)],
        "ep": [[(x * ep + e) * tp + t for e in range(ep)] for x in range(edp) for t in range(tp)],
        "edp": [[(x * ep + e) * tp + t for x in range(edp)] for e in range(ep) for t in range(tp)],
        "dp": [[d * tp + t for d in range(dp)] for t in range(tp)],
    }


def describe(config: PretrainConfig, world: int, *, vocab_size: int) -> str:
    """`vocab_size`: pieces of the tokenizer, before padding."""
    packing = 1 if config.strategy.packing == "auto" else int(config.strategy.packing)
    tp, ep = config.parallel.tp, config.parallel.ep // packing
    train, router = config.train, config.router
    edp, dp = world // (tp * ep), world // tp
    rows = padded_vocab_size(vocab_size, tp)
    counts = count_parameters(config.model, router, vocab_size=rows, seq_len=train.seq_len)
    micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
    tokens = train.global_batch_size * train.seq_len
    lines = [
        f"model      {config.model.name}: {config.model.num_layers} layers, {counts.num_moe_layers} of them MoE, "
        f"{counts.num_experts} experts, top-{counts.top_k} ({router.kind}), vocabulary {rows:,}",
        f"parameters {counts.total:,} total, {counts.active:,} active for a token, "
        f"{counts.without_embeddings:,} without embeddings",
        f"layout     {world} ranks = edp {edp} x ep {ep} x tp {tp}{f' (packing {packing})' if packing > 1 else ''}; "
        f"dense parameters are reduced over dp {dp}, experts over edp x tp {edp * tp}",
    ]
    for name, groups in axis_groups(world, tp=tp, ep=ep).items():
        lines.append(f"  {name:<8} {len(groups)} x {len(groups[0])} ranks: {_some(groups)}")
    weights, state = _bytes_a_rank(counts, config, world, ep)
    lines += [
        f"a rank     {counts.num_experts // ep} experts a layer; {_size(weights)} of weights, "
        f"{_size(state)} of gradients and optimizer, activations come on top",
        f"a step     {train.global_batch_size} sequences x {train.seq_len} = {tokens:,} tokens: "
        f"{micro_batches} x {train.micro_batch_size} sequences on each of {dp} data-parallel ranks",
        f"the run    {train.steps:,} steps = {train.steps * tokens:,} tokens, "
        f"{train.steps * tokens / counts.active:.2g} for each active parameter",
        f"strategy   {config.strategy.name}; zero {config.parallel.zero}; recompute {train.recompute}; {train.dtype}",
        f"run.dir    {config.run.dir}",
    ]
    return "\n".join(lines)


def _bytes_a_rank(counts: ParameterCounts, config: PretrainConfig, world: int, ep: int) -> tuple[int, int]:
    """Bytes of weights, and of gradients, master weights and moments; norms and routers, which tp doesn't cut, are neglected."""
    tp = config.parallel.tp
    dense = (counts.embedding + counts.dense) // tp
    experts = counts.num_moe_layers * counts.num_experts // ep * counts.expert
    width = BYTES[config.train.dtype]
    main = max(width, 4)  # gradients, master weights and moments are never below float32
    copies = (2 if config.optim.name == "adamw" else 0) + (1 if width < 4 else 0)
    shards = (world // tp, world // (tp * ep)) if config.parallel.zero else (1, 1)
    state = (dense + experts) * main + copies * main * (dense // shards[0] + experts // shards[1])
    return (dense + experts) * width, state


def _some(groups: Sequence[Sequence[int]]) -> str:
    shown = " ".join("[" + _ranks(group) + "]" for group in groups[:SHOWN_GROUPS])
    return shown + (" ..." if len(groups) > SHOWN_GROUPS else "")


def _ranks(group: Sequence[int]) -> str:
    return " ".join(map(str, group)) if len(group) <= 8 else f"{group[0]} {group[1]} ... {group[-1]}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
