"""The text of a dry run: layout, groups, sizes and length of a run that isn't started."""

from collections.abc import Sequence

from megalina.blocks.counts import count_parameters
from megalina.blocks.pipelined import pipelined
from megalina.config import PretrainConfig, padded_vocab_size
from megalina.layout import readers, rows, rows_of_stages
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes

SHOWN_AXES = ("tp", "cp", "ep", "edp", "dp")
SHOWN_GROUPS = 4  # of each axis
SHOWN_STAGES = 16  # pipeline ranks
STATE = ("gradients", "master weights", "moments")  # of a rank, besides its weights


def describe(config: PretrainConfig, world: int, *, vocab_size: int) -> str:
    """`vocab_size`: pieces of the tokenizer, before padding."""
    packing = 1 if config.strategy.packing == "auto" else int(config.strategy.packing)
    train, router = config.train, config.router
    held = InstructionBytes(config, world, vocab_size=vocab_size, packing=packing)
    tp, cp, ep, edp, dp = (held.axes[name] for name in SHOWN_AXES)
    pp, ways, of_cp, cut = (
        config.parallel.pp,
        readers(held.axes),
        f"cp {cp} x " if cp > 1 else "",
        f", each cut over cp {cp}" if cp > 1 else "",
    )
    words = padded_vocab_size(vocab_size, tp)
    counts = count_parameters(config.model, router, vocab_size=words, seq_len=train.seq_len)
    micro_batches = train.global_batch_size // (train.micro_batch_size * ways)
    tokens = train.global_batch_size * train.seq_len
    stages, packed = f"pp {pp} x " if pp > 1 else "", f" (packing {packing})" if packing > 1 else ""
    ahead = f" and {config.model.mtp_layers} of multi-token prediction" if config.model.mtp_layers else ""
    lines = [
        f"model      {config.model.name}: {config.model.num_layers} layers{ahead}, {counts.num_moe_layers} of them MoE, "
        f"{counts.num_experts} experts, top-{counts.top_k} ({router.kind}), vocabulary {words:,}",
        f"parameters {counts.total:,} total, {counts.active:,} active for a token, "
        f"{counts.without_embeddings:,} without embeddings",
        f"layout     {world} ranks = {stages}edp {edp} x ep {ep} x {of_cp}tp {tp}{packed}; "
        f"dense parameters are reduced over dp {dp}, experts over edp x {'cp x ' if cp > 1 else ''}tp {edp * cp * tp}",
    ]
    groups_of = rows_of_stages(held.axes, pp) if pp > 1 else rows(held.axes)
    for name in (name for name in SHOWN_AXES if name != "cp" or cp > 1):
        groups = groups_of[name]
        lines.append(f"  {name:<8} {len(groups)} x {len(groups[0])} ranks: {_some(groups)}")
    lines += (
        _stages(config, world, vocab_size)
        if pp > 1
        else [
            f"a rank     {counts.num_experts // ep} experts a layer; {_size(held.state['weights'])} of weights, "
            f"{_size(sum(held.state[what] for what in STATE))} of gradients and optimizer, activations come on top",
        ]
    )
    lines += [
        f"a step     {train.global_batch_size} sequences x {train.seq_len} = {tokens:,} tokens: "
        f"{micro_batches} x {train.micro_batch_size} sequences on each of {ways} data-parallel ranks{cut}",
        f"the run    {train.steps:,} steps = {train.steps * tokens:,} tokens, "
        f"{train.steps * tokens / counts.active:.2g} for each active parameter",
        f"strategy   {config.strategy.name}; zero {config.parallel.zero}; recompute {train.recompute}; {train.dtype}",
        f"run.dir    {config.run.dir}",
    ]
    return "\n".join(lines)


def _stages(config: PretrainConfig, world: int, vocab_size: int) -> list[str]:
    """Of each pipeline rank the layers of its stages; `tools/plan.py` says what they need."""
    found = pipelined(config, world, vocab_size=vocab_size)
    first = f"pipeline   {config.strategy.pipeline}, {len(found.stages)} stages on {found.ranks} ranks"
    of_ranks = [[str(found.stages[stage]) for stage in found.pipeline.stages_of(rank)] for rank in range(found.ranks)]
    return [
        f"{first}; layers, E embedding, L head; tools/plan.py says what a rank holds",
        *(f"  rank {rank:<3} {' | '.join(stages)}" for rank, stages in enumerate(of_ranks[:SHOWN_STAGES])),
        *(["  ..."] if len(of_ranks) > SHOWN_STAGES else []),
    ]


def _some(groups: Sequence[Sequence[int]]) -> str:
    shown = " ".join("[" + _ranks(group) + "]" for group in groups[:SHOWN_GROUPS])
    return shown + (" ..." if len(groups) > SHOWN_GROUPS else "")


def _ranks(group: Sequence[int]) -> str:
    return " ".join(map(str, group)) if len(group) <= 8 else f"{group[0]} {group[1]} ... {group[-1]}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
