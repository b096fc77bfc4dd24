"""The check of `strategy`: what its mechanisms need of the model, the layout and the batch, and numbers that would do nothing."""

from collections.abc import Sequence
from dataclasses import replace

from megalina.blocks.counts import expert_bytes_on_rank
from megalina.blocks.model import context_of, shape_of
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.pipelined import pipelined
from megalina.blocks.routers import capacity_text, kind_of
from megalina.config import PretrainConfig, StrategyConfig, is_moe_layer, training_layers
from megalina.plan_settings import AUTO, SEARCH, plan_of, settings_of
from megalina.reference import is_reference
from megalina.step import candidates
from megalina.step.forward import plain
from megalina.step.partition import MOST_PARTS, NONE, most_parts, partition, ranges_from, ranges_of, with_own_counts
from megalina.step.plan import Plan, chunks_text
from megalina.step.strategy import PIPELINED

SMALLEST_PIECE_BYTES = 1024
USED_BY = {
    "bucket_mb": ("ddp",),
    "parts": ("flow", "pair", "lina_zero", "lancet", SEARCH),
    "partition": ("lancet",),
    "partition_backward": ("lancet",),
    "yields": ("priority", "priority_partition", "lina_nopack", "lina", "flow", "pair", "lina_zero", "lancet", SEARCH),
}
WINDOWED = (
    "priority",
    "priority_partition",
    "lina_nopack",
    "lina",
    "flow",
    "pair",
    "lancet",
)  # those that can keep gradients in gaps
PACKED = (*candidates.PACKED, AUTO)


def check_strategy(config: PretrainConfig, world: int) -> None:
    """ValueError for the first mistake.  Layout and batch are known to be right."""
    strategy = config.strategy
    _check_words(strategy)
    if AUTO in (strategy.name, strategy.chunks, strategy.partition_bytes, strategy.windows) and config.train.deterministic:
        raise ValueError(
            "train.deterministic=true and auto in strategy.* exclude each other, since measured times would decide in which "
            "order sums are made: give a strategy and its numbers"
        )
    if strategy.name == SEARCH and not strategy.order and config.train.deterministic:
        raise ValueError(
            "train.deterministic=true and strategy=search exclude each other, since measured times would decide in which order "
            "sums are made: give the plan.json of a run that has searched with strategy.plan=FILE, or another strategy"
        )
    if strategy.name == SEARCH and AUTO in (strategy.chunks, strategy.partition_bytes, strategy.packing):
        raise ValueError("strategy=search and auto in strategy.* exclude each other: give numbers, which the search begins with")
    if strategy.plan and (strategy.name == AUTO or (strategy.name == SEARCH and not strategy.order)):
        raise ValueError(f"strategy.plan={strategy.plan} is not read here: give the strategy and the numbers that it says")
    if strategy.order and not strategy.plan:
        raise ValueError("strategy.order is what strategy.plan=FILE gives: leave it out, and give the file")
    plain = StrategyConfig()
    for key in ("search_evaluations", "search_mb"):
        if getattr(strategy, key) != getattr(plain, key) and strategy.name not in (SEARCH, AUTO):
            raise ValueError(
                f"strategy.{key}={getattr(strategy, key)} does nothing with strategy={strategy.name}, only with search or auto: "
                f"leave it at {getattr(plain, key)}"
            )
    if strategy.name == SEARCH and strategy.search_evaluations == 0:
        raise ValueError(
            "strategy.search_evaluations=0 searches nothing with strategy=search: give 1000, say, or another strategy"
        )
    for key, names in USED_BY.items():
        if getattr(strategy, key) != getattr(plain, key) and not _uses(strategy.name, names):
            raise _does_nothing(key, getattr(strategy, key), strategy.name)
    for key in ("partition_bytes", "chunks", "late_layers", "deferred_weights", "join_weights"):
        if strategy.name == AUTO and getattr(strategy, key) != getattr(plain, key):
            raise ValueError(f"strategy=auto finds strategy.{key} itself: leave it at {getattr(plain, key)}, or name a strategy")
    if strategy.newton_schulz_after and (strategy.name == AUTO or optimizer_of(config.optim).matrix_states == ()):
        why = "finds its own list" if strategy.name == AUTO else f"has no whole matrices with optim={config.optim.name}"
        raise ValueError(
            f"strategy.newton_schulz_after={strategy.newton_schulz_after} places what Muon computes, and "
            f"strategy={strategy.name} {why}: leave it at 0"
        )
    if strategy.deferred_mb and strategy.deferred_weights == "none":
        raise ValueError(
            f"strategy.deferred_mb={strategy.deferred_mb:g} limits what deferred weights' gradients keep, and "
            "strategy.deferred_weights=none defers none: set strategy.deferred_weights=experts or all"
        )
    if strategy.join_weights and strategy.partition != AUTO:
        _check_joined(plan_of(strategy, packing=1))
    if strategy.partition == AUTO and strategy.partition_backward != plain.partition_backward:
        raise ValueError(
            "strategy.partition=auto finds strategy.partition_backward itself: leave it out, or give numbers of parts"
        )
    if strategy.windows == AUTO and strategy.name not in WINDOWED:
        raise ValueError(
            f"strategy.windows=auto works with strategy={' or '.join(WINDOWED)}, not with {strategy.name}: "
            "set strategy.windows=none"
        )
    if strategy.partition_bytes == AUTO and config.parallel.zero:
        raise ValueError(
            "strategy.partition_bytes=auto and parallel.zero=1 exclude each other, since shards belong to pieces, and would have "
            "to move with each trial: give a number of bytes, 524288 is a good one"
        )
    _check_schedule(config, plan_of(strategy, packing=1), world)
    _check_packing(config, strategy.name, strategy.packing, world)


def check_plan(config: PretrainConfig, plan: Plan, world: int) -> None:
    """ValueError unless `world` ranks can follow the plan with all else of `config`, which is known to be right."""
    values, plain = settings_of(plan), StrategyConfig()
    for key, names in USED_BY.items():
        if values[key] != getattr(plain, key) and not _uses(plan.strategy, names):
            raise _does_nothing(key, values[key], plan.strategy)
    if plan.join_weights:
        _check_joined(plan)
    _check_schedule(config, plan, world)
    _check_packing(config, plan.strategy, str(plan.packing), world)


def runs(config: PretrainConfig, plan: Plan, world: int) -> bool:
    """Whether `check_plan` accepts it."""
    try:
        check_plan(config, plan, world)
    except ValueError:
        return False
    return True


def _check_words(strategy: StrategyConfig) -> None:
    """Numbers that are words, since they may be auto, too."""
    size, chunks, packing = strategy.partition_bytes, strategy.chunks, strategy.packing
    if strategy.partition != AUTO:
        ranges_from(strategy.partition)
    if not (size in ("0", AUTO) or (size.isdecimal() and len(size) <= 12 and int(size) >= SMALLEST_PIECE_BYTES)):
        shown = size if len(size) <= 20 else f"{size[:20]}..."
        raise ValueError(
            f"strategy.partition_bytes={shown} must be bytes, {SMALLEST_PIECE_BYTES} or more, 0 (whole buckets) or auto"
        )
    if chunks != AUTO and not all(n.isdecimal() and len(n) <= 6 for n in chunks.split(",")):
        raise ValueError(f"strategy.chunks={chunks[:40]} must be a number, one for each MoE layer as 1,2,2, or auto")
    if packing != AUTO and not (packing.isdecimal() and int(packing) >= 1):
        raise ValueError(f"strategy.packing={packing} must be 1, 2, 4, ... or auto")


def _check_joined(plan: Plan) -> None:
    """Of a plan with `join_weights`: it has weights' gradients to join, of several parts."""
    if plan.deferred_weights == "none" and plan.late_layers == 0:
        raise ValueError(
            "strategy.join_weights=true joins weights' gradients that are deferred or last, and none are: set "
            "strategy.deferred_weights=experts or all, or strategy.late_layers"
        )
    if plan.parts == 1 and max(plan.chunks) == 1 and most_parts(plan.partition) == 1:
        raise ValueError(
            "strategy.join_weights=true joins what parts and chunks give, and there is one of both: set strategy.parts=2, or "
            "strategy.join_weights=false"
        )


def _uses(strategy: str, names: Sequence[str]) -> bool:
    """Whether a number of the plan is for this strategy, too.  One's own gets all of them."""
    return strategy in names or is_reference(strategy)


def _does_nothing(key: str, value: object, name: str) -> ValueError:
    return ValueError(
        f"strategy.{key}={value} does nothing with strategy={name}, only with {' or '.join(USED_BY[key])}: "
        f"leave it at {getattr(StrategyConfig(), key)}"
    )


def _check_schedule(config: PretrainConfig, plan: Plan, world: int) -> None:
    """What its mechanisms need of the model, the layout and the batch, packing aside."""
    train, shares = config.train, config.parallel.tp * config.parallel.cp
    if config.parallel.pp > 1 and plan.strategy not in PIPELINED:
        raise ValueError(
            f"strategy={plan.strategy} makes a list that goes over all layers, and with parallel.pp={config.parallel.pp} each "
            f"rank has cells of some: choose {', '.join(PIPELINED)}, auto, or parallel.pp=1"
        )
    if plan.strategy == "lina_zero" and config.parallel.zero == 0:
        raise ValueError("strategy=lina_zero moves ZeRO-1's all-gathers and needs parallel.zero=1; without it take strategy=flow")
    micro_batches = train.global_batch_size * shares * config.parallel.pp // (train.micro_batch_size * world)
    cut = plan.cut(micro_batches)
    if config.parallel.pp > 1 and plan.parts > 1:
        cut = plan.parts
        _check_parts_of_cells(config, cut)
    if train.micro_batch_size % cut:
        whole = f" or the number of micro-batches a step ({micro_batches})" if plan.strategy != "pair" else ""
        raise ValueError(
            f"strategy.parts ({plan.parts}) must divide train.micro_batch_size ({train.micro_batch_size}){whole}: parts are "
            f"whole sequences; raise train.micro_batch_size{', or accumulate' if whole else ', or leave strategy.parts at 1'}"
        )
    if cut > 1:
        _check_parts_of_groups(config, cut)
    if plan.strategy == "pair" and config.parallel.pp > 1:
        pipelined(replace(config, strategy=replace(config.strategy, name="pair")), world)  # which refuses what has no pairs
    elif plan.strategy == "pair" and micro_batches == 1:
        raise ValueError(
            "strategy=pair lets backward of a micro-batch go with forward of the next one, and a step has one on each rank: "
            f"raise train.global_batch_size ({train.global_batch_size}) to {2 * train.global_batch_size}, lower "
            f"train.micro_batch_size ({train.micro_batch_size}), or take strategy=flow"
        )
    if plan.partition != NONE:
        _check_partition(config, plan)
    elif plan.partition_backward != StrategyConfig().partition_backward:
        raise ValueError(
            f"strategy.partition_backward={plan.partition_backward} is about what goes forward in parts, and "
            "strategy.partition=none cuts nothing: give strategy.partition=2, say"
        )
    tokens = train.micro_batch_size // cut * train.seq_len // shares
    moe = tuple(is_moe_layer(config.model, i) for i in training_layers(config.model))
    if (most := max(plan.chunks_of(moe).values(), default=1)) > tokens:
        text = chunks_text(plan.chunks)
        raise ValueError(f"strategy.chunks={text}: {most} chunks of {tokens} tokens a part are too many: lower it")
    if plan.late_layers > sum(moe):
        raise ValueError(f"strategy.late_layers={plan.late_layers} is more than the model's {sum(moe)} MoE layers: lower it")


def _check_parts_of_cells(config: PretrainConfig, parts: int) -> None:
    """A pipeline's cells are of one micro-batch each, and cut it themselves."""
    tp, size = config.parallel.tp, config.train.micro_batch_size
    if size % (parts * tp):
        each = f" for each of parallel.tp={tp} ranks" if tp > 1 else ""
        raise ValueError(
            f"strategy.parts={parts} with parallel.pp={config.parallel.pp}: {parts} parts{each} must divide "
            f"train.micro_batch_size ({size}), as cells cut their own micro-batch into whole sequences: make it a multiple of "
            f"{parts * tp}, or take strategy=eager, say"
        )


def _check_partition(config: PretrainConfig, plan: Plan) -> None:
    """Parts of a range are whole sequences, as many on every rank of a tensor-parallel group."""
    parts, tp, micro_batch_size = most_parts(plan.partition), config.parallel.tp, config.train.micro_batch_size
    if not 1 <= parts <= MOST_PARTS:
        raise ValueError(f"strategy.partition={plan.partition}: {parts} parts; give 1 to {MOST_PARTS}")
    if plan.parts > 1:
        raise ValueError(
            f"strategy.partition={plan.partition} and strategy.parts={plan.parts} both cut micro-batches: set strategy.parts=1"
        )
    context = context_of(config.parallel)
    shape = shape_of(config.model, config.router, tp=tp, sequence=config.parallel.sequence, context=context)
    forward = with_own_counts(plain(shape))
    ranges = ranges_of(plan.partition, forward, whole_routers=shape.whole_routers)
    for r in ranges:
        if micro_batch_size % (r.parts * tp):
            each = f" for each of parallel.tp={tp} ranks" if tp > 1 else ""
            raise ValueError(
                f"strategy.partition={plan.partition}: {r.parts} parts{each} must divide train.micro_batch_size "
                f"({micro_batch_size}), as parts are whole sequences: raise it, or take fewer parts"
            )
    partition(forward, ranges, whole_routers=shape.whole_routers)


def _check_parts_of_groups(config: PretrainConfig, cut: int) -> None:
    """A micro-batch that is a group of the routers is cut where a part's routing follows from it and the parts before it."""
    router, micro_batch_size = config.router, config.train.micro_batch_size
    if router.group == "global":
        raise ValueError(
            f"router.group=global balances all ranks' tokens at once, so micro-batches can't be cut into strategy.parts={cut}: "
            "set router.group=micro_batch or sequence, or a strategy without parts"
        )
    if router.group == "micro_batch" and router.mutual_information_loss:
        raise ValueError(
            f"router.mutual_information_loss with router.group=micro_batch is of a whole micro-batch, so it can't be cut into "
            f"strategy.parts={cut}: set router.group=sequence, or train.micro_batch_size={micro_batch_size // cut} so that "
            "parts are whole micro-batches"
        )
    by_probability = router.has_capacity and router.drop == "probability"
    experts_choose = kind_of(router).experts_choose
    if router.group == "micro_batch" and (experts_choose or by_probability):
        what, instead = f"router={router.kind}", ""
        if not experts_choose:
            what = f"router.drop=probability with {capacity_text(router)}"
            instead = "router.drop=position, "
        raise ValueError(
            f"router.group=micro_batch and {what} route a whole micro-batch at once, so it can't be cut into strategy.parts="
            f"{cut}: set {instead}router.group=sequence, or train.micro_batch_size={micro_batch_size // cut} so that parts are "
            "whole micro-batches"
        )


def _check_packing(config: PretrainConfig, name: str, packing: str, world: int) -> None:
    ep, limit_gb = config.parallel.ep, config.strategy.packing_memory_gb
    if packing == "1":
        return
    if name not in PACKED:
        less = f", or pack with parallel.ep={ep // int(packing)} alone" if packing != AUTO and ep % int(packing) == 0 else ""
        raise ValueError(
            f"strategy.packing={packing} works with strategy={' or '.join(PACKED)}, not with {name}: set strategy.packing=1{less}"
        )
    if packing == AUTO and config.train.deterministic:
        raise ValueError(
            "train.deterministic=true and strategy.packing=auto exclude each other, since measured times would decide how sums "
            "are rounded: set strategy.packing=1, 2, ..."
        )
    if packing != AUTO and ep % int(packing):
        raise ValueError(f"strategy.packing ({packing}) must divide parallel.ep ({ep})")
    least = 1 if packing == AUTO else int(packing)
    if 0 < limit_gb * 1e9 < (needed_bytes := expert_bytes_on_rank(config, world, least)):
        raise ValueError(
            f"strategy.packing={packing} needs at least {needed_bytes / 1e9:.3g} GB for a rank's experts, their gradients and "
            f"optimizer state, and strategy.packing_memory_gb is {limit_gb:g}: raise it, or pack less"
        )
