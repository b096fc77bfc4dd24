"""Plants: bugs to build into a rank's `Trainable` on purpose, to see whether the verification finds and names them.

Each does what such a bug would do, on all ranks alike.  `plant` is called after the model has its weights and before anything
else holds on to its functions, its program or its buckets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megalina.blocks.dispatch import ONCE_PER_NODE, ROWS, dispatch_of
from megalina.blocks.heads import attention_bias
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.pipelined import pipelined
from megalina.blocks.routers import kind_of, takes_whole_micro_batch
from megalina.config import PretrainConfig, is_moe_layer
from megalina.parallel.trainable import Trainable
from megalina.plan_settings import plan_of
from megalina.step.partition import most_parts
from megalina.verify.bugs import attention, forward, gradients, losses, pipelines, replay, sent_once, whole_matrices
from megalina.verify.recording import SEQUENCES, Layout


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug.  `overrides`: of the configuration, so that it can act; `applies`: whether it changes a number in a layout."""

    name: str
    what: str  # one line, for people
    applies: Callable[[Layout, PretrainConfig], bool]
    plant: Callable[[Trainable, PretrainConfig], None]
    overrides: tuple[str, ...] = ()


def plant(name: str, trainable: Trainable, config: PretrainConfig) -> None:
    """Build a bug into this rank's trainable.  `config` has the layout's choices in it."""
    PLANTS[name].plant(trainable, config)


def _takes_matrices(config: PretrainConfig) -> bool:
    """And does nothing else with them."""
    kind = optimizer_of(config.optim)
    return bool(kind.matrix_states) and not kind.clips_heads


def _has_moe(config: PretrainConfig) -> bool:
    return any(is_moe_layer(config.model, i) for i in range(config.model.num_layers))


def _is_balanced(config: PretrainConfig) -> bool:
    return _has_scores(config) and config.router.balance_loss > 0 and not kind_of(config.router).experts_choose


def _is_dense(config: PretrainConfig) -> bool:
    return _has_moe(config) and kind_of(config.router).is_dense


def _has_scores(config: PretrainConfig) -> bool:
    return _has_moe(config) and kind_of(config.router).has_gate


def _groups_are_cut(layout: Layout, config: PretrainConfig) -> bool:
    """Whether a tp rank has a part of a group of tokens that shares capacity and balance.  Not where parts of a micro-batch hand
    their choices on to each other: these bugs don't."""
    if _parts(config) > 1 and config.router.group == "micro_batch":
        return False
    if layout.cp > 1:  # these bugs are of tp's slices
        return False
    part_of_sequence = layout.tp > layout.micro_batch and layout.tp % layout.micro_batch == 0
    return layout.tp > 1 and (config.router.group == "micro_batch" or part_of_sequence)


def _parts(config: PretrainConfig) -> int:
    """In which a micro-batch is routed."""
    plan = plan_of(config.strategy)
    return max(plan.parts, most_parts(plan.partition))


def _passes_capacity(layout: Layout, config: PretrainConfig) -> bool:
    """Whether a part's routing follows from the parts before it, and some of their tokens are dropped."""
    router = config.router
    limited = 0 < router.capacity_factor < 1 and not takes_whole_micro_batch(router, tp=layout.tp)
    return _has_moe(config) and limited and router.group == "micro_batch" and _parts(config) > 1 and layout.tp == 1


def _balance_is_per_rank(layout: Layout, config: PretrainConfig) -> bool:
    router = config.router
    kind = kind_of(router)
    if not _has_moe(config) or not kind.has_gate or kind.experts_choose or kind.is_dense:
        return False
    if router.group == "global":
        return layout.world > 1 and layout.cp == 1
    return _groups_are_cut(layout, config) and router.kind != "noisy_topk" and not router.capacity_factor


def _locality_is_of_numbers(layout: Layout, config: PretrainConfig) -> bool:
    """Whether ranks have sequences that are at home elsewhere.  Noise is of their numbers, too."""
    router = config.router
    local = _has_moe(config) and router.locality_loss > 0 and router.locality_nodes > 1 and router.kind != "noisy_topk"
    return local and layout.dp < SEQUENCES and layout.cp == 1


def _groups_decide(config: PretrainConfig) -> bool:
    """Whether a token's experts are of a few groups, whose worth depends on the rule."""
    router, grouped = config.router, "num_groups" in kind_of(config.router).settings
    several = router.groups_per_token < router.num_groups < config.model.num_experts
    return _has_moe(config) and grouped and several and not router.capacity_factor and not router.replay


def _replays(config: PretrainConfig) -> bool:
    return _has_moe(config) and bool(config.router.replay)


def _has_moe_without_main_loss(layout: Layout, config: PretrainConfig) -> bool:
    """Whether routers are on a pipeline rank that hasn't the main loss."""
    job = pipelined(config, layout.world)
    others = (held for held in map(job.held, range(job.ranks)) if not held.last)
    return any(is_moe_layer(config.model, layer) for held in others for layer in held.layers)


def _lies_elsewhere(layout: Layout, config: PretrainConfig) -> bool:
    """Whether experts lie in another order than that of their numbers: on the ranks, or on those of a server that has as many."""
    return bool(config.parallel.placement) or 1 < layout.ep < config.model.num_experts


_ALL = (
    Plant(
        "experts_scaled_by_edp",
        "the experts' gradients are edp times too large",
        lambda layout, config: _has_moe(config) and layout.edp > 1,
        gradients.experts_scaled_by_edp,
    ),
    Plant(
        "divided_by_dp_twice",
        "all gradients are divided by the number of data-parallel ranks once more",
        lambda layout, config: layout.dp > 1,
        gradients.divided_by_dp_twice,
    ),
    Plant(
        "norm_without_experts",
        "the norm of the gradients leaves the experts out",
        lambda layout, config: _has_moe(config),
        gradients.norm_without_experts,
    ),
    Plant(
        "balance_loss_per_rank",
        "each rank's balance loss knows the choices of its own tokens alone",
        _balance_is_per_rank,
        losses.balance_loss_per_rank,
        ("router.group=micro_batch", "router.capacity_factor=0"),
    ),
    Plant(
        "bias_added_tp_times",
        "each tp rank adds the bias of a row-parallel matrix before the sum",
        lambda layout, config: attention_bias(config.model) == "all" and layout.tp > 1,
        forward.bias_added_tp_times,
        ("model.bias=true",),
    ),
    Plant(
        "router_detached",
        "no gradient flows through the combine weights",
        lambda layout, config: (
            _has_scores(config)
            and not (config.router.renormalize and config.router.top_k == 1)
            and not kind_of(config.router).is_dense
        ),
        gradients.router_detached,
    ),
    Plant(
        "bucket_reduced_early",
        "a bucket of gradients is summed over the ranks before the last micro-batch",
        lambda layout, config: layout.micro_batches > 1 and layout.dp > 1 and layout.pp == layout.cp == 1,
        gradients.bucket_reduced_early,
    ),
    Plant(
        "padding_counted",
        "padding counts in the number of tokens that losses are divided by",
        lambda layout, config: True,
        losses.padding_counted,
    ),
    Plant(
        "groups_exchanged",
        "the experts' gradients are summed over the ranks that hold other experts",
        lambda layout, config: _has_moe(config) and layout.ep == layout.copies > 1 and layout.zero == 0,
        gradients.groups_exchanged,
    ),
    Plant(
        "capacity_per_chunk",
        "capacity is applied to each tp rank's tokens of a group, not to the group",
        lambda layout, config: (
            _has_moe(config)
            and _groups_are_cut(layout, config)
            and (config.router.capacity_factor > 0 or kind_of(config.router).experts_choose)
        ),
        forward.capacity_per_chunk,
        ("router.group=micro_batch", "router.capacity_factor=0.8"),
    ),
    Plant(
        "stale_zero_shard",
        "ranks don't get the other ranks' updated ZeRO-1 shards",
        lambda layout, config: layout.zero == 1 and layout.world > 1,
        gradients.stale_zero_shard,
    ),
    Plant(
        "last_micro_batch_dropped",
        "the last micro-batch is in no gradient",
        lambda layout, config: layout.micro_batches > 1,
        gradients.last_micro_batch_dropped,
    ),
    Plant(
        "micro_batch_counted_twice",
        "the first micro-batch is in every gradient twice",
        lambda layout, config: layout.micro_batches > 1,
        gradients.micro_batch_counted_twice,
    ),
    Plant(
        "sequence_norm_not_summed",
        "with sequence parallelism the norms' gradients are not summed over tp",
        lambda layout, config: layout.tp > 1 and layout.sequence and layout.zero == 0,
        gradients.sequence_norm_not_summed,
    ),
    Plant(
        "capacity_not_passed",
        "parts of a micro-batch route as if no tokens of it were before theirs",
        _passes_capacity,
        forward.capacity_not_passed,
        ("router.group=micro_batch", "router.capacity_factor=0.8"),
    ),
    Plant(
        "rows_not_regrouped",
        "rows that arrive from several ranks are not brought into the order of experts",
        lambda layout, config: (
            _has_moe(config)
            and 1 < layout.ep < config.model.num_experts
            and layout.cp == 1  # no diagnosis plays rows of cut sequences
            and not _is_dense(config)
            and dispatch_of(config).kind == ROWS
        ),
        forward.rows_not_regrouped,
    ),
    Plant(
        "row_summed_twice",
        "with parallel.dispatch=once_per_rank or once_per_node a token adds what comes back from one place twice",
        lambda layout, config: _has_moe(config) and layout.dispatch != ROWS,
        sent_once.row_summed_twice,
    ),
    Plant(
        "weight_applied_twice",
        "with parallel.dispatch=once_per_rank or once_per_node experts' weights are applied before the wire and after it",
        lambda layout, config: _has_moe(config) and layout.dispatch != ROWS,
        sent_once.weight_applied_twice,
    ),
    Plant(
        "rank_forgotten",
        "with parallel.dispatch=once_per_node a rank that passes rows on forgets one of its node's ranks in the sum",
        lambda layout, config: _has_moe(config) and layout.dispatch == ONCE_PER_NODE and config.strategy.packing == "1",
        sent_once.rank_forgotten,
    ),
    Plant(
        "rope_interleaved",
        "positions turn the queries of latent attention in pairs of neighbours, the key in pairs of halves",
        lambda layout, config: config.model.attention == "mla",
        attention.rope_interleaved,
    ),
    Plant(
        "norm_of_own_heads",
        "each tp rank norms its heads' queries and keys by their own squares, where all heads' should be taken together",
        lambda layout, config: config.model.qk_norm == "projection" and layout.tp > 1,
        attention.norm_of_own_heads,
        ("model.qk_norm=projection",),
    ),
    Plant(
        "window_too_wide",
        "a token sees one token more than model.window says",
        lambda layout, config: 0 < config.model.window < config.train.seq_len,
        attention.window_too_wide,
        ("model.window=4",),
    ),
    Plant(
        "zigzag_undone_wrongly",
        "with context parallelism ranks' tokens are put together rank after rank, not in the order of the sequence",
        lambda layout, config: layout.cp > 1,
        attention.zigzag_undone_wrongly,
    ),
    Plant(
        "mask_of_another_piece",
        "with context parallelism the second piece of a rank is masked as if it followed its first",
        lambda layout, config: layout.cp > 1 and layout.cp_kind == "all_gather",
        attention.mask_of_another_piece,
    ),
    Plant(
        "sinks_left_out",
        "attention's sinks are left out of the softmax",
        lambda layout, config: config.model.attention_sinks and layout.cp == 1,
        attention.sinks_left_out,
        ("model.attention_sinks=true",),
    ),
    Plant(
        "expert_left_out",
        "with router=dense one expert is computed by nobody",
        lambda layout, config: _is_dense(config),
        forward.expert_left_out,
    ),
    Plant(
        "mutual_information_per_rank",
        "each rank's mutual information loss knows its own tokens alone",
        lambda layout, config: (
            _has_scores(config) and config.router.mutual_information_loss > 0 and _groups_are_cut(layout, config)
        ),
        losses.mutual_information_per_rank,
        ("router.group=micro_batch", "router.mutual_information_loss=0.1"),
    ),
    Plant(
        "z_loss_without_gradient",
        "the router's z-loss is reported but has no gradient",
        lambda layout, config: _has_scores(config) and config.router.z_loss > 0,
        gradients.z_loss_without_gradient,
        ("router.z_loss=0.01",),
    ),
    Plant(
        "balance_loss_without_gradient",
        "the balance loss is reported but has no gradient",
        lambda layout, config: _is_balanced(config),
        gradients.balance_loss_without_gradient,
        ("router.balance_loss=0.1",),
    ),
    Plant(
        "replay_of_places",
        "replayed experts are taken for places on the ranks, not for the experts' own numbers",
        lambda layout, config: _replays(config) and _lies_elsewhere(layout, config),
        replay.replay_of_places,
        ("router.replay=drawn",),
    ),
    Plant(
        "replay_shifted",
        "each token gets the replayed experts of the token before it",
        lambda layout, config: _replays(config),
        replay.replay_shifted,
        ("router.replay=drawn",),
    ),
    Plant(
        "replay_scores_zeroed",
        "replayed experts that the router would not have chosen get the weight zero, and no gradient",
        lambda layout, config: _replays(config) and kind_of(config.router).has_scores,
        replay.replay_scores_zeroed,
        ("router.replay=drawn",),
    ),
    Plant(
        "mtp_across_documents",
        "multi-token prediction counts words of other documents",
        lambda layout, config: config.model.mtp_layers > 0 and config.data.reset_attention,
        losses.mtp_across_documents,
        ("model.mtp_layers=1",),
    ),
    Plant(
        "mtp_loss_divided_twice",
        "the loss of multi-token prediction is divided by the number of data-parallel ranks once more",
        lambda layout, config: config.model.mtp_layers > 0 and config.model.mtp_loss > 0 and layout.dp > 1,
        losses.mtp_loss_divided_twice,
        ("model.mtp_layers=1",),
    ),
    Plant(
        "group_rule_of_other_family",
        "groups of experts are worth what they are in another family of models",
        lambda layout, config: _groups_decide(config),
        forward.group_rule_of_other_family,
        ("router=group_limited",),
    ),
    Plant(
        "load_counted_again",
        "an expert's load, which moves its selection bias, is counted again where backward computes the router again",
        lambda layout, config: _has_moe(config) and config.router.bias_update_rate > 0 and layout.recompute == "full",
        losses.load_counted_again,
        ("router=sigmoid",),
    ),
    Plant(
        "home_of_rank",
        "the locality loss takes sequences to be at home where the rank is that computes them",
        _locality_is_of_numbers,
        losses.home_of_rank,
        ("router.locality_loss=0.1", "router.locality_nodes=2"),
    ),
    Plant(
        "norm_per_rank",
        "each rank clips by the norm of the gradients it holds",
        lambda layout, config: layout.tp > 1 or layout.ep > 1 or (layout.zero == 1 and layout.world > 1),
        gradients.norm_per_rank,
    ),
    Plant(
        "vocabulary_first_words",
        "each tp rank takes its words for the first of the vocabulary",
        lambda layout, config: layout.tp > 1,
        forward.vocabulary_first_words,
    ),
    Plant(
        "dropout_per_rank",
        "the noise of dropout depends on the rank",
        lambda layout, config: config.model.dropout > 0 and layout.world > 1,
        forward.dropout_per_rank,
        ("model.dropout=0.2",),
    ),
    Plant(
        "decay_on_norms",
        "weight decay also applies to norms, biases and learned positions",
        lambda layout, config: config.optim.weight_decay > 0,
        gradients.decay_on_norms,
        ("optim.weight_decay=0.1",),
    ),
    Plant(
        "deferred_weights_lost",
        "weights' gradients that backward leaves for later are never added",
        lambda layout, config: config.strategy.deferred_weights == "all",
        gradients.deferred_weights_lost,
    ),
    Plant(
        "deferred_weights_twice",
        "weights' gradients that backward leaves for later are added twice",
        lambda layout, config: config.strategy.deferred_weights == "all",
        gradients.deferred_weights_twice,
    ),
    Plant(
        "nodes_not_summed",
        "with parallel.reduce=by_node the dense gradients of different nodes are not summed",
        lambda layout, config: (
            layout.reduce == "by_node" and layout.tp == layout.cp == layout.pp == 1 and layout.world > 2 and layout.zero == 0
        ),
        gradients.nodes_not_summed,
    ),
    Plant(
        "expert_gradient_not_reduced",
        "the experts' gradients are not summed over the ranks that hold copies",
        lambda layout, config: _has_moe(config) and layout.copies > 1 and layout.cp == 1 and (layout.zero == 0 or layout.tp == 1),
        gradients.expert_gradient_not_reduced,
    ),
    Plant(
        "experts_flattened",
        "Muon takes all experts of a rank for one matrix, a row each",
        lambda layout, config: (
            _has_moe(config) and _takes_matrices(config) and layout.zero == 0 and layout.ep < config.model.num_experts
        ),
        whole_matrices.experts_flattened,
        ("optim.name=muon",),
    ),
    Plant(
        "matrix_cut_by_shard",
        "ZeRO-1's shards end inside of matrices, whose parts Muon takes for matrices",
        lambda layout, config: _takes_matrices(config) and layout.zero == 1 and layout.world > 1 and layout.tp == 1,
        whole_matrices.matrix_cut_by_shard,
        ("optim.name=muon",),
    ),
    Plant(
        "qk_clip_per_rank",
        "queries and keys are clipped by the largest logit of the rank's own sequences",
        lambda layout, config: optimizer_of(config.optim).clips_heads and layout.dp > 1 and layout.cp == 1,
        whole_matrices.qk_clip_per_rank,
        ("optim.name=muon_clip", "optim.qk_clip=0.5", "model.qk_norm=none"),
    ),
    Plant(
        "message_swapped",
        "the first pipeline rank sends the next one two micro-batches in each other's place",
        lambda layout, config: (
            layout.pp > 1 and layout.micro_batches > 1 and pipelines.begins_with_two(pipelined(config, layout.world))
        ),
        pipelines.message_swapped,
    ),
    Plant(
        "divided_by_micro_batches",
        "in a pipeline losses are divided by the number of micro-batches, too",
        lambda layout, config: layout.pp > 1 and layout.micro_batches > 1,
        pipelines.divided_by_micro_batches,
    ),
    Plant(
        "weights_cell_left_out",
        "a stage leaves out the gradients of weights of a micro-batch",
        lambda layout, config: (
            layout.pp > 1 and layout.micro_batches > 1 and pipelines.split_stage(pipelined(config, layout.world)) is not None
        ),
        pipelines.weights_cell_left_out,
    ),
    Plant(
        "balance_of_first_stages_unseeded",
        "the balance losses of layers that are in another stage than the main loss have no gradient",
        lambda layout, config: layout.pp > 1 and _is_balanced(config) and _has_moe_without_main_loss(layout, config),
        pipelines.balance_of_first_stages_unseeded,
    ),
    Plant(
        "embedding_summed_by_stages",
        "the gradient of an embedding that two stages use is summed in each by itself",
        lambda layout, config: layout.pp > 1 and layout.zero == 0 and len(pipelined(config, layout.world).words_ranks) > 1,
        pipelines.embedding_summed_by_stages,
    ),
    Plant(
        "norm_of_own_stage",
        "each stage clips by the norm of its own gradients",
        lambda layout, config: layout.pp > 1,
        pipelines.norm_of_own_stage,
    ),
)
PLANTS: Mapping[str, Plant] = {p.name: p for p in _ALL}
