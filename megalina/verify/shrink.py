"""The shrunk configuration: every mechanism of a user's model, in sizes that one process runs in float64 in no time."""

from dataclasses import replace

from megalina.blocks.routers import kind_of
from megalina.config import ModelConfig, OptimConfig, PretrainConfig, RouterConfig, is_moe_layer
from megalina.verify.recording import SEQUENCES

VOCABULARY = 200  # no multiple of the padding, so that some tensor-parallel rank has padded words
MOST_EXPERTS = 8
CLIP_NORM = 0.5  # small enough to act in every step
QK_CLIP = 0.5  # as well
LEAST_EPS = 1e-8  # below it Adam would magnify the rounding of gradients that are zero
STEPS = 3


def shrink(config: PretrainConfig, ranks: int) -> PretrainConfig:
    """Sizes that tp and ep of every power of two up to `ranks` divide; what a size switches on stays on, off stays off."""
    most = power_below(ranks)
    unit = max(4, most)
    length = 2 * unit
    model = _model(config.model, most, unit, length, config.train.seq_len)
    train = replace(
        config.train,
        steps=STEPS,
        global_batch_size=SEQUENCES,
        micro_batch_size=2,
        seq_len=length,
        dtype="float64",
        recompute="none",
        eval_interval=0,
        exit_step=0,
        resume="none",
        init_from="",
    )
    return replace(
        config,
        launch=replace(config.launch, ranks=1),
        model=model,
        router=shrink_router(config.router, config.model.num_experts, model.num_experts),
        parallel=replace(
            config.parallel,
            tp=1,
            ep=1,
            cp=1,
            cp_kind="all_gather",
            dispatch="rows",
            reduce="flat",
            zero=0,
            pp=1,
            pp_chunks=1,
            pp_layout="",
        ),
        optim=_optim(config.optim),
        train=train,
    )


def shrink_router(router: RouterConfig, before: int, after: int) -> RouterConfig:
    """A router of `before` experts for `after` of them; all its other settings stay."""
    groups, of_token = router.num_groups, router.groups_per_token
    grouped = "num_groups" in kind_of(router).settings
    if grouped:
        least = min(2, before // groups)  # experts a group
        groups = next(g for g in range(min(groups, after), 0, -1) if after % g == 0 and (after // g >= least or g == 1))
        of_token = min(of_token, groups if of_token == router.num_groups else max(1, groups - 1))
    top_k = after if router.top_k == before else min(router.top_k, max(1, after // 2))
    if grouped:
        top_k = min(top_k, of_token * after // groups)
    return replace(router, top_k=top_k, num_groups=groups, groups_per_token=of_token)


def power_below(ranks: int) -> int:
    """The largest power of two that is at most `ranks`."""
    return 1 << (ranks.bit_length() - 1)


def _model(model: ModelConfig, most: int, unit: int, length: int, old_length: int) -> ModelConfig:
    every = min(model.moe_every, 2)
    dense_first = min(model.dense_layers_first, 1)
    layers = min(model.num_layers, dense_first + 2 * every)
    if not any(is_moe_layer(model, i) for i in range(model.num_layers)):
        layers = dense_first = min(model.num_layers, 2)
    kv_heads = _multiple(min(model.num_kv_heads, 4), most)
    heads = kv_heads * min(model.num_heads // model.num_kv_heads, 2)
    own_size = model.head_dim not in (0, model.d_model // model.num_heads)
    attention_experts = min(model.attention_experts, heads)
    while attention_experts and heads % attention_experts:
        attention_experts -= 1
    positions = 0
    if model.max_positions:
        positions = length + (unit if model.max_positions > old_length else 0)
    if model.attention == "mla":
        model = _with_small_latent(model)
    return replace(
        model,
        num_layers=layers,
        dense_layers_first=dense_first,
        moe_every=every,
        d_model=max(32, 4 * heads),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=8 if own_size else 0,
        attention_experts=attention_experts,
        window=min(model.window, 3),
        full_attention_every=min(model.full_attention_every, 2),
        rotary_fraction=0.5 if model.rotary_fraction < 1 else 1.0,
        num_experts=_multiple(min(model.num_experts, MOST_EXPERTS), most),
        d_ff=16,
        dense_d_ff=6 * unit if model.dense_d_ff else 0,
        shared_d_ff=3 * unit if model.shared_d_ff else 0,
        max_positions=positions,
        vocab_size=VOCABULARY,
    )


def _with_small_latent(model: ModelConfig) -> ModelConfig:
    """Values stay as wide as keys, or as their part without positions, where they were."""
    wide = {model.qk_nope_head_dim + model.qk_rope_head_dim: 12, model.qk_nope_head_dim: 8}.get(model.v_head_dim, 6)
    return replace(
        model,
        q_lora_rank=10 if model.q_lora_rank else 0,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=wide,
    )


def _optim(optim: OptimConfig) -> OptimConfig:
    implementation = "torch" if optim.implementation == "apex" else optim.implementation  # Apex has no float64
    return replace(
        optim,
        clip_norm=min(optim.clip_norm, CLIP_NORM),
        eps=max(optim.eps, LEAST_EPS),
        qk_clip=min(optim.qk_clip, QK_CLIP),
        implementation=implementation,
    )


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
